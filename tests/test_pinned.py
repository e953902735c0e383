from types import SimpleNamespace

import pytest
import torch

from flowdata.scoring import run


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_read_into_pinned_memory(monkeypatch, device, pinned):
    options = {}

    def loader(*arguments, **named):
        options.update(named)
        return []

    monkeypatch.setattr(run, "DataLoader", loader)
    job = SimpleNamespace(dataset=[], collate=list, num_workers=0, device=torch.device(device))
    assert list(run._load_batches(job, iter([]))) == []
    assert options["pin_memory"] is pinned
