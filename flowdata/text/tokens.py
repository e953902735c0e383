"""Rows of text to token samples: prompts with completions, and chats. Completions are targets."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from flowdata._common.growing_array import GrowingArray
from flowdata._common.notices import is_first_rank, say
from flowdata._common.offsets import lengths_of
from flowdata._common.unreadable import Unreadable
from flowdata.scores.matching import TOKENS_PREFIX
from flowdata.store.fingerprint.rows import digest_tokens
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text.chats import render_conversation
from flowdata.text.conversation import LEFT_OUT, Conversation, Row, why_unreadable
from flowdata.text.encoding import Encoded, Truncation, encode, kept_part
from flowdata.text.formats import Fields, find_fields, read_conversation
from flowdata.text.remarks import RowRemarks, lacking_template, warn_of_lost_targets
from flowdata.text.renderings import Rendering
from flowdata.text.templates import ChatTemplate, Form

_NO_TOKENS: Encoded = ([], np.zeros(0, dtype=np.bool_))  # the sample of a row that can't be read
_SAMPLES_AT_ONCE = 1 << 20  # of which targets are counted
_ROWS_AT_ONCE = 4096  # given to the tokenizer in one call, which runs them on all cores


class TokenSamples(Dataset[dict[str, Tensor]]):
    """Tokenised samples in flat arrays; item i is `{"input_ids": (T,), "labels": (T,)}`, int64.

    A row is one sample, unless its template makes a sample of each of its replies (`rows`).

    Args:
        samples_of_rows: for each row its samples: tokens, and which of them are targets.
        max_length: longer samples are cut to so many tokens; None cuts none.
        truncation: which tokens of a sample are kept: ``"keep_start"``, or ``"keep_end"``, which
            cuts the prompt rather than the completion.
        unreadable: why rows can't be read, by their number; it is looked at once all samples are
            there. Such a row has one sample, without tokens, which raises when it is read.

    Attributes:
        input_ids: (Σ T,) int32, the tokens of all samples one after another.
        is_target: (Σ T,) bool; labels are −100 where it is false.
        offsets: (N + 1,) int64, where each sample begins and the last one ends.
        rows: (N,) int64, the row that each sample is of, ascending.
        truncation: as given.
        replies: what told the replies of chats from the rest: ``"marked"`` and ``"training"`` are
            marks of the chat template and of TRL's training form of it, ``"own"`` is what each
            reply adds to the chat; None where no row went through a chat template.
        num_cut: samples shortened to the maximum length.
        num_cut_targets: those of them that lost targets, some or all.
        num_lost_targets: those of them that lost all targets, and have no loss.
        unreadable: why rows can't be read, by their number.
    """

    # The arrays are flat because a million small tensors would take more memory for themselves
    # than for their tokens, in every worker of a DataLoader again. Large ones lie in files:
    #
    #   input_ids   5 6 7 8 | 5 9 | 5 6 4
    #   is_target   0 0 1 1 | 0 1 | 0 1 1
    #   offsets     0         4     6       9

    offsets_tell_lengths = True  # so that a scorer need not read every sample for them

    def __init__(
        self,
        samples_of_rows: Iterable[Sequence[Encoded]],
        max_length: int | None,
        truncation: Truncation = "keep_start",
        unreadable: Mapping[int, str] | None = None,
    ) -> None:
        self.unreadable = {} if unreadable is None else unreadable
        ids, is_targets = GrowingArray("i"), GrowingArray("b")
        offsets, rows = GrowingArray("q"), GrowingArray("q")
        offsets.extend([0])
        self.truncation = truncation
        self.replies: Form | None = None
        self.num_cut = self.num_cut_targets = self.num_lost_targets = 0
        for row, samples in enumerate(samples_of_rows):
            for tokens, is_target in samples:
                part = kept_part(len(tokens), max_length, truncation)
                self._count(len(tokens), is_target, part)
                ids.extend(tokens[part])
                is_targets.extend(array("b", is_target[part].tobytes()))
                offsets.extend([len(ids)])
                rows.extend([row])
        self.input_ids, self.is_target = ids.finish(), is_targets.finish().view(np.bool_)
        self.offsets, self.rows = offsets.finish(), rows.finish()

    def _count(self, length: int, is_target: NDArray[np.bool_], part: slice) -> None:
        rest = is_target[part]
        self.num_cut += len(rest) < length
        # A sample's first token has nothing before it that could predict it: it is no target.
        before, after = is_target[1:].sum(), rest[1:].sum()
        self.num_cut_targets += bool(after < before)
        self.num_lost_targets += bool(after == 0 < before)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = int(self.rows[index])
        if row in self.unreadable:
            raise ValueError(self.unreadable[row])
        tokens = slice(self.offsets[index % len(self)], self.offsets[index % len(self) + 1])
        ids = torch.from_numpy(self.input_ids[tokens].astype(np.int64))
        return {
            "input_ids": ids,
            "labels": ids.masked_fill(torch.from_numpy(~self.is_target[tokens]), IGNORE_INDEX),
        }

    @property
    def is_split(self) -> bool:
        """Whether some row is several samples, one for each of its replies."""
        return bool((self.rows[1:] == self.rows[:-1]).any())  # they ascend

    @property
    def num_targets(self) -> int:
        """Targets of all samples; a sample's first token has nothing before it, and is none."""
        count = int(self.is_target.sum())
        for first in range(0, len(self), _SAMPLES_AT_ONCE):
            offsets = self.offsets[first : first + _SAMPLES_AT_ONCE + 1] - self.offsets[0]
            starts = offsets[:-1][np.diff(offsets) > 0]
            count -= int(self.is_target[starts].sum())
        return count

    @property
    def lengths(self) -> Tensor:
        """Tokens in each sample, (N,) int32."""
        return torch.from_numpy(lengths_of(self.offsets))

    def part(self, start: int, stop: int) -> TokenSamples:
        """Return the samples from `start` up to `stop`, whose arrays are views of these."""
        part = copy(self)
        tokens = slice(self.offsets[start], self.offsets[stop])
        part.input_ids, part.is_target = self.input_ids[tokens], self.is_target[tokens]
        part.offsets = self.offsets[start : stop + 1] - self.offsets[start]
        part.rows = self.rows[start:stop]
        return part

    def readable(self) -> TokenSamples:
        """Return the samples without those of rows that can't be read."""
        readable = copy(self)
        is_readable = ~np.isin(self.rows, list(self.unreadable))
        # The others have no tokens: where they begin and end is left out, and nothing else moves.
        readable.offsets = np.append(self.offsets[:-1][is_readable], self.offsets[-1])
        readable.rows, readable.unreadable = self.rows[is_readable], {}
        return readable

    def digest(self) -> str:
        """Return the hex SHA-256 of all tokens, targets and offsets."""
        return digest_tokens(self.input_ids, self.offsets, self.is_target)

    def identity(self) -> str:
        """Return what a store names the samples by."""
        return TOKENS_PREFIX + self.digest()


def tokenize_rows(
    rows: Iterable[Row | Unreadable],
    tokenizer: Any,
    fields: Fields | None = None,
    *,
    template: bool,
    template_options: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    truncation: Truncation = "keep_start",
    on_error: Literal["raise", "skip"] = "raise",
    on_first: Callable[[Encoded], None] | None = None,
) -> TokenSamples:
    """Return rows as token samples whose targets are the completions and replies.

    The tokens and targets are those that TRL's SFTTrainer makes of the same rows: of pairs of text,
    which end with the end-of-sequence token; of chats under `assistant_only_loss`, if the chat
    template marks replies or TRL has a training form of it that does; and of a prompt and
    a completion of messages, whose completion is the target. In a chat without marks every reply is
    a target, from where the template begins it to its end of turn. A template that writes earlier
    turns differently once later ones follow makes one sample of each reply. A reply's last
    character is a target with all of its tokens, where marks in TRL take the first of them alone.

    Args:
        rows: mappings with the text, which are passed over once.
        tokenizer: a Hugging Face tokenizer.
        fields: the columns that hold the text; those that are not named are found by their usual
            names in the first row.
        template: whether pairs go through the tokenizer's chat template; chats always do.
        template_options: values for the template's own variables, such as `enable_thinking`.
        max_length: longer samples are cut to so many tokens; None cuts none.
        truncation: which tokens of a sample are kept: ``"keep_start"``, or ``"keep_end"``, which
            cuts the prompt rather than the completion.
        on_error: ``"skip"`` gives a row that can't be read a sample that raises when it is read:
            the scorer's option of this name leaves it without a loss.
        on_first: called with the first sample's tokens and targets before further rows are read.

    Raises:
        ValueError: a row lacks a field or has something else than text in it, a chat has no
            reply, or its template refuses it or leaves out part of it; the row is named. Or there
            is no template, or `max_length` is below 1, or `truncation` is another word.
    """
    if template and not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; pass template=False")
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if truncation not in get_args(Truncation):
        raise ValueError(f"truncation must be 'keep_start' or 'keep_end', got {truncation!r}")
    renderer = _Renderer(tokenizer, template, template_options)
    unreadable: dict[int, str] = {}
    encoded = _encoded(_rendered(rows, fields, renderer), tokenizer, unreadable, on_error == "skip")
    if on_first is not None:
        encoded = _telling(encoded, on_first, max_length, truncation)
    samples = TokenSamples(encoded, max_length, truncation, unreadable)
    samples.replies = renderer.finish(samples.rows)
    warn_of_lost_targets(samples.num_targets, samples.num_lost_targets, max_length, truncation)
    return samples


class _Renderer:
    """Renders rows; the chat template is looked at when the first row needs it."""

    def __init__(
        self, tokenizer: Any, through_template: bool, options: Mapping[str, Any] | None
    ) -> None:
        self.tokenizer = tokenizer
        self._through_template = through_template
        self._options = options
        self._template: ChatTemplate | None = None
        self._is_described = False
        self.rows = RowRemarks()

    def template_for(self, conversation: Conversation) -> ChatTemplate | None:
        """The template that a conversation goes through; None is where it can do without."""
        if conversation.plain is not None and not self._through_template:
            return None
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self._options)
        return self._template

    def render(self, conversation: Conversation, template: ChatTemplate | None) -> list[Rendering]:
        if template is None:
            prompt, completion = conversation.plain or ("", "")
            end = self.tokenizer.eos_token or ""
            text = prompt + completion + end * (not completion.endswith(end))
            return [Rendering(text, prompt=prompt)]
        renderings = render_conversation(conversation, template)
        if not self._is_described:
            self._is_described = True
            for remark in template.remarks(renderings[-1].target_text()):
                _say(remark)
        return renderings

    def finish(self, rows: NDArray[np.int64]) -> Form | None:
        """Say what was noted of rows, and return what told replies from the rest of a chat."""
        self.rows.say()
        if self._template is None:
            if self._options:
                raise ValueError(
                    "template_options has no effect: no row goes through a chat template"
                )
            return None
        samples_of_rows = np.bincount(rows)
        if num_split := int((samples_of_rows > 1).sum()):
            _say(
                "the chat template writes earlier turns differently once later ones follow, so "
                f"{num_split:,} of {len(samples_of_rows):,} rows are scored reply by reply, each "
                "reply after the text that it would be generated after"
            )
        return self._template.form


def _say(sentence: str) -> None:
    """Say a sentence, on the first rank alone."""
    say(sentence, shown=is_first_rank())


def _rendered(
    rows: Iterable[Row | Unreadable], fields: Fields | None, renderer: _Renderer
) -> Iterator[list[Rendering] | Unreadable]:
    """What each row's samples are as text, or why it has none."""
    is_found = False
    for number, row in enumerate(rows):
        if isinstance(row, Unreadable):
            yield row
            continue
        try:
            if not is_found:
                fields, is_found = find_fields(row, fields), True
            conversation = read_conversation(row, fields or Fields())
        except (KeyError, TypeError, ValueError) as error:
            yield Unreadable(why_unreadable(number, error))
            continue
        if conversation.plain is None and not renderer.tokenizer.chat_template:
            raise ValueError(lacking_template(row, number, fields or Fields()))
        template = renderer.template_for(conversation)  # what is wrong with it, is so for all rows
        try:
            renderings = renderer.render(conversation, template)
        except ValueError as error:
            yield Unreadable(why_unreadable(number, error))
            continue
        renderer.rows.look_at(number, conversation, renderings)
        yield renderings


def _encoded(
    rows: Iterator[list[Rendering] | Unreadable],
    tokenizer: Any,
    unreadable: dict[int, str],
    skip: bool,
) -> Iterator[list[Encoded]]:
    """The samples of each row: tokens, and which of them are targets."""
    first, size = 0, 1  # the first row comes alone: it is shown before the others are read
    while batch := list(islice(rows, size)):
        size = min(2 * size, _ROWS_AT_ONCE)
        for number, row in enumerate(batch, first):
            if isinstance(row, Unreadable):
                if not skip:
                    raise ValueError(row.reason + LEFT_OUT)
                unreadable[number] = row.reason
        first += len(batch)
        renderings = [rendering for row in batch if isinstance(row, list) for rendering in row]
        encoded = iter(encode(renderings, tokenizer))
        for row in batch:
            yield list(islice(encoded, len(row))) if isinstance(row, list) else [_NO_TOKENS]


def _telling(
    samples_of_rows: Iterator[list[Encoded]],
    on_first: Callable[[Encoded], None],
    max_length: int | None,
    truncation: Truncation,
) -> Iterator[list[Encoded]]:
    """Pass samples on, and tell of the first one that has tokens, as far as it is kept."""
    is_told = False
    for samples in samples_of_rows:
        tokens, is_target = samples[0]
        if tokens and not is_told:
            part = kept_part(len(tokens), max_length, truncation)
            on_first((tokens[part], is_target[part]))
            is_told = True
        yield samples
