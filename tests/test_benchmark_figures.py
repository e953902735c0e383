"""What benchmarks/README.md says of speed, memory and correctness is what the results files hold.

A section's function yields fragments of its text and the figures of the results files that stand in
them, rounded as the fragment rounds them; … stands for any words between. A section must have every
fragment, and no other figure: each is a result, which a command has written, or one of `SIZES`.

`PAGES` says which function holds which section of which page. The section of another page is one
entry more there.
"""

import re

import numpy as np
import pytest

from tests.result_pages import BENCHMARKS, RESULTS, check_section, run, runs, tables, text

# What the benchmarks set: sizes of models and samples, and a goal.
SIZES = (
    "model of 12 layers",
    "AMD EPYC without AMX, 1,024 samples, five",
    "1,024 samples, five repeats",
    "two of eight",
    "weights in 8 bits",
    "18 samples of 16,384 tokens",
    "With 192 samples",
    "a second, of 1,024;",
    "of 256 each",
    "0.5 s was the goal",
    "slices of 1,024 tokens",
    "with 64 samples",
    "s with 1,024, later",
    "Of its 20 forwards of whole samples 2 are",
    "Llama of 1.2 billion random parameters, 1,024 samples",
    "The goal of 60 %",
    "trace, of 400 samples",
    "at 0.1 to 70 billion parameters",
)

LOOPS = USUAL, SORTED, OURS = "usual loop", "sorted, logits of targets only", "flowdata"
EAGER, COMPILED = "flowdata, eager", "flowdata, compiled"
CUT, FULL = "cut-cross-entropy", "full logits, float32 cross-entropy"
SAMPLERS = {
    "FlowSampler systematic": "`FlowSampler`",
    "WeightedRandomSampler": "`WeightedRandomSampler`",
    "numpy Generator.choice": "NumPy's `Generator.choice`",
}
# Files and, where a file has several runs, parts of the run's command or processor that tell it.
XEON, AMD = "Xeon", "AMD"
GSM8K, GSM8K_1024, GSM8K_512, PROFILE = [
    ("scoring", f"gsm8k --samples {mark}", XEON)
    for mark in ("192 --repeats 3", "1024 --repeats 5", "512 --repeats 3", "256 --profile")
]
CASES, IMAGES = [("scoring", mark) for mark in ("template answers", "resnet-50")]
ON_AMD, ON_AMD_SHORTER, ON_AMD_PROFILE = [
    ("scoring", f"gsm8k --samples {mark}", AMD)
    for mark in ("1024 --repeats 5", "1024 --repeats 3", "256 --profile")
]
LONG_4K, LONG_16K, OTHERS = [
    ("scoring", f"--cases {case}") for case in ("long-4k", "long-16k", "experts")
]
ELSEWHERE = ON_AMD, ON_AMD_SHORTER, ON_AMD_PROFILE, LONG_4K, LONG_16K, OTHERS
GPU_1, GPU_2, GPU_3 = [("gpu", f"gpu {mark}") for mark in ("--minutes 3", "--minutes 4", "--parts")]
DRIFT_OF_TEXT, DRIFT_OF_IMAGES = [("drift", mark) for mark in ("language", "resnet-20")]
HEAD, SCALE, SAMPLER, BUSY, ROWS = [
    (name,) for name in ("head", "scale", "sampler", "busy", "many_rows")
]
ATTENTION, PASSES, START_UP = [(name, AMD) for name in ("attention", "passes", "start_up")]
ATTENTION_WITH_AMX, PASSES_WITH_AMX, START_UP_WITH_AMX = [
    (name, XEON) for name in ("attention", "passes", "start_up")
]
MOST = "10,000,000"
GPU_CASE = "llama-1b, 128k, 50% completions: {}"
GPU_HEAD = "{}, 8192 x 2048 x 128256"


def figures(place, form, *whats, field="median"):
    """A field of those rows of a run that the form names with each of `whats`."""
    rows = {row["what"]: row for row in run(*place)["rows"]}
    return [rows[form.format(what)][field] for what in whats]


def ratio(place, form, *two):
    above, below = figures(place, form, *two)
    return above / below


def span(values):
    return [min(values), max(values)]


def kind(processor):
    """A processor as the page names it."""
    maker = re.search("Intel.*Xeon|AMD EPYC", processor)[0].replace("(R)", "")
    return f"{maker} {'with' if 'amx' in processor else 'without'} AMX"


def machine(*names, but=()):
    """The one machine of all runs of some files, but those named by `but`, as the page names it."""
    others = [run(*place) for place in but]
    (place,) = {
        (each["machine"]["cores"], kind(each["machine"]["processor"]))
        for name in names
        for each in runs(name)
        if each not in others
    }
    return "{} of an {}".format({1: "one core", 2: "two cores"}[place[0]], place[1])


def machines():
    yield (
        "medians on {}, where no other machine is named",
        [machine(*("scoring", "head", "scale", "training", "sampler"), but=ELSEWHERE)],
    )


def scoring():
    gsm8k = run(*GSM8K)["rows"]
    ours, others = (
        [
            row["memory_mib"]
            for row in gsm8k
            if ("flowdata" in row["what"]) == is_ours and row["dtype"] == "bfloat16"
        ]
        for is_ours in (True, False)
    )
    yield (
        "padded loop scores {:,.0f} tokens/s, lm-eval's {:,.0f}, … sorted … only {:,.0f}, flowdata "
        "{:,.0f}, and {:,.0f} with compiled layers, in {:.0%} of the others' memory",
        [
            *figures(GSM8K, "gsm8k: {}", USUAL, "lm-eval", SORTED, OURS, COMPILED),
            max(ours) / min(others),
        ],
    )
    sizes = figures(GSM8K_1024, "gsm8k: {}", SORTED, OURS, COMPILED)
    yield (
        "the sorted loop scores {:,.0f}, flowdata {:,.0f}, and {:,.0f} with compiled layers: "
        "{:.2f} times the sorted loop, {:.0%} of what the machine's matrix products allow; 65 % "
        "was the goal. The errors are {:.1e} and {:.1e}",
        [
            *sizes,
            sizes[2] / sizes[0],
            *figures(GSM8K_1024, "gsm8k: {}", COMPILED, field="share_of_steady_matmul"),
            *figures(GSM8K_1024, "gsm8k: {}", COMPILED, SORTED, field="largest_error"),
        ],
    )
    rates, shares = (
        [figures(place, "gsm8k: {}", COMPILED, field=field)[0] for place in (GSM8K_1024, GSM8K_512)]
        for field in ("matmul_tflops", "share_of_matmul")
    )
    yield (
        "the best of ten products between rounds had {:.2f} TFLOPS in this run and {:.2f} in one "
        "of 512 samples, by which the shares are {:.0%} and {:.0%}",
        [*rates, *shares],
    )
    yield (
        "one template, … {:,.0f} tokens/s, the sorted one {:,.0f}, flowdata {:,.0f}",
        figures(CASES, "template: {}", *LOOPS),
    )
    yield (
        "four answers … sorted one {:,.0f} and flowdata {:,.0f}",
        figures(CASES, "answers: {}", SORTED, OURS),
    )
    yield (
        "at a width of 2,048 the three score {:,.0f}, {:,.0f} and {:,.0f} ({:.0%})",
        figures(CASES, "wide-32k: {}", *LOOPS)
        + figures(CASES, "wide-32k: {}", OURS, field="share_of_steady_matmul"),
    )
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    yield (
        "{:.0%} into the products, {:.0%} into the attention kernel",
        figures(PROFILE, "gsm8k: aten::{}", "mm", attention),
    )
    for model, name in (("resnet-20", "ResNet-20"), ("resnet-50", "ResNet-50"), ("vit", "ViT")):
        yield (
            f"{name} {{:,.0f}} and {{:,.0f}}",
            figures(IMAGES, model + ": {}", "plain loop, autocast", "flowdata, bfloat16"),
        )


def scoring_without_amx():
    rows = figures(ON_AMD, "gsm8k: {}", SORTED, OURS, COMPILED)
    errors = figures(ON_AMD, "gsm8k: {}", COMPILED, SORTED, field="largest_error")
    of_loop, *of_ours = figures(ON_AMD, "gsm8k: {}", SORTED, OURS, COMPILED, field="memory_mib")
    yield (
        "sorted loop scores {:,.0f} tokens/s, flowdata {:,.0f}, and {:,.0f} with compiled layers "
        "({:.0%} of what the best of ten products between rounds allow, {:.2f} times the sorted "
        "loop; errors of {:.1e} and {:.1e}), in {:.0f} to {:.0f} % of its memory. "
        "A run of three repeats had {:.0%} and {:.2f} times. 70 % was the goal,",
        [
            *rows,
            *figures(ON_AMD, "gsm8k: {}", COMPILED, field="share_of_matmul"),
            rows[2] / rows[0],
            *errors,
            *span(100 * np.divide(of_ours, of_loop)),
            *figures(ON_AMD_SHORTER, "gsm8k: {}", COMPILED, field="share_of_matmul"),
            ratio(ON_AMD_SHORTER, "gsm8k: {}", COMPILED, SORTED),
        ],
    )
    yield (
        "so that this one has {:.0%} and {:.2f} times as it is called",
        [*figures(ON_AMD, "gsm8k: {}", OURS, field="share_of_matmul"), rows[1] / rows[0]],
    )
    (spread,) = figures(ON_AMD, "gsm8k: {}", COMPILED, field="spread")
    (share,) = figures(ON_AMD, "gsm8k: {}", COMPILED, field="share_of_matmul")
    yield (
        "the repeats lie from {:.0f} to {:.0f} %",
        [100 * share * speed / rows[2] for speed in spread],
    )
    yield (
        "{:.0%} of the time goes into the products with weights, {:.0%} into those of attention, "
        "{:.0%} into the head's exponentials",
        figures(ON_AMD_PROFILE, "gsm8k: aten::{}", "mm", "bmm", "exp_"),
    )
    sizes = "96 tokens x 42", "176 tokens x 23", "320 tokens x 12"
    by_products = figures(ATTENTION, "{}: products", *sizes, field="kernel_by_this")
    longer = "1024 tokens x 4", "4096 tokens x 1"
    at_1k, at_4k = figures(ATTENTION, "{}: products", *longer, field="kernel_by_this")
    assert round(min(by_products), 1) == round(max(by_products), 1)
    assert round(at_4k, 1) == 1
    yield (
        "takes {:.1f} times as long at 96 to 320 tokens, {:.1f} times at 1,024, and as long at "
        "4,096",
        [min(by_products), at_1k],
    )


def passes():
    def share(part, way):
        return ratio(PASSES, part + ": {}", way, "as written")

    parts = "norms", "rotations", "swiglu", "exponentials"
    yield (
        "a norm takes {:.2f} of its time as transformers writes it, a rotation {:.2f}, SwiGLU "
        "{:.2f} … and the head's exponentials {:.2f}",
        [share(part, "compiled") for part in parts],
    )
    yield (
        "PyTorch's own norm takes {:.2f} of the time, and the feed-forward module … caches, {:.2f}",
        [share("norms", "in fewer passes"), share("feed_forward", "slices of 1024")],
    )
    yield (
        "q, k and v as one product take {:.2f} of their time alone, gate and up {:.2f}",
        [
            ratio(ATTENTION, what + ", {}", "joined", "alone")
            for what in ("q, k and v", "gate and up")
        ],
    )
    sizes = "16 tokens x 256", "32 tokens x 128", "96 tokens x 42", "176 tokens x 23"
    forms = [f"{size}: {{}}" for size in sizes]
    ways = "products, rounded scores", "products"
    *few, at_176 = (ratio(ATTENTION, form, *ways) for form in forms)
    errors = [np.divide(*figures(ATTENTION, form, *ways, field="error")) for form in forms]
    yield (
        "takes {:.1f} to {:.1f} of the time of that in float32 up to 96 tokens and {:.1f} times at "
        "176, with {:.0f} to {:.0f} times the error",
        [*span(few), at_176, *span(errors)],
    )
    yield (
        "SwiGLU in place takes {:.2f}, rotations without copies {:.2f} and exponentials in "
        "bfloat16 {:.2f}",
        [
            *(share(part, "in fewer passes") for part in ("swiglu", "rotations")),
            share("exponentials", "in bfloat16"),
        ],
    )


def passes_with_amx():
    def share(part, way):
        return ratio(PASSES_WITH_AMX, part + ": {}", way, "as written")

    yield (
        "compiled norms take {:.2f}, rotations {:.2f}, SwiGLU {:.2f} and exponentials {:.2f}, the "
        "slices {:.2f}; q, k and v as one product {:.2f}, gate and up {:.2f}",
        [
            *(share(p, "compiled") for p in ("norms", "rotations", "swiglu", "exponentials")),
            share("feed_forward", "slices of 1024"),
            *(
                ratio(ATTENTION_WITH_AMX, what + ", {}", "joined", "alone")
                for what in ("q, k and v", "gate and up")
            ),
        ],
    )
    sizes = "96 tokens x 42", "1024 tokens x 4"
    by_products = figures(ATTENTION_WITH_AMX, "{}: products", *sizes, field="kernel_by_this")
    yield (
        "takes {:.1f} times as long at 96 tokens, {:.1f} times at 1,024.",
        [1 / ratio for ratio in by_products],
    )


def start_up():
    form, counts = "{} samples: before the first pack", ("64", "1024")
    first, again, shares = (
        figures(START_UP, form, *counts, field=field)
        for field in ("median", "again", "share_of_check")
    )
    assert round(min(shares), 2) == round(max(shares), 2)
    yield (
        "takes {:.2f} s before its first pack with 64 samples and {:.2f} s with 1,024, its second "
        "{:.2f} and {:.2f} s;",
        [*first, *again],
    )
    yield "the check of a few samples alone takes {:.0%} of that", [min(shares)]
    with_amx = [
        value
        for field in ("median", "again")
        for value in figures(START_UP_WITH_AMX, form, *counts, field=field)
    ]
    yield "the first takes {:.2f} and {:.2f} s, the second {:.2f} and {:.2f} s", with_amx


def other_models():
    yield (
        "experts, two of eight, score {:,.0f} tokens/s … {:,.0f} by flowdata",
        figures(OTHERS, "experts: {}", SORTED, OURS),
    )
    yield "(torchao) {:,.0f} and {:,.0f}", figures(OTHERS, "8-bit: {}", SORTED, OURS)
    yield (
        "samples of 4,096 tokens, once, by 4 layers {:,.0f} and {:,.0f}, with {:,.0f} and {:,.0f} "
        "MiB.",
        [
            *figures(LONG_4K, "long-4k: {}", SORTED, OURS),
            *figures(LONG_4K, "long-4k: {}", SORTED, OURS, field="memory_mib"),
        ],
    )
    yield (
        "once, by 2 layers the sorted loop scores {:,.0f} tokens/s and flowdata {:,.0f}, with "
        "{:,.0f} and {:,.0f} MiB.",
        [
            *figures(LONG_16K, "long-16k: {}", SORTED, OURS),
            *figures(LONG_16K, "long-16k: {}", SORTED, OURS, field="memory_mib"),
        ],
    )


def head():
    def spread(width, *ways, field="ratio_to_floor"):
        rows = [
            row
            for row in run(*HEAD)["rows"]
            if row["what"].rpartition(", ")[0] in ways and f" x {width}" in row["what"]
        ]
        return span([row[field] for row in rows])

    sizes = {int(row["what"].split(" x ")[2]) // 1000 for row in run(*HEAD)["rows"]}
    yield "at vocabularies from {}k to {}k:", span(sizes)
    yield (
        "at a width of 2,048 … {:.1f} to {:.1f} times as long; at 576, {:.1f} to {:.1f} compiled "
        "and {:.1f} to {:.1f} not",
        [*spread(2048, EAGER, COMPILED), *spread(576, COMPILED), *spread(576, EAGER)],
    )
    yield (
        "Cut-cross-entropy's … {:.1f} to {:.1f} and {:.1f} to {:.1f}, full logits {:.1f} to {:.1f} "
        "and {:.1f} to {:.1f},",
        [ratio for way in (CUT, FULL) for width in (2048, 576) for ratio in spread(width, way)],
    )
    errors = [
        spread("", *ways, field="largest_error")[1] for ways in ((CUT, FULL), (EAGER, COMPILED))
    ]
    yield (
        "errors of {:.0e} (flowdata {:.0e}) and {:,.0f} to {:,.0f} MiB of memory",
        [*errors, *spread("", CUT, FULL, field="memory_mib")],
    )


def busy():
    alone, beside = (f"ratio, beside {count} others" for count in (0, 2))
    yield (
        "{}: without other processes scoring is {:.1f} times as fast … {:.1f} times, and {:.1f} in "
        "the worst",
        [
            machine("busy"),
            *figures(BUSY, "{}", alone, beside),
            *figures(BUSY, "{}", beside, field="worst"),
        ],
    )
    yield (
        "{:.1f} times as fast with the time of one CPU and {:.1f} with that of one and a half",
        figures(BUSY, "ratio, with {} CPUs", "1", "1.5"),
    )


def many_rows():
    yield (
        "{}, beside other work: {:.0f} µs of CPU a row, {:.1f} minutes in all",
        [
            machine("many_rows"),
            *figures(ROWS, "its CPU time, {} rows", MOST, field="us_each"),
            *(seconds / 60 for seconds in figures(ROWS, "scoring {} rows", MOST)),
        ],
    )
    yield (
        "{:.0f} MiB of memory, {:.0f} bytes for each row … {:,.0f} MiB with",
        [
            *figures(ROWS, "its memory, {} rows", MOST),
            *figures(ROWS, "memory that grows with the rows", ""),
            *figures(ROWS, "its memory, {} rows", MOST, field="with_mapped_files"),
        ],
    )
    yield (
        "a store of {:.0f} bytes a row, read and weighed in {:.1f} s",
        [*figures(ROWS, "store, {} rows", MOST), *figures(ROWS, "load and weights, {} rows", MOST)],
    )


def processes():
    yield (
        "two of one thread … {:.1f} times as fast",
        [ratio(SCALE, "{} processes of one thread", 2, 1)],
    )
    yield (
        "a claim of a pack costs {:.0f} µs ({:.0f} µs with",
        figures(SCALE, "claim of a pack, {} DataLoader workers", "without", "with"),
    )
    yield (
        "losses safely {:.1f} % of the time of scoring",
        figures(SCALE, "{}", "keeping losses safely, of scoring"),
    )
    yield "{:.0f} bytes a sample", figures(SCALE, "{}", "store, 10,000,000 samples")


def training():
    yield (
        "{:.2f} (plain loop), {:.2f} (Trainer), {:.2f} (SFTTrainer) and {:.2f} (Lightning) of",
        [
            ratio(("training", f"--routes {route}"), route + ": {}", "weighted", "plain")
            for route in ("loop", "trainer", "sft", "lightning")
        ],
    )
    yield (
        "at a vocabulary of 128k, … by hand: {:.0%} of the memory, {:.2f} of the time; against "
        "`causal_lm_loss`, {:.0%} and {:.2f}",
        [
            ratio(("training", "131072"), f"131072: {{}} {quantity}", "fused", way)
            for way in ("by hand", "full")
            for quantity in ("memory", "time")
        ],
    )


def drift():
    whats = "drift at one evaluation in 100 steps", "measurement", "step"
    yield (
        "{:.1f} % of the training of a SmolLM2-shaped model ({:.1f} s beside steps of {:.1f} s)",
        figures(DRIFT_OF_TEXT, "language model: {}", *whats),
    )
    yield (
        "{:.1f} % of that of ResNet-20 ({:.3f} s beside {:.3f} s; {})",
        [
            *figures(DRIFT_OF_IMAGES, "resnet-20: {}", *whats),
            machine("drift"),
        ],
    )


def loading():
    def spread(what, *samples, unit="µs/batch"):
        names = {f"{sample}, 0 workers: {what} adds" for sample in samples}
        rows = [row for run in runs("loader") for row in run["rows"] if row["unit"] == unit]
        rows = [row for row in rows if row["what"] in names]
        if what == "FlowSampler":
            assert all(row["spread"][0] < 0 < row["spread"][1] for row in rows)
        batch = 1 if "%" in unit else rows[0]["batch"]
        return span([row["median"] / batch for row in rows])

    samples = row, tokenised, image = "tensor row", "text row", "image"
    yield (
        "in two runs on {}: `FlowSampler` adds {:.1f} % to a DataLoader at most",
        [machine("loader"), spread("FlowSampler", *samples, unit="% of bare")[1]],
    )
    yield (
        "`FlowWeightedDataset` adds {:.0f} to {:.0f} µs a sample, which is {:.0f} to {:.0f} % of a "
        "tokenised row or",
        spread("FlowWeightedDataset", *samples)
        + spread("FlowWeightedDataset", tokenised, image, unit="% of bare"),
    )
    yield (
        "by hand adds {:.0f} to {:.0f} µs to a tensor's row or an image, and {:.0f} to {:.0f} µs",
        spread("a weight by hand", row, image) + spread("a weight by hand", tokenised),
    )


def probe():
    page = text(RESULTS / "probe.md")
    names, *rows = tables(RESULTS / "probe.md")[0]
    sets = [dict(zip(names, row, strict=True)) for row in rows]
    worse = max(float(row["scikit-learn"]) - float(row["flowdata"]) for row in sets)
    losses = [(row["log-loss, flowdata"], row["log-loss, scikit-learn"]) for row in sets]
    classes = [pair for pair in losses if all(pair)]
    assert all(float(ours) < float(theirs) for ours, theirs in classes)
    bound = re.search(r"The bound is (\S+ points and \S+ nats); it holds", page)[1]
    yield (
        "on none of the {} sets is the probe worse by more than {:.2f} points, … on all {} sets of "
        "classes ({}). The bound is {}",
        [len(sets), worse, len(classes), kind(re.search("AMD[^,]*", page)[0]), bound],
    )


def gpu():
    (name, version), *others = [
        (run["machine"]["gpu"], run["machine"]["versions"]["torch"]) for run in runs("gpu")
    ]
    assert others == [(name, version)] * 2
    limits = [re.search(r"--minutes (\S+)", run["command"])[1] for run in runs("gpu")]
    yield (
        "three times on an {} (torch {}), with limits of {}, {} and {} minutes",
        [name, version.removesuffix(".0"), *limits],
    )
    (count,) = [row for row in run(*GPU_3)["rows"] if "passed" in row]
    assert count["what"] == "test_gpu.py"
    cut = {row["part"] for row in run(*GPU_3)["rows"] if row.get("error") == "stopped at its limit"}
    assert cut == {"scoring", "checks"}  # so the other loops and the Triton kernels' tests lack
    yield (
        "the third run, which has grown since: {} passed, {} failed",
        [count["passed"], count["failed"]],
    )
    after, before = (ratio(place, "loop: {}", "weighted", "plain") for place in (GPU_3, GPU_2))
    yield "takes {:.2f} of the unweighted one's time. It took {:.2f} until", [after, before]


def gpu_scoring():
    case = GPU_3, GPU_CASE, OURS, COMPILED
    (eager, compiled), shares = figures(*case), figures(*case, field="share_of_matmul")
    (rate, _), first_runs = (
        figures(*case, field=name) for name in ("matmul_tflops", "first_run_s")
    )
    yield (
        "{:.0f} thousand tokens/s, {:.0%} of the matrix products' rate ({:.0f} TFLOP/s); {:.0f} "
        "thousand with compiled layers ({:.0%}), whose compiling took {:.1f} s",
        [eager / 1e3, shares[0], rate, compiled / 1e3, shares[1], first_runs[1] - first_runs[0]],
    )
    kinds = "matrix products", "norms, activations and the like", "copies", "head", "attention"
    trace = figures(GPU_2, GPU_CASE, *kinds)
    (busy,) = figures(GPU_2, GPU_CASE, "busy")
    yield (
        "busy {:.0%} are products, {:.0%} norms, rotations and activations, {:.0%} copies, {:.0%} "
        "the head, {:.0%} attention, and it idles for {:.0%} of the time",
        [*trace, 1 - busy],
    )
    limits = [cells for cells in tables(RESULTS / "roofline.md")[1] if cells[1] == "H200"]
    shares_of = {cells[0]: cells[2:] for cells in limits}
    plain, fused, host = shares_of["1B"]
    small = [shares_of[size][-1] for size in ("0.5B", "0.1B")]
    assert all(int(shares_of[size][-1].strip("%")) < int(host.strip("%")) for size in ("8B", "70B"))
    yield (
        "At 1B an H200 leaves {} of the products' rate to layers as they are written, and {} to "
        "fused ones; {:.0f} and {:.0%} were measured",
        [plain, fused, 100 * shares[0], shares[1]],
    )
    yield (
        "the {:.0%} of the time in which the GPU idled, … and the {:.0%} of its work that were "
        "copies. Launches take the host {} of the chip's time at 1B and less above, {} at 0.5B and "
        "{} at 0.1B:",
        [1 - busy, trace[2], host, *small],
    )


def gpu_losses():
    whats = "the matrix product alone", "flowdata, Triton", "Liger", CUT, FULL
    _, *times = figures(GPU_2, GPU_HEAD, *whats, field="ratio_to_floor")
    ours, *errors = figures(GPU_2, GPU_HEAD, *whats[1:], field="largest_error")
    (memory,) = figures(GPU_2, GPU_HEAD, FULL, field="memory_mib")
    yield (
        "8,192 rows, a width of 2,048, 128k classes, … ({:.1f} ms): the Triton kernel {:.2f}, "
        "Liger {:.2f}, cut-cross-entropy {:.2f}, full logits {:.2f} with {:.0f} GiB; errors "
        "{:.0e} against {:.0e} to {:.0e}",
        [
            *figures(GPU_2, GPU_HEAD, whats[0]),
            *[*times, memory / 1024, ours, *span(errors)],
        ],
    )
    tiles = re.search(r"tiles of (\d+ x \d+)", run(*GPU_1)["machine"]["commit"])[1]
    yield (
        "first draft, with tiles of {} … took {:.2f}",
        [
            tiles.replace("x", "×"),
            *figures(GPU_1, GPU_HEAD, "flowdata, Triton", field="ratio_to_floor"),
        ],
    )
    ways = "fused", "full", "by hand", "Liger, without weights"
    milliseconds = [1e3 * time for time in figures(GPU_3, "32000: {} time", *ways)]
    mebibytes = figures(GPU_3, "32000: {} memory", *ways)
    yield (
        "8,192 tokens, a width of 2,048, 32k classes, … {:.1f} ms and {:,.0f} MiB; full logits by "
        "`causal_lm_loss` {:.1f} ms and {:,.0f} MiB, by hand {:.0f} ms and {:,.0f} MiB; Liger's, … "
        "{:.1f} ms and {:,.0f} MiB",
        [figure for pair in zip(milliseconds, mebibytes, strict=True) for figure in pair],
    )


def sampler():
    whats = "set-up", "first index", "indices, set-up included", "memory over the weights"
    for size, size_name in ((10**6, "10^6 "), (2**24, "2^24 "), (10**8, "10^8 ")):
        for sampler_name, name in SAMPLERS.items():
            form = f"{sampler_name}, {size}: {{}}"
            line = f"| {size_name if name == '`FlowSampler`' else ''}| {name} |"
            ready, first, speed, memory = figures(SAMPLER, form, *whats)
            if ready is None:
                (why,) = figures(SAMPLER, form, "set-up", field="why")
                yield line + " fails above {} | | |", [why.split()[-1]]
            else:
                yield (
                    line + " {:.3g} s | {:.1f} million/s | {:,.0f} MiB |",
                    [ready + first, speed / 1e6, memory],
                )


def sweep():
    by_kind, *kinds = tables(RESULTS / "sweep.md")
    rows = [row for rows_of_kind in kinds for row in rows_of_kind[1:]]
    right = sum(a.startswith("right") and b.startswith("right") for _, a, b in rows)
    refused = sum(a.startswith("right") and b.startswith("refused") for _, a, b in rows)
    missing = [first for _, first, _ in rows if first.startswith("not buildable")]
    assert right + refused + len(missing) == len(rows)
    yield (
        "Of {} architectures none is wrong without a word: {} are right in both dtypes, {} are "
        "refused in bfloat16 alone … of {} no tiny model",
        [len(rows), right, refused, len(missing)],
    )
    with_images = next(row[-1] for row in by_kind if row[0] == "image_text_to_text")
    layouts = sum("no layout of samples" in first for first in missing)
    yield "{} of these are models of images and text, for {} of which", [with_images, layouts]


PAGE = BENCHMARKS / "README.md"
PAGES = {
    (PAGE, "What was measured"): [machines],
    (PAGE, "Scoring, training, loading"): [
        scoring,
        scoring_without_amx,
        passes,
        passes_with_amx,
        start_up,
        other_models,
        head,
        busy,
        many_rows,
        processes,
        training,
        drift,
        loading,
    ],
    (PAGE, "The linear probe"): [probe],
    (PAGE, "On a GPU"): [gpu, gpu_scoring, gpu_losses],
    (PAGE, "The sampler at scale"): [sampler],
    (PAGE, "Every architecture against the truth"): [sweep],
}


@pytest.mark.parametrize(("page", "title"), PAGES, ids=[title for _, title in PAGES])
def test_every_figure_of_a_section_is_one_of_the_results(page, title):
    fragments = [pair for function in PAGES[page, title] for pair in function()]
    check_section(page, title, fragments, SIZES)
