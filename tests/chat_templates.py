"""Tokenizers that carry a chat template, and chats to put through it."""

import functools
import re

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# What families write as one token: <|im_end|>, <end_of_turn>, [INST], </s>, <｜User｜> and so on.
_SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"{}]*?[|｜]>|</?s>|<(?:start|end)_of_\w+>|\[/?[A-Z_]{3,}\]|<turn\|>|<\|turn>"
    r"|</?think>"
)
_TEXTS = (
    "the weather in the city is sunny and the answer is there",
    "\n\nuser\nassistant\nsystem\n what is it? it is. this was the reply:\n",
    "function name parameters arguments city type string object",
)


@functools.cache
def _rules(special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, normalized=False) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer.to_str()


def tokenizer_with(template, **options):
    """A byte-level tokenizer with merges, and the special tokens that the template writes."""
    special = ("<bos>", "<eos>", *sorted(set(_SPECIAL.findall(template))))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"} | options
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_rules(special)), **names)
    fast.chat_template = template
    return fast


def _special(template, **options):
    names = sorted(set(_SPECIAL.findall(template)))
    return [AddedToken(name, normalized=False, **options) for name in names]


def sentencepiece_tokenizer(template, *, strips=False):
    """A tokenizer as Llama 2 and Gemma have: a mark for each space, and one before the text.

    Args:
        template: its chat template.
        strips: whether special tokens take in the white space behind them, as Phi-3's do.
    """
    special = [AddedToken("<unk>"), *_special(template + "<s></s>", rstrip=strips)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    letters = [chr(code) for code in range(33, 127)]
    bytes_of_others = [f"<0x{code:02X}>" for code in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=[*special, *bytes_of_others],
        initial_alphabet=letters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return _fast(tokenizer, template)


def unigram_tokenizer(template):
    """A tokenizer that drops white space at the ends and beside special tokens, as T5's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=[AddedToken("<unk>"), *_special(template + "<s></s>")],
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return _fast(tokenizer, template)


def _fast(tokenizer, template):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )
    fast.chat_template = template
    return fast


def says(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}
SINGLE = [says("user", "Ask one?"), says("assistant", "Reply one.")]
MULTI = [*SINGLE, says("user", "Ask two?"), says("assistant", "Reply two.")]
THOUGHTFUL = [
    says("user", "Ask one?"),
    says("assistant", "Reply one.", reasoning_content="Thought one."),
    says("user", "Ask two?"),
    says("assistant", "Reply two.", reasoning_content="Thought two."),
]
ROWS = {
    "single": {"messages": SINGLE},
    "multi": {"messages": MULTI},
    "system": {"messages": [says("system", "Be brief."), *MULTI]},
    "tools": {
        "messages": [
            says("user", "How is Rome?"),
            says("assistant", "", tool_calls=[call("weather", city="Rome")]),
            says("tool", "sunny and warm", name="weather"),
            says("assistant", "It shines."),
        ],
        "tools": [WEATHER],
    },
    "reasoning": {"messages": THOUGHTFUL},
}
