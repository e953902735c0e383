"""A tiny language model and data of unequal lengths, trained by every adapter in the same way."""

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from flowdata.losses import causal_lm_loss

N, VOCABULARY = 32, 40
NORMALIZE = ("count", "weights")  # what a step's loss is divided by


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def make_samples(n=N):
    generator = torch.Generator().manual_seed(1)
    samples = []
    for index in range(n):
        ids = torch.randint(1, VOCABULARY, (4 + 3 * index % 11,), generator=generator)
        labels = ids.clone()
        labels[: 1 + index % 3] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def make_weights(n=N):
    weights = torch.rand(n, generator=torch.Generator().manual_seed(2))
    weights[3] = 0
    return weights


def make_token_weights(samples):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(len(sample["input_ids"]), generator=generator) for sample in samples]


def collate(samples):
    ids = pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    labels = pad_sequence([s["labels"] for s in samples], batch_first=True, padding_value=-100)
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def flat_gradient(model):
    return torch.cat([p.grad.detach().flatten() for p in model.parameters() if p.grad is not None])


def full_batch_gradient(weights, normalize="count", model=None, **options):
    """The gradient of the whole data set in one batch, by the plain loss."""
    model = make_model() if model is None else model
    batch = collate(make_samples())
    if isinstance(weights, list):
        weights = pad_sequence(weights, batch_first=True)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    causal_lm_loss(logits, batch["labels"], weights, normalize=normalize, **options).backward()
    return flat_gradient(model)


def assert_same_gradient(gradient, expected):
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def make_tokenizer():
    """Words w1 … w37, a chat template, and special tokens 0 (pad), 38 (end) and 39 (unknown)."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 38, "<unk>": 39} | {f"w{i}": i for i in range(1, 38)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ 'w1 ' if m['role'] == 'user' else 'w2 ' }}{{ m['content'] }}"
        "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
    )
    return fast


def as_hf_dataset(samples, **columns):
    from datasets import Dataset

    rows = [{key: value.tolist() for key, value in sample.items()} for sample in samples]
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset
