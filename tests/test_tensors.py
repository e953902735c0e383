import torch

from flowdata.models.tensors import CPU, map_floating, map_tensors, to_device


def test_tensors_are_found_wherever_a_batch_keeps_them():
    from collections import namedtuple

    from transformers import BatchEncoding

    Pair = namedtuple("Pair", "a b")
    value = {"x": [torch.ones(1), "text"], "y": Pair(torch.ones(1), None)}
    moved = map_tensors(value, lambda tensor: tensor + 1)
    assert moved["x"][0].item() == 2
    assert isinstance(moved["y"], Pair)
    assert moved["y"].a.item() == 2
    assert map_tensors(BatchEncoding({"z": torch.ones(1)}), lambda t: t + 1)["z"].item() == 2


def test_containers_in_which_nothing_changes_are_kept():
    from collections import defaultdict

    value = defaultdict(list, {"x": [torch.ones(1), (torch.ones(1), "text")]})
    assert map_tensors(value, lambda tensor: tensor.float()) is value


def test_floating_tensors_alone_are_converted():
    batch = {"ids": torch.tensor([1]), "pixels": torch.ones(1)}
    halves = map_floating(batch, torch.Tensor.half)
    assert halves["ids"] is batch["ids"]
    assert halves["pixels"].dtype == torch.float16


def test_a_batch_is_moved_whole():
    batch = (torch.ones(2), {"labels": [torch.zeros(1), "text"]})
    pixels, fields = to_device(batch, torch.device("meta"))
    assert pixels.is_meta
    assert fields["labels"][0].is_meta
    assert fields["labels"][1] == "text"
    assert to_device(batch, CPU) is batch
