"""Configurations made tiny: the sizes that any architecture's configuration may hold, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD_WIDTH, LAYERS, EXPERTS, IMAGE, PATCH = 199, 64, 4, 16, 2, 4, 32, 8
_FIRST_MOVED_TOKEN = VOCABULARY - 1

# The whole name of a number, or its end, and what the number becomes; the first that fits counts.
_SIZES: dict[str, int] = {
    "max_source_positions": 64,
    "max_position_embeddings": 128,
    "vocab_size_per_layer_input": VOCABULARY,
    "type_vocab_size": 2,
    "vocab_size": VOCABULARY,
    "moe_intermediate_size": 32,
    "intermediate_size": 96,
    **dict.fromkeys(("ffn_dim", "d_ff", "ffn_hidden_size", "n_inner", "mlp_dim"), 96),
    "hidden_size_per_layer_input": 16,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_encoder_layers", "num_layer", "depth"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("attention_heads", "num_attn_heads", "n_mamba_heads"), HEADS),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "index_head_dim"), HEAD_WIDTH),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), HEAD_WIDTH),
    "qk_head_dim": 2 * HEAD_WIDTH,
    "head_dim": HEAD_WIDTH,
    **dict.fromkeys(("d_kv", "attention_head_size", "kv_channels"), HEAD_WIDTH),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("index_n_heads", "num_v_heads", "num_k_heads"), HEADS),
    "index_topk": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index"), 1),
    "sliding_window": 16,
    **dict.fromkeys(("d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "d_embed"), WIDTH),
    **dict.fromkeys(("hidden_size", "hidden_dim", "embed_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("projection_dim", "output_dim", "encoder_dim"), WIDTH),
    "image_size": IMAGE,
}
# In whose configurations widths, heads and depths come as lists or grow from stage to stage.
_STAGES = ("depths", "hidden_sizes", "embed_dims", "num_blocks", "layer_depths")

# What an architecture asks for beside the sizes. Names with a dot lie in a part of it.
_MAMBA = {"mamba_n_heads": 2 * HEADS, "mamba_d_head": HEAD_WIDTH}
_MULTIMODAL_ROPE = {
    "text_config.rope_parameters.mrope_section": [HEAD_WIDTH // 4, HEAD_WIDTH // 8, HEAD_WIDTH // 8]
}
FIXES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "bloom": {"hidden_size": WIDTH, "n_head": HEADS},
    "canine": {"downsampling_rate": 2},
    "dbrx": {
        "attn_config.rope_theta": 1e4,
        "attn_config.clip_qkv": 8.0,
        "ffn_config.moe_num_experts": EXPERTS,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "donut-swin": {"window_size": 2, "image_size": 64},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "efficientnet": {"hidden_dim": 2560},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 2, "pad_token_id": 1},
    "falcon": {"num_kv_heads": HEADS},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 2 * WIDTH},
    "funnel": {"block_sizes": [1, 1], "n_head": HEADS, "d_head": HEAD_WIDTH, "d_inner": 96},
    "gpt_neo": {
        "attention_layers": ["global", "local"],
        "attention_types": [[["global", "local"], 1]],
    },
    **dict.fromkeys(("glm46v", "glm4v", "glm4v_moe", "glm_ocr"), _MULTIMODAL_ROPE),
    "granitemoehybrid": _MAMBA,
    "kimi_linear": {"num_experts_per_token": 2},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "levit": {"image_size": 224},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 2 * HEADS},
    "mistral4": {"head_dim": 2 * HEAD_WIDTH},
    "mobilebert": {"true_hidden_size": WIDTH, "intra_bottleneck_size": WIDTH},
    "mobilevitv2": {"image_size": 64},
    "mpt": {"n_heads": HEADS, "max_seq_len": 128},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2},
    "gemma3": {"mm_tokens_per_image": 4},
    "perceiver": {"d_latents": WIDTH, "num_latents": 16, "num_self_attends_per_block": 2},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "paddleocr_vl"), _MULTIMODAL_ROPE),
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "is_decoder": True},
    "swin": {"window_size": 2, "image_size": 64},
    "wav2vec2-bert": {"vocab_size": VOCABULARY},
    "wav2vec2-conformer": {"vocab_size": VOCABULARY},
    "xmod": {"default_language": "en_XX"},
    "xlnet": {"d_inner": 96, "d_head": HEAD_WIDTH},
    "zamba2": _MAMBA | {"mamba_headdim": HEAD_WIDTH, "n_mamba_heads": 8, "hybrid_layer_ids": [1]},
}


def shrunk(settings: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Return the settings of a tiny model of the same architecture.

    Widths, depths, heads, experts, vocabularies and windows become small wherever their names
    say what they are; every kind of layer that the settings list occurs once; ids of special
    tokens beyond the small vocabulary move into it, equal ids staying equal.

    Args:
        settings: a configuration's `to_dict()`, parts nested in it included.
        name: the architecture, whose entry in `FIXES` comes last.
    """
    small = _shrunk_part(settings, moved={})
    for path, value in FIXES.get(name, {}).items():
        *parts, last = path.split(".")
        part = small
        for each in parts:
            part = part.setdefault(each, {})
        part[last] = value
    return small


def shortened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with fewer layers and a small vocabulary, all widths as they are.

    For architectures whose widths hang together in ways that `shrunk` doesn't know.
    """
    moved: dict[int, int] = {}
    keep = {"vocab_size", "num_hidden_layers", "n_layer", "num_layers", "depth", "depths"}
    keep |= {"encoder_layers", "decoder_layers", "image_size", "layer_types"}

    def short(part: Mapping[str, Any]) -> dict[str, Any]:
        small = _shrunk_part(part, moved)
        return {
            key: short(value)
            if isinstance(value, Mapping)
            else small[key]
            if key in keep or _is_token(key)
            else value
            for key, value in part.items()
        }

    return short(settings)


def _shrunk_part(settings: Mapping[str, Any], moved: dict[int, int]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    has_stages = any(isinstance(settings.get(stage), list | tuple) for stage in _STAGES)
    for key, value in settings.items():
        if key == "per_layer_config" and value:
            small[key] = {1: _shrunk_part(next(iter(value.values())), moved)}
        elif isinstance(value, Mapping):
            is_names = key in ("id2label", "label2id")
            small[key] = dict(value) if is_names else _shrunk_part(value, moved)
        elif _is_token(key):
            small[key] = _moved(value, moved)
        elif key == "patch_size":
            small[key] = _patch(value)
        elif key in ("out_features", "out_indices", "stage_names"):  # of stages that are no more
            small[key] = None
        elif key == "head_dim" and value is None:
            small[key] = HEAD_WIDTH
        elif key == "image_grid_pinpoints" and value:
            small[key] = [[IMAGE, IMAGE]]
        elif key == "image_size" and isinstance(value, list | tuple):
            small[key] = [min(size, IMAGE) for size in value]
        elif key == "mrope_section":
            small[key] = [HEAD_WIDTH // 4, HEAD_WIDTH // 8, HEAD_WIDTH // 8]
        elif key == "depths" and isinstance(value, list | tuple):
            small[key] = [1 for _ in value]
        elif key in ("conv_dim", "tdnn_dim"):  # of what reads waves
            small[key] = [32 for _ in value]
        elif _is_number(value) and not (has_stages and key not in ("image_size", "vocab_size")):
            small[key] = _size(key, value)
        else:
            small[key] = value
    return _with_heads(_with_layer_types(small), settings)


def _size(key: str, value: int) -> int:
    for end, size in _SIZES.items():
        if key == end or key.endswith(f"_{end}"):
            return min(value, size) if value > 0 else value
    return value


def _with_layer_types(small: dict[str, Any]) -> dict[str, Any]:
    """One layer of each type, two at least; other lists that have an entry a layer cut to them."""
    name = "layer_types" if small.get("layer_types") else "layers_block_type"
    types = small.get(name)
    if not isinstance(types, list | tuple) or not types:
        return small
    kinds = list(dict.fromkeys(types))
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    for key, value in small.items():
        if isinstance(value, list | tuple) and len(value) == len(types):
            small[key] = list(value[: len(kinds)])
    counts = ("num_hidden_layers", "n_layer", "num_layers")
    return small | {name: kinds} | {count: len(kinds) for count in counts if count in small}


def _with_heads(small: dict[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fewer heads for keys where there were fewer, else as many as there are."""
    heads, before = settings.get("num_attention_heads"), small.get("num_attention_heads")
    for key in ("num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"):
        value = settings.get(key)
        if _is_number(value) and _is_number(heads) and _is_number(before):
            small[key] = before if value >= heads else max(1, before // 2) if value > 1 else 1
    return small


def _patch(value: Any) -> Any:
    """A patch that an image is a whole number of: two on a side at least."""
    if isinstance(value, list | tuple):
        return [_patch(size) for size in value]
    return value if not _is_number(value) or value <= PATCH else PATCH


def _moved(value: Any, moved: dict[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return [_moved(each, moved) for each in value]
    if not _is_number(value) or value < VOCABULARY:
        return value
    return moved.setdefault(value, _FIRST_MOVED_TOKEN - len(moved))


def _is_token(key: str) -> bool:
    return str(key).endswith(("token_id", "token_ids", "token_index"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
