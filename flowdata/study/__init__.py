"""What would a model forget? Methods × learning rates × seeds on a model and data of your own.

`run_study` calls a function of yours for each method, rate and seed, keeps every run in a file and
goes on where it was stopped; `page` and `picture` say what came out. `fine_tune` trains a
classifier by any of `METHODS`, and `HeadTask` is the whole function for a task with a new head.

    from pathlib import Path
    from flowdata import LossScorer, study

    scores = LossScorer(model).score(train)

    def run(name, rate, seed):
        method, tuned = study.METHODS[name], copy.deepcopy(model)
        weights = study.sample_weights(method, scores)
        study.fine_tune(tuned, train, weights, method, rate=rate, seed=seed, epochs=3, batch=32)
        return {"validation": study.accuracy(tuned, validation),
                "target": {"accuracy": study.accuracy(tuned, test)},
                "retained": {"old accuracy": study.accuracy(tuned, old_test)}}

    options = {"study": "mine", "target": "new task"}
    rates = study.grids(["standard", "FLOW", "FLOW + l2"], [0.01, 0.03, 0.1])
    records = study.run_study(Path("mine.jsonl"), options, run, methods=rates, seeds=range(3))
    Path("mine.md").write_text(study.page(options, records))
    Path("mine.png").write_bytes(study.picture(records))

matplotlib (pictures), scipy (paired tests) and peft (rows with LoRA) come with the extra:
``pip install "flowdata-torch[study]"``.
"""

from flowdata.study.classify import accuracy, fine_tune, sample_weights
from flowdata.study.head_task import HeadTask, Sizes, Split
from flowdata.study.methods import METHODS, STANDARD, TEMPERATURES, grids
from flowdata.study.parts import anchor, averaging, hft, lora, mofo, weight_averaging
from flowdata.study.pictures import picture
from flowdata.study.recipe import HeadRecipe
from flowdata.study.runs import Record, chosen_rates, chosen_runs, read_records, run_study
from flowdata.study.table import page, studies
from flowdata.study.training import Hooks, Method, Part, train

__all__ = [
    "METHODS",
    "STANDARD",
    "TEMPERATURES",
    "HeadRecipe",
    "HeadTask",
    "Hooks",
    "Method",
    "Part",
    "Record",
    "Sizes",
    "Split",
    "accuracy",
    "anchor",
    "averaging",
    "chosen_rates",
    "chosen_runs",
    "fine_tune",
    "grids",
    "hft",
    "lora",
    "mofo",
    "page",
    "picture",
    "read_records",
    "run_study",
    "sample_weights",
    "studies",
    "train",
    "weight_averaging",
]
