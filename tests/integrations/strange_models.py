"""Models off the beaten path, their data, and their losses as a loop by hand makes them.

Each case is (make the model, samples, collate, loss by hand, the Trainer's arguments). The loss by
hand takes the model and a batch, and gives the losses of its samples, summed over their targets,
(B,), and the number of these targets, (B,).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

VOCABULARY, N, CLASSES = 40, 12, 3
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4))
generator = torch.Generator().manual_seed(1)
TOKENS = [torch.randint(1, VOCABULARY, (4 + 3 * i % 7,), generator=generator) for i in range(N)]
ALIKE = [torch.randint(1, VOCABULARY, (7,), generator=generator) for _ in range(N)]
LANGUAGE = [{"input_ids": ids, "labels": ids} for ids in TOKENS]
TAGS = [{"input_ids": ids, "labels": ids % 5} for ids in TOKENS]
LABELLED = [{"input_ids": ids, "labels": torch.tensor(i % CLASSES)} for i, ids in enumerate(TOKENS)]
DECODED = [s | {"decoder_input_ids": s["input_ids"].roll(1)} for s in LANGUAGE]
IMAGES = [
    {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % CLASSES)}
    for i in range(N)
]


def collate(samples):
    """Padded, with a mask; what has no length is stacked."""
    batch = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name in ("input_ids", "labels", "decoder_input_ids") and values[0].dim() == 1:
            padding = -100 if name == "labels" else 0
            batch[name] = pad_sequence(values, batch_first=True, padding_value=padding)
        else:
            batch[name] = torch.stack(values)
    if "input_ids" in batch and batch["input_ids"].dim() == 2:
        batch["attention_mask"] = (batch["input_ids"] != 0).long()
    return batch


def without_mask(samples):
    return {k: v for k, v in collate(samples).items() if k != "attention_mask"}


def stacked(samples):
    return {name: torch.stack([s[name] for s in samples]) for name in samples[0]}


# Losses by hand


def in_place(logits, labels):
    losses = F.cross_entropy(logits.transpose(1, -1), labels, reduction="none")
    if labels.dim() == 1:
        return losses, torch.ones(len(labels))
    return losses.sum(1), (labels != -100).sum(1)


def shifted(logits, labels):
    return in_place(logits[:, :-1], labels[:, 1:])


def by(rule, **options):
    return lambda model, batch: rule(logits_of(model(**batch, **options)), batch["labels"])


def logits_of(output):
    if isinstance(output, tuple):
        return output[-1]
    return output["logits"] if isinstance(output, dict) else output.logits


def squares(model, batch):
    outputs = logits_of(model(**batch)).reshape(batch["labels"].shape)
    return (outputs - batch["labels"]).square(), torch.ones(len(outputs))


def answers(model, batch):
    losses = F.binary_cross_entropy_with_logits(
        logits_of(model(**batch)), batch["labels"], reduction="none"
    )
    return losses.sum(1), torch.full((len(losses),), losses.shape[1])


# Models


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(kind, **options):
    config = transformers.BertConfig(**BERT | options)
    return getattr(transformers, f"BertFor{kind}")(config)


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads)
    return transformers.LlamaForCausalLM(config)


def bert2bert():
    encoder = transformers.BertConfig(**BERT)
    decoder = transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def t5():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(
        vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0, **sizes
    )
    return transformers.T5ForConditionalGeneration(config)


def marian():
    sides = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2}
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY, d_model=16, dropout=0.0, forced_eos_token_id=2, **sides, **tokens
    )
    return transformers.MarianMTModel(config)


def xlm(family):
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        emb_dim=16,
        n_layers=1,
        n_heads=2,
        dropout=0.0,
        attention_dropout=0.0,
        max_position_embeddings=64,
        pad_index=0,
    )
    return getattr(transformers, f"{family}WithLMHeadModel")(config)


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def speech(reduction):
    config = transformers.Wav2Vec2Config(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        ctc_loss_reduction=reduction,
        layerdrop=0.0,
        mask_time_prob=0.0,
        **dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0
        ),
        final_dropout=0.0,
    )
    return transformers.Wav2Vec2ForCTC(config)


def prompted(kind, task="CAUSAL_LM", **options):
    import peft

    options = {"num_virtual_tokens": 4, "task_type": task} | options
    inner = {
        "CAUSAL_LM": llama,
        "SEQ_2_SEQ_LM": t5,
        "SEQ_CLS": lambda: bert("SequenceClassification", num_labels=CLASSES),
    }
    return peft.get_peft_model(inner[task](), getattr(peft, f"{kind}Config")(**options))


class Tokens(nn.Module):
    """A small model of tokens; `meaning` says what its own loss makes of labels."""

    def __init__(self, classes=VOCABULARY, meaning="shifted"):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, classes)
        self.meaning = meaning

    def features(self, input_ids):
        return self.embedding(input_ids).cumsum(1)

    def loss(self, logits, labels):
        if self.meaning == "shifted":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def forward(self, input_ids, labels=None):
        logits = self.head(self.features(input_ids))
        if labels is None or self.meaning == "none":
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": logits}


class DemandsLabels(Tokens):
    def forward(self, input_ids, labels):
        logits = self.head(self.features(input_ids))
        return self.loss(logits, labels), logits


class LastTokenWithoutLabels(Tokens):
    """As nanoGPT: without targets it makes the logits of the last token alone."""

    def forward(self, input_ids, labels=None):
        features = self.features(input_ids)
        if labels is None:
            return self.head(features[:, -1:])
        logits = self.head(features)
        return self.loss(logits, labels), logits


class NoLogitsWithLabels(Tokens):
    """As Liger's kernels: its fused loss makes no logits."""

    def forward(self, input_ids, labels=None):
        logits = self.head(self.features(input_ids))
        if labels is None or not self.training:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels), "logits": None}


class OverLogits(torch.autograd.Function):
    """Cross entropy that leaves its gradient where the logits were, as Liger's does."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.enable_grad():
            copy = logits.detach().clone().requires_grad_()
            loss = F.cross_entropy(copy[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        (gradient,) = torch.autograd.grad(loss, copy)
        ctx.save_for_backward(gradient)
        logits.data.copy_(gradient)
        return loss.detach()

    @staticmethod
    def backward(ctx, factor):
        return factor * ctx.saved_tensors[0], None


class LossOverLogits(Tokens):
    def loss(self, logits, labels):
        return OverLogits.apply(logits, labels)


@dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class ReturnsDataclass(Tokens):
    def forward(self, input_ids, labels=None):
        return Output(*DemandsLabels.forward(self, input_ids, labels))


class OtherNames(Tokens):
    def forward(self, input_ids, targets=None):
        logits = self.head(self.features(input_ids))
        return {"loss": self.loss(logits, targets), "logits": logits}


class Regression(nn.Module):
    def __init__(self, has_loss=True):
        super().__init__()
        self.layer, self.has_loss = nn.Linear(4, 1), has_loss

    def forward(self, x, labels=None):
        outputs = self.layer(x).squeeze(-1)
        loss = {"loss": F.mse_loss(outputs, labels)} if self.has_loss else {}
        return {**loss, "logits": outputs}


class Pixels(nn.Module):
    """Classes on the second axis, as PyTorch has them; as many as there are rows."""

    def __init__(self, has_loss=True):
        super().__init__()
        self.layer, self.has_loss = nn.Conv1d(3, 6, 1), has_loss

    def forward(self, x, labels=None):
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Classifier(nn.Module):
    """A classifier with a loss of its own, made from the inner one's logits."""

    def __init__(self, only_in_training=False, zero=False, **options):
        super().__init__()
        self.inner = bert("SequenceClassification", num_labels=CLASSES)
        if zero:
            nn.init.zeros_(self.inner.classifier.weight)
        self.options, self.only_in_training = options, only_in_training

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.inner(input_ids, attention_mask).logits
        plain = self.only_in_training and not self.training
        loss = F.cross_entropy(logits, labels, **({} if plain else self.options))
        return {"loss": loss, "logits": logits}


def replaced_loss():
    model = llama()
    model.loss_function = lambda logits, labels, **options: (
        2 * F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    )
    return model


QUESTIONS = [
    {"input_ids": ids, "start_positions": torch.tensor(i % 3), "end_positions": torch.tensor(3)}
    for i, ids in enumerate(ALIKE)
]
CHOICES = [
    {
        "input_ids": torch.randint(1, VOCABULARY, (3, 6), generator=generator),
        "labels": torch.tensor(i % 3),
    }
    for i in range(N)
]
NUMBERS = [
    # The labels of a batch happen to be 0 and 1; those of the next one are not.
    {"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 2 if i < 8 else 0.7 * i)}
    for i in range(N)
]
ANSWERS = [
    {"input_ids": ids, "labels": ((torch.arange(CLASSES) + i) % 2).float()}
    for i, ids in enumerate(TOKENS)
]
FRAMES = [
    {
        "x": torch.randn(3, 6, generator=generator),
        "labels": torch.randint(0, 6, (6,), generator=generator),
    }
    for _ in range(N)
]
WAVES = [
    {
        "input_values": torch.randn(400, generator=generator),
        "labels": torch.randint(1, 10, (5,), generator=generator),
    }
    for _ in range(N)
]


def with_targets(samples):
    batch = without_mask(samples)
    batch["targets"] = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    return batch


def with_answers(samples):
    batch = collate([{"input_ids": s["input_ids"]} for s in samples])
    return batch | {"labels": torch.stack([s["labels"] for s in samples])}


def virtual(model, batch):
    """Of prompt tuning: its tokens come first, and the first real token is a target."""
    logits = model(**batch).logits
    return shifted(logits, F.pad(batch["labels"], (4, 0), value=-100))


def questions(model, batch):
    outputs = model(**batch)
    return question_loss(outputs, batch), torch.ones(len(batch["input_ids"]))


def question_loss(outputs, batch):
    sides = [
        F.cross_entropy(outputs[f"{side}_logits"], batch[f"{side}_positions"], reduction="none")
        for side in ("start", "end")
    ]
    return (sides[0] + sides[1]) / 2


ANY_COLUMN = {"remove_unused_columns": False}
TAGGER = {"num_labels": 5}
SAME = {
    "decoder": (llama, LANGUAGE, collate, by(shifted)),
    "tagger": (lambda: bert("TokenClassification", **TAGGER), TAGS, collate, by(in_place)),
    "compiled tagger": (
        lambda: torch.compile(bert("TokenClassification", **TAGGER), backend="eager"),
        TAGS,
        collate,
        by(in_place),
        ANY_COLUMN,
    ),
    "tagger in DataParallel": (
        lambda: nn.DataParallel(bert("TokenClassification", **TAGGER)),
        TAGS,
        collate,
        by(in_place),
        ANY_COLUMN,
    ),
    "tagger of one's own": (lambda: Tokens(5, "in place"), TAGS, without_mask, by(in_place)),
    "as many tags as tokens": (lambda: Tokens(50, "in place"), TAGS, without_mask, by(in_place)),
    "labels demanded": (DemandsLabels, LANGUAGE, without_mask, by(shifted)),
    "last token without labels": (LastTokenWithoutLabels, LANGUAGE, without_mask, by(shifted)),
    "no logits with labels": (
        NoLogitsWithLabels,
        LANGUAGE,
        without_mask,
        lambda m, b: shifted(m(b["input_ids"])["logits"], b["labels"]),
    ),
    "a loss over its logits": (
        LossOverLogits,
        LANGUAGE,
        without_mask,
        lambda m, b: shifted(m(b["input_ids"])["logits"], b["labels"]),
    ),
    "a dataclass": (ReturnsDataclass, LANGUAGE, without_mask, by(shifted)),
    "targets, shifted already": (
        lambda: OtherNames(meaning="in place"),
        LANGUAGE,
        with_targets,
        lambda m, b: in_place(m(**b)["logits"], b["targets"]),
        {"label_names": ["targets"], **ANY_COLUMN},
    ),
    "numbers": (Regression, NUMBERS, stacked, squares),
    "numbers without a loss": (lambda: Regression(has_loss=False), NUMBERS, stacked, squares),
    "answers": (
        lambda: bert(
            "SequenceClassification",
            num_labels=CLASSES,
            problem_type="multi_label_classification",
        ),
        ANSWERS,
        with_answers,
        answers,
    ),
    "classes": (
        lambda: bert("SequenceClassification", num_labels=CLASSES),
        LABELLED,
        collate,
        by(in_place),
    ),
    "images": (vit, IMAGES, stacked, by(in_place)),
    "classes on the second axis": (
        Pixels,
        FRAMES,
        stacked,
        lambda m, b: in_place(m(**b)["logits"].mT, b["labels"]),
    ),
    "choices": (lambda: bert("MultipleChoice"), CHOICES, stacked, by(in_place)),
    "masked tokens": (lambda: bert("MaskedLM"), LANGUAGE, collate, by(in_place)),
    "XLM": (lambda: xlm("XLM"), LANGUAGE, collate, by(in_place)),
    "Flaubert": (lambda: xlm("Flaubert"), LANGUAGE, collate, by(in_place)),
    "BERT to BERT": (bert2bert, LANGUAGE, collate, by(in_place)),
    "BERT to BERT, decoder inputs": (bert2bert, DECODED, collate, by(in_place)),
    "T5": (t5, LANGUAGE, collate, by(in_place)),
    "T5, decoder inputs": (t5, DECODED, collate, by(in_place)),
    "Marian": (marian, LANGUAGE, collate, by(in_place)),
    "prompt tuning": (lambda: prompted("PromptTuning"), LANGUAGE, collate, virtual),
    "P-tuning": (lambda: prompted("PromptEncoder"), LANGUAGE, collate, virtual),
    "prefix tuning": (lambda: prompted("PrefixTuning"), LANGUAGE, collate, by(shifted)),
    "prompt tuning of classes": (
        lambda: prompted("PromptTuning", "SEQ_CLS"),
        LABELLED,
        collate,
        by(in_place),
    ),
    "prompt tuning of T5": (
        lambda: prompted("PromptTuning", "SEQ_2_SEQ_LM", num_transformer_submodules=1),
        LANGUAGE,
        collate,
        by(in_place),
    ),
}
