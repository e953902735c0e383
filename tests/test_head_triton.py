"""The Triton kernel against the tiled head, on a GPU or without one in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/test_head_triton.py, as test_head.py runs it.
"""

import os

import pytest
import torch

from flowdata.head.output_layer import Head
from flowdata.head.tiled import target_values
from flowdata.targets.columns import COLUMNS

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no GPU; run this file with TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
LOW = torch.float16 if INTERPRETED else torch.bfloat16  # which the interpreter can't multiply


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("case", [(False, 1.0, None), (True, 0.3, None), (True, 0.7, 5.0)])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(200, 70, 700), (3, 64, 129), (0, 8, 9)])
def test_the_kernel_gives_what_the_tiled_head_gives(rows, width, vocabulary, case, dtype):
    bias, scale, softcap = case
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, dtype=dtype, device=DEVICE)
    weight = (torch.randn(vocabulary, width, device=DEVICE) * 0.3).to(dtype)
    offset = torch.randn(vocabulary, dtype=dtype, device=DEVICE) if bias else None
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    targets[:1] = vocabulary - 1  # alone in the last range of 129 columns
    head = Head(weight, offset, scale, softcap, "triton")
    losses, columns = target_values(hidden, head, targets, COLUMNS)
    # The kernel never rounds logits, so its peer is float32.
    exact = Head(weight.float(), None if offset is None else offset.float(), scale, softcap)
    expected_losses, expected = target_values(hidden.float(), exact, targets, COLUMNS)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(target_values(hidden, head, targets)[0], losses, rtol=0, atol=0)
    for name in COLUMNS:
        torch.testing.assert_close(columns[name], expected[name], rtol=1e-4, atol=1e-4)


def test_classes_that_a_bias_rules_out_change_nothing():
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 16, device=DEVICE), torch.randn(300, 16, device=DEVICE)
    bias = torch.zeros(300, device=DEVICE).index_fill_(
        0, torch.arange(128, 300, device=DEVICE), -torch.inf
    )
    targets = torch.arange(5, device=DEVICE)
    losses, columns = target_values(hidden, Head(weight, bias, kernel="triton"), targets, COLUMNS)
    expected_losses, expected = target_values(hidden, Head(weight[:128]), targets, COLUMNS)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-4, atol=1e-4)
    for name in COLUMNS:
        torch.testing.assert_close(columns[name], expected[name], rtol=1e-4, atol=1e-4)
