"""TRL's own SFT tests with FlowSFTTrainer, all weights 1, in SFTTrainer's place.

    python -m tests.peer_suite_trl SOURCES [-k EXPRESSION]

SOURCES is a checkout of github.com/huggingface/trl, near the installed version; nothing of it is
committed here. Its tests take models and data from the Hub. Here small stand-ins of the same
classes and formats lie under the same names, so that no test needs the Hub. The tests run twice,
with SFTTrainer and with ours: one that fails with both says nothing about us, one that fails with
ours alone does, and ends the program with 1. Without sources it ends with 2.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

OWNER = "trl-internal-testing"
SWITCH = "FLOWDATA_PEER_TRAINER"  # set while our trainer stands in SFTTrainer's place
ROOT = Path(__file__).parent.parent
NOT_OF_THIS_VERSION = ("_chunked_cross_entropy_loss", "_patch_chunked_ce_lm_head", "dft_loss")
REFUSALS = ("would apply to losses already weighted", "computes a loss of its own", "never sees")
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
MODELS = {  # names on the Hub: configuration, its settings, and the chat template in TRL's wheel
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2Config", {}, "qwen2_5"),
    "tiny-Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 4}, "qwen3"),
    "tiny-LlamaForCausalLM-3.2": ("LlamaConfig", {}, "llama3"),
    "tiny-MistralForCausalLM-0.2": ("MistralConfig", {}, "llama3"),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {
            "head_dim": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "output_router_logits": True,
        },
        "qwen3",
    ),
    "tiny-GptOssForCausalLM": (
        "GptOssConfig",
        {"head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        "gptoss",
    ),
    "tiny-GPTNeoXForCausalLM": ("GPTNeoXConfig", {}, "llama3"),
    "tiny-CohereForCausalLM": ("CohereConfig", {}, "llama3"),
}


def main(arguments: list[str]) -> int:
    """Run the suite twice and print how many tests ran and what they say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="?", default="")
    parser.add_argument("-k", default="TestSFTTrainer and not Slow")
    options = parser.parse_args(arguments)
    sources = Path(options.sources).resolve()
    if not options.sources or not (sources / "tests" / "test_sft_trainer.py").is_file():
        print(
            f"TRL's sources are missing: no tests/test_sft_trainer.py in {options.sources!r}. "
            "Check out github.com/huggingface/trl near the installed version, and pass the folder"
        )
        return 2
    with tempfile.TemporaryDirectory() as folder:
        make_stand_ins(Path(folder) / OWNER)
        theirs, ours = (run(sources, Path(folder), options.k, ours=ours) for ours in (False, True))
    both = [name for name in theirs if theirs[name] == ours.get(name) == "passed"]
    refused = [name for name in theirs if theirs[name] == "passed" and ours.get(name) == "refused"]
    lost = [name for name in theirs if theirs[name] == "passed" and name not in {*both, *refused}]
    failed = [name for name in theirs if theirs[name] == "failed"]
    skipped = [name for name in theirs if theirs[name] == "skipped"]
    print(
        f"{len(theirs)} tests of TRL: {len(both)} pass with SFTTrainer and with FlowSFTTrainer, "
        f"{len(refused)} are refused by name with weights, {len(lost)} pass with SFTTrainer alone; "
        f"{len(failed)} fail with SFTTrainer as well (of another version, or without a stand-in), "
        f"{len(skipped)} are skipped by TRL"
    )
    for name in lost:
        print(f"  with SFTTrainer alone: {name}")
    return 1 if lost or not both else 0


def run(sources: Path, folder: Path, expression: str, *, ours: bool) -> dict[str, str]:
    """Return what became of each test: passed, failed, refused by name, or skipped."""
    report = folder / f"report-{ours}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests_of_flowdata.peer_suite_trl"]
    command += ["-p", "no:cacheprovider", "-k", expression, f"--junitxml={report}", "--tb=short"]
    command += ["--rootdir", str(sources), str(sources / "tests" / "test_sft_trainer.py")]
    # TRL's tests are a package `tests` of their own, so that this file goes by another name.
    alias = folder / "alias"
    alias.mkdir(exist_ok=True)
    if not (alias / "tests_of_flowdata").exists():
        (alias / "tests_of_flowdata").symlink_to(ROOT / "tests")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(alias), str(ROOT)]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop(SWITCH, None)
    if ours:
        environment[SWITCH] = "1"
    done = subprocess.run(
        command, cwd=folder, env=environment, check=False, capture_output=True, text=True
    )
    (Path(tempfile.gettempdir()) / f"peer_suite_trl_{'ours' if ours else 'theirs'}.log").write_text(
        done.stdout + done.stderr
    )
    if not report.exists():
        raise RuntimeError(f"pytest gave no report: {(done.stdout + done.stderr)[-2000:]}")
    results = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        state = "failed" if kinds & {"failure", "error"} else "passed"
        text = "".join(str(child.get("message")) for child in case)
        if state == "failed" and any(words in text for words in REFUSALS):
            state = "refused"
        results[str(case.get("name"))] = "skipped" if "skipped" in kinds else state
    return results


# --- stand-ins for the Hub ------------------------------------------------------------------------


def make_stand_ins(folder: Path) -> None:
    """Write models, tokenizers and data sets where `from_pretrained` and `load_dataset` look."""
    import torch
    import transformers
    import trl

    templates = Path(trl.__file__).parent / "chat_templates"
    for name, (config_name, settings, template) in MODELS.items():
        tokenizer = make_tokenizer((templates / f"{template}.jinja").read_text())
        known = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        known |= {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
        config = getattr(transformers, config_name)(**{**SMALL, **known, **settings})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name, configs in DATA.items():
        write_data(folder / name, configs)


def make_tokenizer(template: str):
    """Return a byte-level tokenizer with the special tokens that the chat templates write."""
    import tokenizers
    import transformers

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|return|>"]
    words += ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|eot_id|>"]
    words += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: number for number, token in enumerate([*words, *sorted(alphabet)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(words)
    end = "<|im_end|>" if "im_end" in template else "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>"
    )
    fast.chat_template = template
    return fast


def says(role: str, content: str, **more):
    return {"role": role, "content": content, **more}


PAIRS = [
    (f"What is {word}?", f"{word.capitalize()} is better than the {other}.")
    for word, other in (
        *(("beautiful", "ugly"), ("explicit", "implicit"), ("simple", "complex")),
        *(("complex", "complicated"), ("flat", "nested"), ("sparse", "dense")),
        *(("now", "never"), ("readable", "terse"), ("practical", "pure")),
        *(("loud", "silent"), ("plain", "clever"), ("short", "long")),
        *(("early", "late"), ("small", "large"), ("warm", "cold")),
        *(("dry", "wet"), ("open", "closed")),
    )
]
CHATS = [{"messages": [says("user", q), says("assistant", a)]} for q, a in PAIRS]
TURNS = [{"prompt": [says("user", q)], "completion": [says("assistant", a)]} for q, a in PAIRS]
TOOL = {
    "type": "function",
    "function": {
        "name": "light",
        "description": "Switches a light.",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}},
    },
}
CALL = {"type": "function", "function": {"name": "light", "arguments": {"on": True}}}
THOUGHTS = [
    [
        says("user", question),
        {**says("assistant", answer), "thinking": "It is so."},
    ]
    for question, answer in PAIRS
]
DATA = {
    "zen": {
        "standard_language_modeling": [{"text": answer} for _, answer in PAIRS],
        "conversational_language_modeling": CHATS,
        "standard_prompt_completion": [
            {"prompt": q, "completion": f" {answer}"} for q, answer in PAIRS
        ],
        "conversational_prompt_completion": TURNS,
        "standard_implicit_prompt_preference": [
            {"chosen": f"{q} {a}", "rejected": f"{q} {a[::-1]}"} for q, a in PAIRS
        ],
    },
    "toolcall": {
        "language_modeling": [
            {
                "messages": [
                    says("user", question),
                    {**says("assistant", ""), "tool_calls": [CALL]},
                    {**says("tool", "done"), "name": "light"},
                    says("assistant", answer),
                ],
                "tools": json.dumps([TOOL]),
            }
            for question, answer in PAIRS
        ]
    },
    "harmony": {
        "language_modeling": [
            {"messages": messages, "chat_template_kwargs": {"reasoning_effort": "low"}}
            for messages in THOUGHTS
        ],
        "prompt_completion": [
            {
                "prompt": messages[:1],
                "completion": messages[1:],
                "chat_template_kwargs": {"reasoning_effort": "low"},
            }
            for messages in THOUGHTS
        ],
    },
    "dolly-chatml-sft": {"default": CHATS},
}


def write_data(folder: Path, configs: dict[str, list[dict]]) -> None:
    """Write data sets of several configurations, as the Hub's cards describe them."""
    folder.mkdir(parents=True)
    card = ["---", "configs:"]
    for name, rows in configs.items():
        card.append(f"- config_name: {name}\n  data_files:")
        for split, part in (("train", rows), ("test", rows[:2])):
            file = f"{name}-{split}.jsonl"
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in part))
            card.append(f"  - split: {split}\n    path: {file}")
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))


# --- the plugin that pytest loads in TRL's tests --------------------------------------------------


def no() -> bool:
    """Say of a package that it is not there."""
    return False


def no_such(name: str):
    raise AttributeError(name)


def pytest_configure(config) -> None:
    """Put our trainer in SFTTrainer's place before TRL's tests import it."""
    import torch
    import trl
    from datasets import Dataset
    from trl import import_utils
    from trl.trainer import sft_trainer

    # What the sources import and the installed version does not have: tests of it fail both times.
    sft_trainer.__getattr__ = lambda name: None if name in NOT_OF_THIS_VERSION else no_such(name)
    import_utils.__getattr__ = lambda name: no if name.startswith("is_") else no_such(name)
    if SWITCH not in os.environ:
        return
    from flowdata.integrations.trl import FlowSFTTrainer

    class WeightedSFTTrainer(FlowSFTTrainer):
        """FlowSFTTrainer, where each sample weighs 1."""

        def __init__(self, *args, train_dataset=None, **kwargs) -> None:
            if isinstance(train_dataset, Dataset):
                kwargs["scores"] = torch.ones(len(train_dataset))
            elif train_dataset is not None:
                train_dataset = train_dataset.map(lambda row: {"weight": 1.0})
            super().__init__(*args, train_dataset=train_dataset, **kwargs)

    trl.SFTTrainer = WeightedSFTTrainer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
