"""The Triton kernel built for GPUs that are not here: it must fit their memory and registers.

Triton's own compilers make machine code for a chip by its number, without a device.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from flowdata.head.tally import LOWEST

triton = pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton's interpreter builds nothing", allow_module_level=True)

# Shared memory that a block can have, in KiB, by compute capability (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability").
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
REGISTERS = 65_536  # of a multiprocessor, on all of them


def build(
    shape, capability, dtype="bf16", *, is_aligned=True, columns=False, bias=False, softcap=False
):
    """The kernel as `partial_sums` would have it compiled on such a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flowdata.head.triton import _tally

    names = _tally.arg_names
    inputs = [f"*{dtype}"] * 2
    if shape.descriptors:
        inputs = [f"tensordesc<{dtype}[{n},{shape.depth}]>" for n in (shape.rows, shape.classes)]
    kinds = dict(zip(names, [*inputs, f"*{dtype}", "*i64", "*fp32"], strict=False))
    kinds |= dict.fromkeys(("n", "width", "vocabulary", "span"), "i32")
    kinds |= dict.fromkeys(("scale", "softcap"), "fp32")
    constants = {
        "HAS_BIAS": bias,
        "HAS_SOFTCAP": softcap,
        "HAS_COLUMNS": columns,
        "HAS_DESCRIPTORS": shape.descriptors,
        "LOWEST": LOWEST,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "ROWS": shape.rows,
        "CLASSES": shape.classes,
        "DEPTH": shape.depth,
    }
    aligned = {name for name, kind in kinds.items() if kind.startswith("*")} | {"span"}
    aligned |= {"width"} if is_aligned else set()
    source = ASTSource(
        _tally,
        {name: kinds.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": shape.warps, "num_stages": shape.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def assert_fits(built, capability, folder):
    """The chip has the kernel's shared memory and registers, as its own header tells them."""
    (folder / "kernel.cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    run = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    )
    registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", run.stdout).groups())
    assert built.metadata.shared <= SHARED[capability] * 1024
    assert registers * 32 * built.metadata.num_warps <= REGISTERS
    # A few values that are needed before and after the loop may wait in memory; a tile may not.
    assert spilled <= 32


@pytest.mark.parametrize("columns", [False, True], ids=["losses", "columns"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernel_fits_the_chip(capability, dtype, columns, tmp_path, monkeypatch):
    from flowdata.head import triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    shape = kernel.shape_for(kind, capability // 10, is_aligned=True, columns=columns)
    built = build(shape, capability, dtype, columns=columns, bias=True, softcap=columns)
    assert_fits(built, capability, tmp_path)
    if capability == 90 and dtype == "bf16":
        assert "wgmma.mma_async" in built.asm["ptx"]  # the matrix units of the chip, not older ones


@pytest.mark.parametrize("capability", [90, 100])
def test_the_kernel_fits_where_the_copy_engine_can_not_take_the_inputs(
    capability, tmp_path, monkeypatch
):
    from flowdata.head import triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    options = {"is_aligned": False, "columns": True}
    shape = kernel.shape_for(torch.bfloat16, capability // 10, **options)
    built = build(shape, capability, **options, bias=True, softcap=True)
    assert_fits(built, capability, tmp_path)


def test_inputs_that_the_copy_engine_cannot_take_are_loaded():
    from flowdata.head import triton as kernel

    options = {"columns": False}
    assert kernel.shape_for(torch.bfloat16, 9, is_aligned=True, **options).descriptors
    assert not kernel.shape_for(torch.bfloat16, 9, is_aligned=False, **options).descriptors
    assert not kernel.shape_for(torch.bfloat16, 12, is_aligned=True, **options).descriptors
    assert not kernel.shape_for(torch.float32, 9, is_aligned=True, **options).descriptors


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", SHARED)
def test_the_kernel_of_divergences_fits_the_chip(capability, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from flowdata.head import kl_triton as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    shape = (kernel.ROWS, kernel.CLASSES, kernel.DEPTH, kernel.WARPS, kernel.STAGES)
    rows, classes, depth, warps, stages = kernel.FLOAT32 if dtype == "fp32" else shape
    names = kernel._divergences.arg_names
    inputs = [f"*{dtype}", f"*{dtype}", f"*{dtype}", "i32", "fp32", "fp32"]
    kinds = dict(zip(names, [*inputs * 2, "*fp32", "*i64", "i32", "i32", "i32"], strict=False))
    constants = dict.fromkeys((name for name in names if name.startswith("HAS_")), True) | {
        "LOWEST": -1e30,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "ROWS": rows,
        "CLASSES": classes,
        "DEPTH": depth,
    }
    aligned = {name for name, kind in kinds.items() if kind.startswith("*")} | {
        "width_a",
        "width_b",
    }
    source = ASTSource(
        kernel._divergences,
        {name: kinds.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert_fits(built, capability, tmp_path)
