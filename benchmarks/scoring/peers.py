"""The loops that people write, and those of other libraries: (model, samples) -> (N,) losses."""

from __future__ import annotations

import copy
import tempfile
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.cli.bench_inputs import Samples, guesses_expected
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.plan.packs import plan_padded
from flowdata.scoring.scorer import LossScorer
from flowdata.targets.labels import IGNORE_INDEX


def scored(
    model: Any, samples: Samples, *, lengths: list[int] | None = None, **options: Any
) -> Tensor:
    """Return the losses by the library, whose fingerprint, plan and self-check count as well."""
    scorer = LossScorer(model, "causal_lm", progress=False, **options)
    with guesses_expected():
        return scorer.score(samples, dataset_id="benchmark", lengths=lengths).losses


def prompts_apart(model: Any, samples: Samples) -> Tensor:
    """Return the losses by the library, where it runs a prompt again for each of its answers.

    The library finds common prompts while it reads the samples for their lengths. Here it is given
    the lengths.
    """
    lengths = [len(sample["input_ids"]) for sample in samples]
    return scored(model, samples, lengths=lengths, dtype="bfloat16")


def one_at_a_time(model: Any, samples: Samples) -> Tensor:
    """Return the losses without padding, of full logits in float32."""
    losses = []
    with torch.no_grad():
        for sample in samples:
            ids, labels = (sample[k].to(model.device) for k in ("input_ids", "labels"))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            losses.append(F.cross_entropy(logits.float(), labels[1:]))
    return torch.stack(losses).cpu()


def sorted_targets(model: Any, samples: Samples, max_tokens: int = 4096) -> Tensor:
    """Return the losses by the loop of an expert: sorted by length, logits of targets only."""
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    plan = plan_padded(lengths, max_tokens=max_tokens)
    losses = torch.empty(len(samples))
    with torch.no_grad():
        for pack in range(len(plan)):
            indices = plan.pack(pack)
            batch = pad_collate([samples[index] for index in indices.tolist()])
            batch = {name: values.to(model.device) for name, values in batch.items()}
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE_INDEX)
            is_target = labels != IGNORE_INDEX
            hidden = model.model(**batch, use_cache=False).last_hidden_state[is_target]
            each = F.cross_entropy(
                model.lm_head(hidden).float(), labels[is_target], reduction="none"
            )
            counts = is_target.sum(1)
            means = [part.mean() for part in each.split(counts.tolist())]
            losses[indices] = torch.stack(means).cpu()
    return losses


def sorted_flash(model: Any, samples: Samples) -> Tensor:
    """Return the losses by the expert's loop with the package flash-attn, which skips padding."""
    before = model.config._attn_implementation
    model.set_attn_implementation("flash_attention_2")
    try:
        return sorted_targets(model, samples)
    finally:
        model.set_attn_implementation(before)


def lm_eval(model: Any, samples: Samples, batch_size: int = 16) -> Tensor:
    """Return the losses by lm-eval's `HFLM._loglikelihood_tokens`: sorted, padded, full logits."""
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=_tokenizer(), batch_size=batch_size)
    requests = []
    for sample in samples:
        ids, labels = sample["input_ids"].tolist(), sample["labels"]
        prompt = int((labels == IGNORE_INDEX).sum())
        requests.append((("", ""), ids[:prompt], ids[prompt:]))
    results = harness._loglikelihood_tokens(requests, disable_tqdm=True)
    pairs = zip(results, requests, strict=True)
    return torch.tensor([-total / len(ids) for (total, _), (_, _, ids) in pairs])


def trl(model: Any, samples: Samples, batch_size: int = 8) -> Tensor:
    """Return the losses by TRL's `DPOTrainer.compute_ref_log_probs`: padded, in given order."""
    from accelerate import Accelerator
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    model = copy.copy(model)  # its forward is replaced
    add_fused_lm_head(model)
    trainer = SimpleNamespace(
        accelerator=Accelerator(cpu=model.device.type == "cpu"),
        model=model,
        ref_model=model,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        ld_alpha=None,
    )
    losses = []
    for start in range(0, len(samples), batch_size):
        batch = pad_collate(samples[start : start + batch_size])
        batch = {name: values.to(model.device) for name, values in batch.items()}
        mask = (batch.pop("labels") != IGNORE_INDEX).long()
        sums = DPOTrainer.compute_ref_log_probs(trainer, model, {**batch, "completion_mask": mask})
        losses.append((-torch.cat(sums).float() / mask[:, 1:].sum(1)).cpu())
    return torch.cat(losses)


def vllm(model: Any, samples: Samples) -> Tensor:
    """Return the losses by vLLM's log-probabilities of prompts; never run, by its documents alone.

    It computes those of every token, the prompt's too. Loading the model is the first call's.
    """
    from vllm import SamplingParams

    engine = _engine(model)
    options = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    prompts = [{"prompt_token_ids": sample["input_ids"].tolist()} for sample in samples]
    outputs = engine.generate(prompts, options, use_tqdm=False)  # in the prompts' order
    losses = []
    for output, sample in zip(outputs, samples, strict=True):
        # Of each token a dict {token: Logprob}, which holds the token's own; None of the first.
        pairs = zip(sample["input_ids"].tolist(), output.prompt_logprobs, strict=True)
        each = torch.tensor([0.0 if of is None else -of[token].logprob for token, of in pairs])
        losses.append(each[1:][sample["labels"][1:] != IGNORE_INDEX].mean())
    return torch.stack(losses)


_ENGINES: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # vLLM's, each as long as its model


def _engine(model: Any) -> Any:
    """vLLM with a model's weights, loaded once."""
    if model not in _ENGINES:
        from vllm import LLM

        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            _ENGINES[model] = LLM(
                model=folder,
                dtype=str(model.dtype).removeprefix("torch."),
                skip_tokenizer_init=True,  # samples are tokens already
                enable_prefix_caching=False,  # a run would find what the one before computed
                gpu_memory_utilization=0.5,  # the model itself and the other loops need the rest
            )
    return _ENGINES[model]


def _tokenizer() -> Any:
    """A tokenizer of one word: lm-eval asks for one, though the samples are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>"
    )
