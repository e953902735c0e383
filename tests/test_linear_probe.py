import torch
from torch import nn
from torch.utils.data import TensorDataset

from flowdata.probe.linear_probe import linear_probe
from tests.test_fit import blobs


def quiet(head, dataset, model=None, **options):
    return linear_probe(model or nn.Identity(), head, dataset, progress=False, **options)


def test_the_result_does_not_depend_on_the_heads_first_values_nor_on_grad_mode():
    x, y = blobs()
    torch.manual_seed(1)
    first = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    torch.manual_seed(2)
    with torch.no_grad():
        second = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    assert torch.equal(first.weight, second.weight)


def test_the_head_is_filled_in_place_and_keeps_its_dtype():
    x, y = blobs()
    head = nn.Linear(3, 3, dtype=torch.bfloat16)
    weight = head.weight
    assert quiet(head, TensorDataset(x, y), strength=0.05) is head
    assert head.weight is weight
    assert (head(x.bfloat16()).argmax(1) == y).float().mean() > 0.5


def test_a_second_round_on_a_changed_body_fits_that_body():
    torch.manual_seed(0)
    x, y = blobs()
    body, head = nn.Linear(3, 3), nn.Linear(3, 3)
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    before = head(body(x)).argmax(1)
    with torch.no_grad():
        body.weight.neg_()
        body.bias.neg_()
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    assert torch.equal(head(body(x)).argmax(1), before)
