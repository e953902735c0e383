"""Small models and data sets that several tests score."""

import torch
from torch import nn

VOCABULARY = 199


def tiny_llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | options))


def tiny_gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1
        )
    )


def token_samples(count=24, *, longest=60, seed=0):
    """Ragged samples whose first third is the prompt."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in torch.randint(4, longest, (count,), generator=generator).tolist():
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3 + 1] = -100
        samples.append({"input_ids": ids, "labels": labels})
    return samples


class TinyResNet(nn.Module):
    """A residual block between a stem and a linear head, BatchNorm and dropout included."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5)
        )
        self.head = nn.Linear(16, classes)

    def forward(self, images):
        features = self.stem(images)
        features = features + self.block(features)
        return self.head(features.mean((2, 3)))


def images(count=20, *, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(
        torch.randn(count, 3, 8, 8, generator=generator),
        torch.randint(0, classes, (count,), generator=generator),
    )


def scale_logits(model, factor):
    """Let a model do to its logits what its configuration doesn't tell, and make no loss."""
    forward = model.forward

    def scaled(*args, labels=None, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * factor
        return output

    model.forward = scaled
