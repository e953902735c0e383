"""Liger's kernels under the trainers, in Triton's interpreter, against loops without them:

TRITON_INTERPRET=1 python -m pytest tests/integrations/test_liger.py, as test_first_batch.py does.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")
pytest.importorskip("liger_kernel", reason="Liger is not installed (pip install liger-kernel)")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run this file with TRITON_INTERPRET=1", allow_module_level=True)

from flowdata.integrations.transformers import FlowTrainer
from tests.integrations import tiny
from tests.integrations.test_transformers import flow_trainer

N = 3
# Liger's other kernels take numbers as the compiler passes them, which the interpreter does not.
PLAIN = {"rms_norm": False, "swiglu": False}
LOSSES = {
    "fused": {"rope": False},
    "cross entropy": {"rope": False, "fused_linear_cross_entropy": False, "cross_entropy": True},
    "no loss": {"fused_linear_cross_entropy": False},
}


@pytest.fixture(autouse=True)
def torchs_own(monkeypatch):
    """Liger puts functions of its own into transformers and torch: taken out after each test."""
    from transformers.models.llama import modeling_llama

    for owner, name in (
        (torch.nn.functional, "cross_entropy"),
        (modeling_llama, "apply_rotary_pos_emb"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))


def by_hand(weights):
    model, batch = tiny.make_model(), tiny.collate(tiny.make_samples(N))
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    ((losses * weights[:, None]).sum() / (labels != -100).sum()).backward()
    return tiny.flat_gradient(model)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_a_loop_without_liger(tmp_path, loss):
    weights = tiny.make_weights()[:N]
    expected, gradients = by_hand(weights), []

    class Recorded(FlowTrainer):
        def _clip_grad_norm(self, model):
            gradients.append(tiny.flat_gradient(model))
            return super()._clip_grad_norm(model)

    settings = {
        "use_liger_kernel": True,
        "liger_kernel_config": PLAIN | LOSSES[loss],
        "per_device_train_batch_size": N,
        "max_steps": 1,
    }
    options = {"train_dataset": tiny.make_samples(N), "scores": weights}
    trainer = flow_trainer(tmp_path, Recorded, settings=settings, **options)
    trainer.train()
    tiny.assert_same_gradient(gradients[0], expected)
    assert_liger_acts(trainer, loss)


def assert_liger_acts(trainer, loss):
    is_fused = trainer.model.forward.__module__.startswith("liger_kernel")
    assert is_fused == (loss == "fused")
    assert (torch.nn.functional.cross_entropy.__module__ == "torch.nn.functional") == (
        loss != "cross entropy"
    )


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("is_applied_before", [False, True])
def test_sft_has_the_gradients_of_a_loop_without_liger(tmp_path, is_applied_before):
    trl = pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on: Python 3.11")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    from flowdata.integrations.trl import FlowSFTTrainer
    from tests.integrations import train_worker

    weights, model = tiny.make_weights()[:N], tiny.make_model()
    expected, gradients = by_hand(weights), []
    config = PLAIN | {"rope": False}
    if is_applied_before:
        apply_liger_kernel_to_llama(model=model, **config)
    options = {} if is_applied_before else {"use_liger_kernel": True}
    options |= {"liger_kernel_config": config | {"cross_entropy": True}} if options else {}
    trainer = FlowSFTTrainer(
        model,
        train_worker.hf_arguments(trl.SFTConfig, batch_size=N, steps=1, bf16=False, **options),
        train_dataset=tiny.as_hf_dataset(tiny.make_samples(N)),
        processing_class=tiny.make_tokenizer(),
        scores=weights,
        callbacks=[train_worker.record_gradients(gradients)],
    )
    trainer.train()
    tiny.assert_same_gradient(gradients[0], expected)
