"""What would my model forget? Methods × rates × seeds on a model and data of yours.

    from flowdata.study import METHODS, accuracy, draw_picture, fine_tune, report, run_study

    def run(method, rate, seed):                                  # one fine-tuning, measured
        model = copy.deepcopy(pretrained)
        weights = sample_weights(METHODS[method], scores)         # scores: LossScorer(...).score
        fine_tune(model, train, weights, METHODS[method], rate=rate, seed=seed, epochs=5, batch=32)
        return {
            "validation": accuracy(model, validation),            # the rate is chosen by it
            "target": {"accuracy": accuracy(model, test)},
            "retained": {"old accuracy": accuracy(model, old_test)},
        }

    methods = {name: [0.01, 0.03, 0.1] for name in ("standard", "FLOW", "l2")}
    options = {"study": "mine", "target": "new images"}           # all that a run depends on
    records = run_study(Path("runs/mine.jsonl"), options, run, methods=methods, seeds=range(3))
    print(report(options, records))                               # a Markdown page
    Path("runs/mine.png").write_bytes(draw_picture(options, records))

`run_study` appends each finished run to the file, so a study that was stopped goes on where it was.
`HeadTask` is the same for a task that gets a head of its own. examples/measure_forgetting.py is a
whole script. Pages need scipy, pictures matplotlib, LoRA peft: the extra `study`.
"""

from flowdata.study.classify import accuracy, fine_tune, sample_weights
from flowdata.study.head_task import HeadTask, Parts, Sizes
from flowdata.study.methods import ABLATIONS, METHODS, Hooks, Method, Part, train
from flowdata.study.picture import draw_picture
from flowdata.study.recipe import Beginning, as_old_network, begin, fit_new_head
from flowdata.study.runs import Record, run_study
from flowdata.study.table import report

__all__ = [
    "ABLATIONS",
    "METHODS",
    "Beginning",
    "HeadTask",
    "Hooks",
    "Method",
    "Part",
    "Parts",
    "Record",
    "Sizes",
    "accuracy",
    "as_old_network",
    "begin",
    "draw_picture",
    "fine_tune",
    "fit_new_head",
    "report",
    "run_study",
    "sample_weights",
    "train",
]
