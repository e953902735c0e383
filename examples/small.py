"""What the language examples share: a model, a tokenizer and tokenised problems, or stand-ins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from flowdata.text import Fields, load_model, load_tokenizer, read_rows, tokenize_rows

DATA = Path(__file__).parent.parent.parent / "shared/assets/language/gsm8k_train.jsonl"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all language examples take."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--model", help="a hub id or a folder; SmolLM2's GGUF folder will do")
    options.add_argument("--data", default=str(DATA), help="JSONL with question and answer")
    options.add_argument("--samples", type=int, default=64)
    options.add_argument("--steps", type=int, default=20, help="optimiser steps")
    options.add_argument("--output", default="flow-example", help="folder for what is written")
    return options


def load(options: argparse.Namespace) -> tuple[Any, Any, Dataset]:
    """Return the model, its tokenizer, and samples with `input_ids` and `labels`."""
    if options.model:
        model, tokenizer = load_model(options.model).float(), load_tokenizer(options.model)
    else:
        print("no --model given: a small random Llama stands in, so figures mean little")
        model, tokenizer = _small_llama()
    if Path(options.data).exists():
        rows = read_rows(options.data, limit=options.samples)
    else:
        print(f"{options.data} is missing: sums stand in for it")
        rows = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(options.samples)]
    fields = Fields(prompt="question", completion="answer")
    samples = tokenize_rows(rows, tokenizer, fields, template=False, max_length=1024)
    lists = [{k: v.tolist() for k, v in samples[i].items()} for i in range(len(samples))]
    return model, tokenizer, Dataset.from_list(lists)


def _small_llama() -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: i for i, letter in enumerate(["<pad>", "<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        eos_token_id=1,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    return LlamaForCausalLM(config), fast
