"""Chat templates: which one is used, and how it writes a chat and marks its replies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from flowdata.text.conversation import Message

Form = Literal["own", "marked", "training"]
Span = tuple[int, int]  # of characters, the second one excluded

# `{% generation %}` in a template stands before what the model writes, `{% endgeneration %}` after.
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_DATE = re.compile(r"\bstrftime_now\s*\(")
_PROBE = "Is it written?"
_CHOICES = {  # what the marks decide; a template has none as a rule, which nobody need know
    "marked": "replies are what the chat template marks as generated",
    "training": "replies are what TRL's training form of this chat template marks as generated",
}


class ChatTemplate:
    """A tokenizer's chat template, in the form that chats are scored in.

    Attributes:
        form: ``"own"``, the tokenizer's template, which has no marks; ``"marked"``, the same where
            it has; ``"training"``, the form that TRL trains this template in.
        reads_strings: whether it writes content that is a string; templates of vision models may
            read a list of parts alone.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        options: values for the template's own variables, such as `enable_thinking`.

    Raises:
        ValueError: the tokenizer has no chat template, or no valid one, or it has no such variable.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template")
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        sources = {self._source(None), self._source([{}])}  # there may be one for chats with tools
        for name in options or {}:
            if not any(re.search(rf"\b{re.escape(name)}\b", source) for source in sources):
                raise ValueError(f"the chat template has no variable {name!r}")
        self.form: Form = "own"
        self._training_form: str | None = None
        if all(map(_MARK.search, sources)):
            self.form = "marked"
        elif len(sources) == 1:
            self._training_form = training_form(tokenizer)
            if self._training_form is not None:
                self.form = "training"
        self.reads_strings = self._reads_strings()

    def write(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        prompt: bool = False,
    ) -> str:
        """Return a chat as the tokenizer's own template writes it.

        Args:
            messages: at least one.
            tools: what the model may call, as transformers takes them.
            options: further values for the template's variables.
            prompt: whether the beginning of the next reply stands at the end.
        """
        with _refusals():
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=prompt,
                **{**self._options, **(options or {})},
            )
        return text

    def write_marked(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Span]]:
        """Return a chat as the marked or training form writes it, and where it marks replies."""
        from transformers.utils.chat_template_utils import render_jinja_template

        # The tokenizer's `apply_chat_template` makes the same call, and keeps the marks to itself
        # where it returns text. Tokens are made of many chats at once, so text is what is needed.
        present = [{k: v for k, v in message.items() if v is not None} for message in messages]
        with _refusals():
            texts, spans = render_jinja_template(
                conversations=[present],
                tools=list(tools) if tools else None,
                chat_template=self._training_form or self._source(tools),
                return_assistant_tokens_mask=True,
                **{**self._tokenizer.special_tokens_map, **self._options, **(options or {})},
            )
        return texts[0], [(start, end) for start, end in spans[0] if start < end]

    def remarks(self, target: str) -> list[str]:
        """Return what a user should know of the template, in sentences.

        Args:
            target: the text of a chat's targets.
        """
        sentences = [_CHOICES[self.form]] if self.form in _CHOICES else []
        if not target.rstrip().endswith(tuple(self.special_tokens)):
            sentences.append(
                "the chat template writes no token that ends a reply, so none is scored: "
                f"the first chat's targets end in {target[-20:]!r}"
            )
        source = self._source(None)
        if _DATE.search(source) and "date_string" not in self._options:
            has_variable = "date_string" in source
            sentences.append(
                "the chat template writes the date, so another day's tokens and losses differ; "
                + ("--template-option date_string=…" if has_variable else "--chat-template FILE")
                + " holds it"
            )
        return sentences

    @property
    def special_tokens(self) -> list[str]:
        """The tokenizer's special and added tokens, as text."""
        tokens = (*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab())
        return [token for token in dict.fromkeys(tokens) if token.strip()]

    def _reads_strings(self) -> bool:
        chat = [{"role": role, "content": _PROBE} for role in ("user", "assistant")]
        try:
            return self.write(chat).count(_PROBE) == len(chat)
        except ValueError as error:
            if type(error.__cause__).__name__ == "TemplateSyntaxError":
                raise ValueError(f"the chat template is no valid one: {error.__cause__}") from None
            return True  # it may refuse the chat for another reason

    def _source(self, tools: Any) -> str:
        """The template's text; of several named ones that which transformers would take."""
        source: str = self._tokenizer.get_chat_template(None, tools=list(tools) if tools else None)
        return source


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn errors of a template into ValueErrors, which say whose they are."""
    try:
        yield
    # Templates raise jinja2's errors, and at content of another kind any of Python's own.
    except Exception as error:
        raise ValueError(f"the chat template refuses the chat: {error}") from error


def training_form(tokenizer: Any) -> str | None:
    """Return the template that TRL trains a tokenizer with in place of its own.

    None is where TRL has no other for it, or is not installed.
    """
    try:
        from trl.chat_template_utils import get_training_chat_template
    except ImportError:
        return None
    try:
        form: str | None = get_training_chat_template(tokenizer)
    # TRL raises ValueError for a template it does not know. Before that it tries the template on
    # chats of its own, where a template may raise anything: it is not one that TRL knows then.
    except Exception:
        return None
    return form
