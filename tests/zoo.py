"""Tiny random models of many architectures, wild enough that a wrong mask shows in their losses."""

import torch
from torch import nn

from tests.models import VOCABULARY

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
WINDOW = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
OWN_HEADS = {"num_key_value_heads": 4}

PACKED = {  # whose attention can be replaced
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "gemma 2": (
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0, **WINDOW},
    ),
    "gemma 3": ("gemma3_text", {"query_pre_attn_scalar": 8, **WINDOW}),
    "phi": ("phi", OWN_HEADS),
    "gpt-2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", OWN_HEADS),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "router_aux_loss_coef": 1.0}),
    "olmoe": ("olmoe", {**EXPERTS, "output_router_logits": True}),
    "qwen3 moe": ("qwen3_moe", {**EXPERTS, "moe_intermediate_size": 16}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, **WINDOW}),
}
PADDED = {  # with an attention of their own, or none
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "falcon": ("falcon", {"alibi": False, "head_dim": None}),
    "mamba": ("mamba", {"state_size": 4}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}),
}
DECODERS = PACKED | PADDED


def decoder(name):
    """A causal language model of the zoo."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, options = DECODERS[name]
    sizes = {name: size for name, size in (SIZES | options).items() if size is not None}
    # The fast attention of transformers before 5.21 ignored the bound of Gemma 2's scores.
    options = {"attn_implementation": "eager"} if name == "gemma 2" else {}
    config = AutoConfig.for_model(kind, **sizes)
    return wild(AutoModelForCausalLM.from_config(config, **options))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return wild(T5ForConditionalGeneration(config))


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=128,
        decoder_start_token_id=0,
    )
    return wild(BartForConditionalGeneration(config))


def bert():
    from transformers import BertConfig, BertForMaskedLM

    return wild(BertForMaskedLM(BertConfig(**SIZES)))


def modernbert():
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(**SIZES | {"cls_token_id": 0, "sep_token_id": 1}, local_attention=16)
    return wild(ModernBertForMaskedLM(config))


IMAGE_TOKEN = 7


def llava():
    """Sees images of 8 x 8 pixels as four tokens."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE_TOKEN
    )
    return wild(LlavaForConditionalGeneration(config))


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return wild(ViTForImageClassification(config))


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return wild(ResNetForImageClassification(config))


def wild(model: nn.Module) -> nn.Module:
    """Give matrices weights so large that attention is far from even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and not name.endswith("A_log"):
                parameter.normal_(std=0.2, generator=generator)
    return model.float().eval()
