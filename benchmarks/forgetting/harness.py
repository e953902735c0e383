"""Language tasks through lm-evaluation-harness, on local files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

TASKS = Path(__file__).parent / "tasks"
_METRICS = {
    "wikitext": ("word_perplexity,none", "WikiText-2 perplexity", 1),
    "piqa": ("acc,none", "PIQA accuracy", 100),
    "gsm8k": ("exact_match,number", "exact match accuracy", 100),
}
# Documents in a forward pass: answers are written token by token, which costs as much for few.
_BATCH = {"wikitext": 16, "piqa": 16, "gsm8k": 50}


def check_installed() -> None:
    """Exit with the remedy if the harness is not there."""
    try:
        from lm_eval import simple_evaluate  # noqa: F401
    except ImportError:
        raise SystemExit(
            "PIQA and WikiText-2 need lm-evaluation-harness: pip install lm_eval==0.4.13, "
            "or leave them out with --no-harness"
        ) from None


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    files: dict[str, Path],
    *,
    limits: dict[str, int],
) -> dict[str, float]:
    """Return the harness's measures, by name.

    Args:
        model: a Hugging Face causal language model.
        tokenizer: the model's.
        files: the data of each task (``wikitext``, ``piqa``, ``gsm8k``), text or JSON lines.
        limits: number of documents of each task; 0 leaves the task out.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    measures = {}
    manager = TaskManager(include_defaults=False)
    model.eval()
    # Without softmax_dtype the harness sums a bfloat16 model's log-likelihoods in 8 bits, and two
    # models whose perplexities differ by 2 % get the same one.
    wrapped = partial(HFLM, pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    for name, limit in limits.items():
        if limit == 0:
            continue
        with _task(name, files[name], limit) as task:
            results = simple_evaluate(
                model=wrapped(batch_size=_BATCH[name]),
                tasks=[task],
                task_manager=manager,
                apply_chat_template=name == "gsm8k",
                bootstrap_iters=0,
                log_samples=False,
            )
        key, title, scale = _METRICS[name]
        measures[title] = scale * results["results"][f"flowdata_{name}"][key]
    return measures


@contextmanager
def _task(name: str, data: Path, limit: int) -> Iterator[dict[str, Any]]:
    """The task's configuration, with its first `limit` documents in a file of their own."""
    import yaml

    config: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    text = data.read_text(encoding="utf-8")
    rows = articles(text) if data.suffix == ".txt" else map(json.loads, text.splitlines())
    documents = list(islice(rows, limit))
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
        yield config | {"dataset_kwargs": {"data_files": {"test": str(file)}}}


def articles(text: str) -> Iterator[dict[str, str]]:
    """Yield the articles of WikiText, each of which begins with a heading " = Title = "."""
    parts = re.split(r"^(?= = [^=].*[^=] = $)", text, flags=re.MULTILINE)
    yield from ({"text": part} for part in parts if part.strip())
