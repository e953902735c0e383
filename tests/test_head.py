from importlib.util import find_spec
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from flowdata.head.output_layer import Head, kernels, read_head
from flowdata.head.tiled import target_values
from flowdata.targets.columns import COLUMNS
from tests import reference
from tests.interpreted import check_in_interpreter


class Config:
    logit_scale = 0.5
    logits_scaling = 4.0
    final_logit_softcapping = 30.0


@pytest.mark.parametrize("vocabulary", [7, 2048, 5000])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(0, 1.0, None), (1, 0.3, 5.0)])
def test_losses_equal_full_logits_in_float64(vocabulary, bias, scale, softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(1500, 24), torch.randn(vocabulary, 24)
    targets = torch.randint(0, vocabulary, (1500,))
    offset = torch.randn(vocabulary) if bias else None
    losses, _ = target_values(hidden, Head(weight, offset, scale, softcap), targets)
    expected = reference.head_losses(hidden, weight, targets, offset, scale, softcap)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_no_worse_than_bfloat16_logits():
    torch.manual_seed(0)
    hidden = torch.randn(512, 64).bfloat16()
    weight = (torch.randn(4096, 64) * 0.2).bfloat16()
    targets = torch.randint(0, 4096, (512,))
    exact = reference.head_losses(hidden, weight, targets)
    plain = nn.functional.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")
    losses, _ = target_values(hidden, Head(weight), targets)
    assert (losses - exact).abs().mean() < 0.5 * (plain - exact).abs().mean()
    assert (losses - exact).abs().max() < (plain - exact).abs().max() + 1e-3


def test_losses_are_never_negative():
    hidden, weight = torch.full((1, 4), 30.0), torch.eye(4) * 30
    hidden[0, 1:] = -30
    losses, _ = target_values(hidden, Head(weight), torch.tensor([0]))
    assert losses.item() == 0


def test_huge_losses_do_not_overflow():
    hidden, weight = torch.tensor([[30.0, 0.0], [1.0, 0.0]]), torch.tensor([[30.0, 0], [-30, 0]])
    losses, _ = target_values(hidden, Head(weight), torch.tensor([1, 0]))
    expected = reference.head_losses(hidden, weight, torch.tensor([1, 0]))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-9)
    assert losses[0] == 1800


def test_no_row_gives_no_loss():
    head, targets = Head(torch.randn(9, 4)), torch.empty(0).long()
    losses, _ = target_values(torch.empty(0, 4), head, targets)
    assert losses.shape == (0,)


def test_a_plain_linear_layer_is_read_and_others_are_not():
    layer = nn.Linear(4, 9)
    head = read_head(layer, Config())
    assert (head.scale, head.softcap) == (0.125, 30.0)
    assert head.weight.data_ptr() == layer.weight.data_ptr()
    assert read_head(None, Config()) is None
    assert read_head(nn.Sequential(layer), Config()) is None
    assert read_head(nn.utils.parametrizations.weight_norm(nn.Linear(4, 9)), Config()) is None
    layer.register_forward_hook(lambda *_: None)
    assert read_head(layer, Config()) is None


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="test_head_triton.py runs on the GPU")
def test_the_triton_kernel_holds_in_its_interpreter():
    check_in_interpreter("tests/test_head_triton.py")


def test_a_gpu_tries_triton_first_where_it_is_installed(monkeypatch):
    on_gpu, on_cpu = Head(SimpleNamespace(is_cuda=True)), Head(torch.ones(2, 2))
    monkeypatch.setattr("flowdata.head.output_layer.find_spec", lambda name: name == "triton")
    assert [head.kernel for _, head in kernels(on_gpu, compiled=False)] == ["triton", "eager"]
    assert [head.kernel for _, head in kernels(on_cpu, compiled=False)] == ["eager"]
    assert [head.kernel for _, head in kernels(on_cpu, compiled=True)] == ["compiled", "eager"]
    monkeypatch.setattr("flowdata.head.output_layer.find_spec", lambda name: None)
    assert [head.kernel for _, head in kernels(on_gpu, compiled=False)] == ["eager"]


def test_a_negative_scale_is_left_to_the_model():
    class Negative:
        logit_scale = -1.0

    assert read_head(nn.Linear(4, 9), Negative()) is None


def peak_bytes(run):
    """The most memory that a call holds at once, from the allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_the_vocabulary(dtype):
    torch.manual_seed(0)
    hidden, targets = torch.randn(1024, 16).to(dtype), torch.randint(0, 4096, (1024,))
    peaks = {}
    for vocabulary in (4096, 65536):
        head = Head(torch.randn(vocabulary, 16).to(dtype))
        peaks[vocabulary] = peak_bytes(
            lambda head=head: target_values(hidden, head, targets, COLUMNS)
        )
        logits = peak_bytes(lambda head=head: (hidden @ head.weight.T).float())
        assert logits >= 4 * 1024 * vocabulary  # the measure sees what it should
    assert peaks[65536] <= 1.01 * peaks[4096]
    assert peaks[65536] < 0.3 * logits


def test_the_compiled_kernel_gives_what_the_eager_one_gives():
    torch.manual_seed(0)
    hidden, weight = torch.randn(70, 24).bfloat16(), torch.randn(5000, 24).bfloat16()
    targets, bias = torch.randint(0, 5000, (70,)), torch.randn(5000).bfloat16()
    eager, compiled = (Head(weight, bias, 0.5, 5.0, kernel) for kernel in ("eager", "compiled"))
    losses, columns = target_values(hidden, eager, targets, COLUMNS)
    other_losses, other_columns = target_values(hidden, compiled, targets, COLUMNS)
    torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other_columns, columns, rtol=1e-4, atol=1e-5)
