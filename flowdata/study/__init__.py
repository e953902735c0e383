"""What would my model forget? Methods × rates × seeds on your own model and data.

    import copy
    from pathlib import Path
    from flowdata import study

    def run(name, rate, seed):                                    # fine-tune once, and measure
        method, model = study.METHODS[name], copy.deepcopy(pretrained)
        weights = study.sample_weights(method, scores)            # scores: LossScorer(...).score
        study.fine_tune(model, train, weights, method, rate=rate, seed=seed, epochs=5, batch=32)
        return {
            "validation": study.accuracy(model, validation),      # the rate is chosen by it
            "target": {"accuracy": study.accuracy(model, test)},
            "retained": {"old accuracy": study.accuracy(model, old_test)},
            "drift": {"new task": meter(model).to_dict()},        # meter: DriftMeter(pretrained, …)
        }

    methods = study.grids(["standard", "FLOW", "l2"], [0.01, 0.03, 0.1])
    options = {"study": "mine", "target": "new images"}           # what else a run depends on
    file = Path("runs/mine.jsonl")
    records = study.run_study(file, options, run, methods=methods, seeds=range(3))
    print(study.report(options, records))                         # a Markdown page
    file.with_suffix(".png").write_bytes(study.draw_picture(records))

`run_study` appends each finished run to the file, so a study that was stopped goes on where it was.
`HeadTask` brings the whole `run` for a task that gets a head of its own, and a `Method` of your own
works beside those of `METHODS`. examples/measure_forgetting.py is a complete script. Pages need
scipy, pictures matplotlib, and LoRA peft: ``pip install "flowdata-torch[study]"``.

- methods.py names the methods; parts.py has what they do beside weighing samples.
- training.py is the loop of all methods, classify.py fine-tunes a classifier with it, and hits.py
  counts its right answers.
- recipe.py and head_task.py are for a task with a head of its own.
- runs.py runs a study and chooses the learning rates, and records.py keeps the results file;
  choices.py chooses among all runs, also by their drift; equal_learning.py compares methods where
  they learned as much; table.py and picture.py show it.
"""

from flowdata.study.choices import choices
from flowdata.study.classify import fine_tune, sample_weights
from flowdata.study.equal_learning import (
    Items,
    Kept,
    items_of,
    kept_at_equal_learning,
    runs_with_items,
)
from flowdata.study.head_task import HeadTask, Outcome, Sizes, Split
from flowdata.study.hits import accuracy, hits, packed, unpacked
from flowdata.study.methods import LINEAR_PROBE, METHODS, STANDARD, TEMPERATURES, grids
from flowdata.study.parts import (
    anchor,
    averaging,
    fixed_batch_norm,
    hft,
    lora,
    mofo,
    output_anchor,
    weight_averaging,
)
from flowdata.study.picture import draw_picture
from flowdata.study.recipe import Beginning, as_old_network, begin, fit_new_head
from flowdata.study.records import Record, read_records
from flowdata.study.runs import chosen_rates, chosen_runs, run_study
from flowdata.study.table import report, studies
from flowdata.study.training import Hooks, Method, Part, train

__all__ = [
    "LINEAR_PROBE",
    "METHODS",
    "STANDARD",
    "TEMPERATURES",
    "Beginning",
    "HeadTask",
    "Hooks",
    "Items",
    "Kept",
    "Method",
    "Outcome",
    "Part",
    "Record",
    "Sizes",
    "Split",
    "accuracy",
    "anchor",
    "as_old_network",
    "averaging",
    "begin",
    "choices",
    "chosen_rates",
    "chosen_runs",
    "draw_picture",
    "fine_tune",
    "fit_new_head",
    "fixed_batch_norm",
    "grids",
    "hft",
    "hits",
    "items_of",
    "kept_at_equal_learning",
    "lora",
    "mofo",
    "output_anchor",
    "packed",
    "read_records",
    "report",
    "run_study",
    "runs_with_items",
    "sample_weights",
    "studies",
    "train",
    "unpacked",
    "weight_averaging",
]
