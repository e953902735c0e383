"""Language: SmolLM2-135M-Instruct learns GSM8K; other text shows what it forgets.

The target measure is the loss of GSM8K's test answers. The retained measures are the losses of
WikiText-2 and of code of Python's standard library, and through lm-evaluation-harness, where it is
installed and asked for, WikiText-2's perplexity and PIQA. Every run also has its drift, see
`language_readouts`. ``--data`` chooses what to train on:

- ``gsm8k``: the problems as they are; their losses lie close together.
- ``mixed``: problems, code and prose together, whose losses differ more.
- ``noisy``: problems, every third of which has the words of its answer shuffled.
- ``short``: problems whose answer is the final number alone, in training and in the test.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, Sampler

import flowdata
from benchmarks.forgetting import harness, texts
from benchmarks.forgetting.batches import (
    LengthBatches,
    Weighted,
    batch_loss,
    collate,
    target_weights,
)
from benchmarks.forgetting.images import ASSETS
from benchmarks.forgetting.language_readouts import (
    DTYPE,
    DriftReadout,
    item_losses,
    mean_loss,
    rivals,
    short_list,
)
from benchmarks.forgetting.methods import ABLATIONS, AVERAGES, TOKEN_METHODS, clean_rows
from flowdata.drift import DriftMeter
from flowdata.study import METHODS, Method, Record, grids, run_study, train
from flowdata.study.training import passes
from flowdata.text import Fields, TokenSamples, load_model, load_tokenizer, read_rows, tokenize_rows

CLEAN_ROWS = "clean rows alone"
_VISION_ALONE = ("linear probe", "output anchor", "FLOW + output anchor")
MAIN = {name: method for name, method in METHODS.items() if name not in _VISION_ALONE}
MAIN |= {"pre-trained": Method(trains=False)} | TOKEN_METHODS
EXTRA = {**ABLATIONS, CLEAN_ROWS: Method(clean_rows)}
ALL = {**MAIN, **EXTRA}
RATES = (1e-4, 3e-4, 1e-3)
PAIR = Fields(prompt="question", completion="answer")
_SETS = ("validation", "target", "WikiText-2", "code")  # of which losses are kept item by item
ItemLosses: TypeAlias = tuple[Tensor, Tensor]  # losses, and counts of tokens


@dataclass(frozen=True)
class Sizes:
    """The data of a run, and how much of it is trained on and measured.

    Attributes:
        data: ``gsm8k``, ``mixed``, ``noisy`` or ``short``.
        rows: number of rows to train on.
        epochs: number of passes over them.
        batch: number of rows in a batch.
        max_length: number of tokens that a row is cut to.
        validation: number of rows that the learning rate is chosen by.
        test: number of rows that measure the loss of answers.
        code: number of pieces that measure the loss of code.
        prose: number of WikiText-2's articles whose beginnings measure its loss; 0 takes all of
            its validation text.
        own_text: number of texts that the model writes as a probe of drift, after the beginning
            of a chat; half as many after the token that begins any text.
        wikitext: number of articles that measure the harness's perplexity.
        piqa: number of the harness's questions of PIQA.
        exact_match: number of problems that the model answers.
    """

    data: str = "gsm8k"
    rows: int = 48
    epochs: int = 1
    batch: int = 4
    max_length: int = 384
    validation: int = 16
    test: int = 16
    code: int = 6
    prose: int = 8
    own_text: int = 64
    wikitext: int = 2
    piqa: int = 100
    exact_match: int = 0


_MOST_TUNED = 4  # models in memory: as many as a grid of rates has, for the averages made of them
QUICK_METHODS = ("standard", "FLOW", "WiSE-FT", "FLOW + WiSE-FT")
QUICK = {"rows": 32, "validation": 8, "test": 16, "code": 4, "prose": 4, "own_text": 8}
QUICK |= {"wikitext": 1, "piqa": 20}


class Start(NamedTuple):
    """What all methods of one seed begin with.

    Attributes:
        samples: to train on.
        scores: the frozen model's losses of them.
        validation: the samples that the learning rate is chosen by.
        meter: of the drift on these.
    """

    samples: TokenSamples
    scores: flowdata.Scores
    validation: TokenSamples
    meter: DriftMeter


class Language:
    """Runs a method on one model and data set.

    Args:
        model: a causal language model for `flowdata.text.models.load_model`.
        assets: the folder that holds ``language/``.
        sizes: see `Sizes`.
        scores: folder for the losses of the pre-trained model, and for the texts it writes.
    """

    def __init__(self, model: str, assets: Path, sizes: Sizes, scores: Path) -> None:
        self.folder, self.sizes, self.scores = assets / "language", sizes, scores
        if not (self.folder / "gsm8k_train.jsonl").is_file():
            raise SystemExit(f"{self.folder} holds no gsm8k_train.jsonl: see --assets")
        self.model, self.tokenizer = load_model(model).float(), load_tokenizer(model)
        self.test = self._tokens(self._problems("gsm8k_test.jsonl")[: sizes.test])
        self.code = self._plain_tokens(texts.held_out_code(sizes.code))
        wikitext = (self.folder / "wikitext2_valid.txt").read_text()
        prose = texts.articles(wikitext, sizes.prose) if sizes.prose else texts.whole(wikitext)
        self.prose = self._plain_tokens(prose)
        self.drift = DriftReadout(self.model, self.tokenizer, sizes.own_text, scores)
        # All methods of a seed share one start, and averages share the training they are made of.
        # Seeds come one after another, and a start holds gigabytes.
        self.start = lru_cache(maxsize=1)(self._start)
        self.tuned = lru_cache(maxsize=_MOST_TUNED)(self._tuned)
        self.frozen_losses = cache(self._losses_of_others)

    def _start(self, seed: int) -> Start:
        rows, sizes = self._problems("gsm8k_train.jsonl"), self.sizes
        order = np.random.default_rng(seed).permutation(len(rows)).tolist()
        validation = [rows[index] for index in order[: sizes.validation]]
        training = [rows[index] for index in order[sizes.validation :]]
        if sizes.data == "mixed":
            training = texts.mixed(training, sizes.rows, seed)
        if sizes.data == "noisy":
            training = texts.noisy(training, seed)
        samples = self._tokens(training[: sizes.rows])
        scorer = flowdata.LossScorer(
            self.model,
            "causal_lm",
            dtype="float32",  # once for all methods of a seed, so that it may take its time
            token_losses=True,
            columns=("gradient_norm",),
            progress=False,
        )
        folder = self.scores / samples.digest()[:16]
        scores = scorer.score(samples, store=folder, dataset_id=samples.digest())
        validation_samples = self._tokens(validation)
        meter = DriftMeter(self.model, validation_samples, dtype=DTYPE)
        return Start(samples, scores, validation_samples, meter)

    def _problems(self, name: str) -> Any:
        rows = read_rows(str(self.folder / name))
        return texts.short(rows) if self.sizes.data == "short" else rows

    def _tokens(self, rows: Any) -> TokenSamples:
        return tokenize_rows(
            rows, self.tokenizer, PAIR, template=True, max_length=self.sizes.max_length
        )

    def _plain_tokens(self, rows: list[str]) -> TokenSamples:
        """Texts without a chat around them, of which every token is a target."""
        return tokenize_rows(
            [{"text": text} for text in rows],
            self.tokenizer,
            Fields(completion="text"),
            template=False,
            max_length=512,
        )

    def run(self, name: str, rate: float, seed: int) -> Record:
        """Fine-tune by a method, and measure."""
        start = self.start(seed)
        weights = target_weights(ALL[name], start.scores)
        model = self.model_of(name, rate, seed)
        losses = dict(zip(_SETS, self._item_losses(model, start.validation), strict=True))
        nll = {name: mean_loss(*items) for name, items in losses.items()}
        limits = {"wikitext": self.sizes.wikitext, "piqa": self.sizes.piqa}
        exact = self._harness(model, {"gsm8k": self.sizes.exact_match})
        means = torch.stack([part.mean() for part in weights])
        return {
            "validation": -nll["validation"],
            "target": {"nll": nll["target"], **exact},
            "retained": {
                "WikiText-2 nll": nll["WikiText-2"],
                "code nll": nll["code"],
                **self._harness(model, limits),
            },
            **self.drift(model, start.meter),
            "rivals": rivals(model, self.model, start.validation, nll["validation"]),
            "item_losses": {name: short_list(items[0]) for name, items in losses.items()},
            "loss_quartiles": start.scores.losses.quantile(
                torch.tensor([0.25, 0.5, 0.75])
            ).tolist(),
            "mean_weight": means.mean().item(),
            "effective_share": flowdata.effective_sample_size(means) / len(means),
        }

    def _item_losses(self, model: nn.Module, validation: TokenSamples) -> list[ItemLosses]:
        """The losses of each set; the frozen model has its own read once for all seeds."""
        others = self.frozen_losses() if model is self.model else self._losses_of_others(model)
        return [*item_losses(model, [validation]), *others]

    def _losses_of_others(self, model: nn.Module | None = None) -> list[ItemLosses]:
        return item_losses(model or self.model, [self.test, self.prose, self.code])

    def model_of(self, name: str, rate: float, seed: int) -> nn.Module:
        """Return the model that a method makes of the pre-trained one."""
        if name in AVERAGES:
            other, alpha = AVERAGES[name]
            return flowdata.wise_ft(self.model, self.tuned(other, rate, seed), alpha)
        return self.tuned(name, rate, seed) if ALL[name].trains else self.model

    def _tuned(self, name: str, rate: float, seed: int) -> nn.Module:
        start, method, model = self.start(seed), ALL[name], copy.deepcopy(self.model)
        weights = target_weights(method, start.scores)
        self._fine_tune(model, method, start.samples, weights, rate, seed)
        return model

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
            sample_weights = torch.stack([part.mean() for part in weights])
            sampler = flowdata.FlowSampler(sample_weights, seed=seed)
            weights = [torch.ones_like(part) for part in weights]
        lengths = np.diff(samples.offsets).tolist()
        batches = DataLoader(
            Weighted(samples, weights),
            batch_sampler=LengthBatches(sampler, lengths, self.sizes.batch),
            collate_fn=collate,
        )
        adam = partial(torch.optim.AdamW, lr=rate, weight_decay=0.0, fused=True)
        held = {"hold": method.hold, "reference": self.model}
        loss = partial(batch_loss, model, rule=method.rule, **held)
        method = replace(method, hold=0.0)  # which the loss has taken over
        epochs = self.sizes.epochs
        steps = epochs * len(batches)
        train(model, passes(batches, epochs), steps, loss, adam, method, seed=seed, warmup=0.03)

    def _harness(self, model: nn.Module, limits: dict[str, int]) -> dict[str, float]:
        files = {
            "wikitext": self.folder / "wikitext2_valid.txt",
            "piqa": self.folder / "piqa_valid_dev.jsonl",
            "gsm8k": self.folder / "gsm8k_test.jsonl",
        }
        if not any(limits.values()):
            return {}
        low_model = copy.deepcopy(model).bfloat16()
        return harness.evaluate(low_model, self.tokenizer, files, limits=limits)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a study of language."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds language/")
    parser.add_argument("--model", required=True, help="SmolLM2's GGUF file; any causal model")
    parser.add_argument("--data", choices=("gsm8k", "mixed", "noisy", "short"), default="gsm8k")
    parser.add_argument("--rows", type=int, help="to train on")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--exact-match", type=int, default=0, help="test problems to answer")
    parser.add_argument("--no-harness", action="store_true", help="without PIQA and WikiText-2")


def study(options: argparse.Namespace) -> None:
    """Run what the results file lacks of the study."""
    sizes = asdict(Sizes(options.data, epochs=options.epochs, exact_match=options.exact_match))
    if options.quick:
        sizes |= QUICK
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
        methods=grids(options.methods, rates, ALL),
        seeds=options.seeds or range(1 if options.quick else 3),
    )
