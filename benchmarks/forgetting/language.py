"""Language: SmolLM2-135M-Instruct learns GSM8K; other text shows what is forgotten.

Target: the loss of GSM8K's test answers. Retained: WikiText-2 and PIQA through
lm-evaluation-harness, and the loss of code of Python's standard library. The losses of GSM8K lie
close together; they differ more in ``--data mixed``, which trains on GSM8K, code and prose
together, in ``--data noisy``, where the words of every third answer are shuffled, and in ``--data
short``, where an answer is its final number alone, in training and test.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, RandomSampler, Sampler

import flowdata
from benchmarks.forgetting import harness
from flowdata.losses import fused_causal_lm_loss
from flowdata.scoring.collate import pad_collate
from flowdata.study.methods import ABLATIONS, LANGUAGE_ONLY, METHODS, Method, passes, train
from flowdata.study.runs import Record, run_study
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text import Fields, TokenSamples, load_model, load_tokenizer, read_rows, tokenize_rows
from flowdata.token_weights import align_token_weights

ASSETS = Path(__file__).resolve().parents[2].parent / "shared" / "assets"
MAIN = {name: method for name, method in METHODS.items() if name != "linear probe"}
MAIN |= {"pre-trained": Method(trains=False)} | LANGUAGE_ONLY
EXTRA = ABLATIONS
ALL = {**MAIN, **EXTRA}
RATES = (1e-4, 3e-4, 1e-3)
WINDOW = 8  # batches that are drawn together and sorted by length
MULTIPLE = 16  # tokens of a batch's samples; a CPU's bfloat16 attention is slow between
PAIR = Fields(prompt="question", completion="answer")


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured in a run; rows but for `max_length`, in tokens."""

    data: str = "gsm8k"
    rows: int = 128
    epochs: int = 1
    batch: int = 8
    max_length: int = 384
    validation: int = 32
    test: int = 64
    code: int = 12
    wikitext: int = 2
    piqa: int = 100
    exact_match: int = 0


QUICK_METHODS = ("standard", "FLOW", "WiSE-FT", "FLOW + WiSE-FT")
QUICK = {"rows": 32, "validation": 8, "test": 16, "code": 4, "wikitext": 1, "piqa": 20}


class Weighted(Dataset[dict[str, Tensor]]):
    """Token samples with a weight for each label."""

    def __init__(self, samples: TokenSamples, weights: list[Tensor]) -> None:
        self.samples, self.weights = samples, weights

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return sample | {"weight": align_token_weights(self.weights[index], sample["labels"])}


class LengthBatches(Sampler[list[int]]):
    """Batches of samples of like length, in random order: little padding is trained on.

    Args:
        sampler: what to draw from, in its order.
        lengths: tokens of each sample.
        size: samples in a batch; what is left over at the end is dropped.
    """

    def __init__(self, sampler: Sampler[int], lengths: list[int], size: int) -> None:
        self.sampler, self.lengths, self.size = sampler, lengths, size

    def __len__(self) -> int:
        return len(self.sampler) // self.size  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        drawn = list(self.sampler)[: len(self) * self.size]
        window, batches = WINDOW * self.size, []
        for start in range(0, len(drawn), window):
            near = sorted(drawn[start : start + window], key=self.lengths.__getitem__)
            batches += [near[i : i + self.size] for i in range(0, len(near), self.size)]
        for index in torch.randperm(len(batches)).tolist():
            yield batches[index]


class Language:
    """Runs a method on one model and data set.

    Args:
        model: a causal language model for `flowdata.text.models.load_model`.
        assets: the folder that holds ``language/``.
        sizes: see there.
        scores: folder in which the losses of the pre-trained model are kept.
    """

    def __init__(self, model: str, assets: Path, sizes: Sizes, scores: Path) -> None:
        self.folder, self.sizes, self.scores = assets / "language", sizes, scores
        if not (self.folder / "gsm8k_train.jsonl").is_file():
            raise SystemExit(f"{self.folder} holds no gsm8k_train.jsonl: see --assets")
        # transformers refuses to cast GGUF models, though their weights are plain by now.
        self.model, self.tokenizer = nn.Module.float(load_model(model)), load_tokenizer(model)
        self.test = self._tokens(self._problems("gsm8k_test.jsonl")[: sizes.test])
        held_out = [{"text": text} for text in _cut(code_files(held_out=True), 1500)[: sizes.code]]
        self.code = tokenize_rows(
            held_out, self.tokenizer, Fields(completion="text"), template=False, max_length=512
        )
        self.start = lru_cache(maxsize=8)(self._start)

    def _start(self, seed: int) -> tuple[TokenSamples, TokenSamples, flowdata.Scores]:
        """What to train on, what to choose the rate by, and the losses under the frozen model."""
        rows, sizes = self._problems("gsm8k_train.jsonl"), self.sizes
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        validation = [rows[index] for index in order[: sizes.validation]]
        chosen = [rows[index] for index in order[sizes.validation :]]
        if sizes.data == "mixed":
            chosen = mixed(chosen, sizes.rows, seed)
        if sizes.data == "noisy":
            chosen = noisy(chosen, seed)
        samples = self._tokens(chosen[: sizes.rows])
        scorer = flowdata.LossScorer(
            self.model,
            "causal_lm",
            token_losses=True,
            columns=("gradient_norm",),
            progress=False,
        )
        folder = self.scores / samples.digest()[:16]
        scores = scorer.score(samples, store=folder, dataset_id=samples.digest())
        return samples, self._tokens(validation), scores

    def _problems(self, name: str) -> Any:
        rows = read_rows(str(self.folder / name))
        return short(rows) if self.sizes.data == "short" else rows

    def _tokens(self, rows: Any) -> TokenSamples:
        return tokenize_rows(
            rows, self.tokenizer, PAIR, template=True, max_length=self.sizes.max_length
        )

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method, and measure."""
        samples, validation, scores = self.start(seed)
        method, model = ALL[name], copy.deepcopy(self.model)
        weights = target_weights(method, scores)
        if method.trains:
            self._fine_tune(model, method, samples, weights, rate, seed)
        limits = {"wikitext": self.sizes.wikitext, "piqa": self.sizes.piqa}
        exact = self._harness(model, {"gsm8k": self.sizes.exact_match})
        means = torch.stack([part.mean() for part in weights])
        held_out, target, code = nlls(model, [validation, self.test, self.code])
        return {
            "validation": -held_out,
            "target": {"nll": target, **exact},
            "retained": {**self._harness(model, limits), "code nll": code},
            "loss_quartiles": scores.losses.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist(),
            "mean_weight": means.mean().item(),
            "effective_share": flowdata.effective_sample_size(means) / len(means),
        }

    def _fine_tune(
        self,
        model: nn.Module,
        method: Method,
        samples: TokenSamples,
        weights: list[Tensor],
        rate: float,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        sampler: Sampler[int] = RandomSampler(samples)
        if method.resample:
            drawn = torch.stack([part.mean() for part in weights])
            sampler = flowdata.FlowSampler(drawn, seed=seed)
            weights = [torch.ones_like(part) for part in weights]
        lengths = np.diff(samples.offsets).tolist()
        batches = DataLoader(
            Weighted(samples, weights),
            batch_sampler=LengthBatches(sampler, lengths, self.sizes.batch),
            collate_fn=collate,
        )
        adam = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0, fused=True)
        loss = partial(batch_loss, model, rule=method.rule)
        steps = self.sizes.epochs * len(batches)
        epochs = passes(batches, self.sizes.epochs)
        train(model, epochs, steps, loss, adam, method, seed=seed, warmup=0.03)

    def _harness(self, model: nn.Module, limits: dict[str, int]) -> dict[str, float]:
        files = {
            "wikitext": self.folder / "wikitext2_valid.txt",
            "piqa": self.folder / "piqa_valid_dev.jsonl",
            "gsm8k": self.folder / "gsm8k_test.jsonl",
        }
        if not any(limits.values()):
            return {}
        lowered = nn.Module.bfloat16(copy.deepcopy(model))
        return harness.evaluate(lowered, self.tokenizer, files, limits=limits)


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch padded on the right to a multiple of 16 tokens; padding is no target."""
    batch = pad_collate(samples)
    missing = -batch["input_ids"].shape[1] % MULTIPLE
    fill = {"labels": IGNORE_INDEX}
    return {name: F.pad(v, (0, missing), value=fill.get(name, 0)) for name, v in batch.items()}


def batch_loss(model: nn.Module, batch: dict[str, Tensor], rule: Any = None) -> Tensor:
    """Return Σ weight · loss over the batch's target tokens, divided by their number.

    Padding is on the right, where no token of a causal model looks: there is no attention mask.
    """
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        decoder = model.get_decoder()
        hidden = decoder(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        head = model.get_output_embeddings()
        return fused_causal_lm_loss(hidden, head, batch["labels"], batch["weight"], token_rule=rule)


def nlls(model: nn.Module, sets: list[TokenSamples]) -> list[float]:
    """Return the mean loss of all target tokens of each set, in nats; scored in one pass."""
    scorer = flowdata.LossScorer(model, "causal_lm", progress=False)
    scores = scorer.score(ConcatDataset(sets), dataset_id=" ".join(part.digest() for part in sets))
    sizes = [len(part) for part in sets]
    sums = [part.sum().item() for part in (scores.losses.double() * scores.counts).split(sizes)]
    counts = [part.sum().item() for part in scores.counts.split(sizes)]
    return [total / count for total, count in zip(sums, counts, strict=True)]


def target_weights(method: Method, scores: flowdata.Scores) -> list[Tensor]:
    """Return the weights of each sample's targets; a sample's own is spread over them."""
    weights = torch.ones(len(scores)) if method.weights is None else method.weights(scores)
    if len(weights) != int(scores.counts.sum()):
        weights = weights.repeat_interleave(scores.counts)
    return list(weights.split(scores.counts.tolist()))


# --- text ------------------------------------------------------------------------------------


def mixed(problems: list[Any], rows: int, seed: int) -> list[dict[str, str]]:
    """Return a third each of problems, code and prose, shuffled."""
    order = np.random.default_rng(seed)
    share = -(-rows // 3)
    code = _continuations("Continue this Python code:", _cut(code_files(held_out=False), 600))
    prose = _continuations("Continue this text:", _cut(pydoc_data.topics.topics.values(), 600))
    parts = [problems[:share]]
    for kind in (code, prose):
        parts.append([kind[index] for index in order.permutation(len(kind))[:share]])
    together = [dict(row) for part in parts for row in part]
    return [together[index] for index in order.permutation(len(together))]


def short(problems: Any) -> list[dict[str, str]]:
    """Return the problems with their final number as the whole answer."""
    return [dict(row) | {"answer": row["answer"].split("####")[-1].strip()} for row in problems]


def noisy(problems: list[Any], seed: int) -> list[dict[str, str]]:
    """Return the problems with the words of every third answer in random order."""
    random = np.random.default_rng(seed)
    rows = [dict(row) for row in problems]
    for row in rows[::3]:
        row["answer"] = " ".join(random.permutation(row["answer"].split()))
    return rows


def code_files(*, held_out: bool) -> Iterator[str]:
    """Give the standard library's modules: every other one is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    for file in files[int(held_out) :: 2]:
        yield file.read_text(encoding="utf-8")


def _cut(texts: Any, size: int) -> list[str]:
    """Whole pieces of so many characters, the first one of each text first."""
    pieces = [[t[i : i + size] for i in range(0, len(t) - size + 1, size)] for t in texts]
    longest = max(map(len, pieces))
    return [part[row] for row in range(longest) for part in pieces if row < len(part)]


def _continuations(request: str, pieces: list[str]) -> list[dict[str, str]]:
    """Rows that ask to go on from the first half of a piece."""
    halves = [(piece[: len(piece) // 2], piece[len(piece) // 2 :]) for piece in pieces]
    return [{"question": f"{request}\n\n{first}", "answer": second} for first, second in halves]


# --- the command -----------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what a study of language can be told."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds language/")
    parser.add_argument("--model", required=True, help="SmolLM2's GGUF file; any causal model")
    parser.add_argument("--data", choices=("gsm8k", "mixed", "noisy", "short"), default="gsm8k")
    parser.add_argument("--rows", type=int, help="to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--exact-match", type=int, default=0, help="test problems to answer")
    parser.add_argument("--no-harness", action="store_true", help="without PIQA and WikiText-2")


def study(options: argparse.Namespace) -> None:
    """Run what is missing of the study."""
    given = {name: getattr(options, name) for name in ("data", "epochs", "exact_match")}
    sizes = asdict(Sizes(**given)) | (QUICK if options.quick else {})
    if options.rows is not None:
        sizes["rows"] = options.rows
    if options.no_harness:
        sizes |= {"wikitext": 0, "piqa": 0}
    else:
        harness.check_installed()
    task = Language(options.model, options.assets, Sizes(**sizes), options.results / "scores")
    rates = options.rates or (RATES[1:2] if options.quick else RATES)
    name = Path(options.model).stem
    run_study(
        options.results / f"forgetting_language_{sizes['data']}.jsonl",
        {"study": "language", "target": f"{name} on {sizes['data']}", **sizes},
        task.run,
        methods={name: rates if ALL[name].trains else (0.0,) for name in options.methods},
        seeds=options.seeds or range(1 if options.quick else 3),
    )
