"""Rows that are scored, and of which a user should know all the same: said once for all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from flowdata._common.excerpts import FROM_0
from flowdata._common.notices import logger
from flowdata.text.conversation import Conversation, Row
from flowdata.text.formats import Fields
from flowdata.text.formats.messages import chat_in
from flowdata.text.renderings import Rendering

# As data sets write them for the processors of multi-modal models: `<image>`, `<|image_pad|>`.
_MEDIA_TAG = re.compile(
    r"<(?:image|img|video|audio)(?:_?\d+)?>|<\|(?:image|img|vision|video|audio)\w*\|>"
)
_WHAT_A_REPLY_SAYS = ("content", "reasoning_content", "tool_calls")
_TAGS = (
    "tags of images, sound or video are in the text of rows, of %d in all, and the first is %s: "
    f"they are scored as text, and nothing is looked at or heard; {FROM_0}"
)
_EMPTY = (
    "replies are empty, in rows of which there are %d, and the first is %s: what is scored of "
    f"them is that they end; {FROM_0}"
)
_BARE = (
    "rows are bare text, of which there are %d, and the first is %s, and others go through the "
    "chat template, as chats and pairs with a system message, history, tools or documents always "
    f"do; template=True puts all of them through it; {FROM_0}"
)


class RowRemarks:
    """What is to be said of rows, as they are looked at one after another."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[int, str]] = {}  # by sentence: how many, and the first
        self._has_chats = False

    def look_at(
        self, number: int, conversation: Conversation, renderings: Sequence[Rendering]
    ) -> None:
        """Note what is odd in a row.

        Args:
            number: the row's.
            conversation: what it says.
            renderings: its samples as text.
        """
        tag = next(filter(None, (_MEDIA_TAG.search(each.text) for each in renderings)), None)
        if tag is not None:
            self._note(_TAGS, f"{tag[0]!r} in row {number}")
        if renderings[0].num_messages:
            self._has_chats = True
        else:
            self._note(_BARE, f"row {number}")
        for message, is_target in zip(conversation.messages, conversation.is_target, strict=True):
            if is_target and not any(map(message.get, _WHAT_A_REPLY_SAYS)):
                self._note(_EMPTY, f"row {number}")
                break

    def say(self) -> None:
        """Say what was noted."""
        for sentence, (count, first) in self._rows.items():
            if sentence != _BARE or self._has_chats:
                logger.warning(sentence, count, first)

    def _note(self, sentence: str, place: str) -> None:
        count, first = self._rows.get(sentence, (0, place))
        self._rows[sentence] = count + 1, first


def lacking_template(row: Row, number: int, fields: Fields) -> str:
    """Return what to say of a row that only a chat template can write, where there is none.

    Args:
        row: the row.
        number: its place.
        fields: the columns that are read.
    """
    is_pair = fields.prompt is not None and isinstance(chat_in(row.get(fields.prompt)), str)
    extras = {name: getattr(fields, name) for name in ("system", "history", "tools")}
    columns = {name: column for name, column in extras.items() if column and row.get(column)}
    what = "a chat"
    remedy = "name one (--chat-template FILE), or a tokenizer that has one (--tokenizer)"
    if is_pair and columns:
        what = " and ".join(map(repr, columns.values()))
        flags = " ".join(f"--{name}-column ''" for name in columns)
        remedy += f"; or score the pairs without that ({flags})"
    return f"row {number} holds {what}, and the tokenizer has no chat template: {remedy}; {FROM_0}"


def warn_of_lost_targets(
    num_left: int, num_lost: int, max_length: int | None, truncation: str
) -> None:
    """Warn where no sample has a target left, as cutting can do.

    Args:
        num_left: targets of all samples.
        num_lost: samples that lost all of theirs.
        max_length: the length at which they were cut.
        truncation: which tokens were kept.
    """
    if num_left or not num_lost:
        return
    rest = ", or truncation='keep_end', which cuts the prompt instead"
    logger.warning(
        "no sample has a target left, so that nothing can be scored or learned: all of the %s that "
        "had one lost it at max_length=%d; take a greater length%s",
        f"{num_lost:,}",
        max_length,
        rest if truncation == "keep_start" else "",
    )
