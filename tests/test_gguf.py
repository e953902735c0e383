"""Models from GGUF files: their weights are plain once they are read."""

import gguf
import pytest
import torch

from flowdata.text import load_model
from tests.models import tiny_llama

NAMES = {  # of a layer's tensors there and here
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


@pytest.fixture
def path(tmp_path):
    """A tiny Llama in one file."""
    model = tiny_llama()
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tensors = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        **{
            f"blk.{layer}.{there}": f"model.layers.{layer}.{here}"
            for layer in range(config.num_hidden_layers)
            for there, here in NAMES.items()
        },
    }
    for there, here in tensors.items():
        writer.add_tensor(f"{there}.weight", weights[f"{here}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_a_model_from_a_gguf_file_can_be_cast_trained_and_saved(path, tmp_path):
    model = load_model(str(path))
    assert model.dtype == torch.float32
    assert not getattr(model, "is_quantized", False)
    assert model.bfloat16().dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "saved")
    saved = load_model(str(tmp_path / "saved"))
    assert saved.lm_head.weight.equal(model.lm_head.weight)
    assert "quantization_config" not in saved.config.to_dict()
