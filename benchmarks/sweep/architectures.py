"""What the sweep is over: the architectures that transformers' auto classes name, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """An auto class of transformers.

    Attributes:
        name: as the command takes it.
        auto_class: of transformers.
        mapping: the name of the table in `modeling_auto` that lists its architectures.
        loss: the library's name for its loss, where it has one.
    """

    name: str
    auto_class: str
    mapping: str
    loss: str | None


KINDS = {
    kind.name: kind
    for kind in (
        Kind("causal_lm", "AutoModelForCausalLM", "CAUSAL_LM", "causal_lm"),
        Kind("masked_lm", "AutoModelForMaskedLM", "MASKED_LM", "masked_lm"),
        Kind(
            "sequence_classification",
            "AutoModelForSequenceClassification",
            "SEQUENCE_CLASSIFICATION",
            "cross_entropy",
        ),
        Kind(
            "token_classification",
            "AutoModelForTokenClassification",
            "TOKEN_CLASSIFICATION",
            "cross_entropy",
        ),
        Kind("seq2seq_lm", "AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM", "seq2seq_lm"),
        Kind(
            "image_classification",
            "AutoModelForImageClassification",
            "IMAGE_CLASSIFICATION",
            "cross_entropy",
        ),
        Kind(
            "audio_classification",
            "AutoModelForAudioClassification",
            "AUDIO_CLASSIFICATION",
            "cross_entropy",
        ),
        Kind("ctc", "AutoModelForCTC", "CTC", None),
        Kind("speech_seq2seq", "AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ", "seq2seq_lm"),
        Kind(
            "image_text_to_text", "AutoModelForImageTextToText", "IMAGE_TEXT_TO_TEXT", "causal_lm"
        ),
    )
}


def architectures(kind: Kind) -> list[str]:
    """The names (`model_type`) of a kind's architectures, as transformers lists them."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, f"MODEL_FOR_{kind.mapping}_MAPPING_NAMES"))


def configuration_class(name: str) -> Any:
    """The configuration class of an architecture."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[name]


def auto_class(kind: Kind) -> Any:
    """The auto class of a kind."""
    import transformers

    return getattr(transformers, kind.auto_class)
