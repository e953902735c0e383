import pytest
import torch
from torch import nn

from flowdata.models.hooks import last_call, replaced_input


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Softmax(1))


def has_hooks(model):
    return any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_the_last_call_of_several_layers_is_recorded():
    model, inputs = layers(), torch.randn(5, 3)
    with last_call([model[0], model[2]]) as calls:
        assert calls == []
        model(inputs)
    (call,) = calls
    assert torch.equal(call.input, model[:2](inputs))
    assert torch.equal(call.output, model[:3](inputs))
    assert not has_hooks(model)


def test_without_layers_nothing_is_recorded():
    with last_call([]) as calls:
        layers()(torch.randn(5, 3))
    assert calls == []


def test_a_layers_input_is_replaced_and_the_original_recorded():
    model, inputs = layers(), torch.randn(5, 3)
    hidden = model[:2](inputs)
    with (
        replaced_input(model[2], lambda values: values[:1]) as originals,
        last_call(model) as calls,
    ):
        output = model(inputs)
    assert torch.equal(originals[0], hidden)
    torch.testing.assert_close(output, model[2:](hidden[:1]))
    assert torch.equal(calls[0].output, output)
    assert not has_hooks(model)


def test_every_original_is_recorded_in_order():
    layer, inputs = nn.Linear(3, 3), torch.randn(2, 4, 3)
    with replaced_input(layer, torch.zeros_like) as originals:
        assert torch.equal(layer(inputs[0]), layer(inputs[1]))
    assert torch.equal(torch.stack(originals), inputs)


@pytest.mark.parametrize(
    "hooks", [lambda layer: last_call([layer]), lambda layer: replaced_input(layer, torch.exp)]
)
def test_hooks_are_removed_when_the_block_fails(hooks):
    layer = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="boom"), hooks(layer):
        raise RuntimeError("boom")
    assert not has_hooks(layer)
