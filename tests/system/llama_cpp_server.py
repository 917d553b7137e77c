"""llama.cpp's own server, and its file format. Needs `gguf` and `xllamacpp`, which are imported where they are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A query or key projection with the rows that a rotation pairs side by side, as llama.cpp has them."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()


def write_gguf(directory: Path, output: Path) -> None:
    """As llama.cpp's converter: special tokens and template by the `gguf` package, which is part of it."""
    from gguf import GGUFWriter, SpecialVocab, TokenType

    config, words = json.loads((directory / "config.json").read_text()), AutoTokenizer.from_pretrained(directory)
    heads = config["num_attention_heads"]
    writer = GGUFWriter(output, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    pieces = words.convert_ids_to_tokens(range(len(words)))
    special = set(words.added_tokens_decoder)
    writer.add_token_list(pieces)
    writer.add_token_types([TokenType.CONTROL if place in special else TokenType.NORMAL for place in range(len(words))])
    SpecialVocab(directory, load_merges=True).add_to_gguf(writer, quiet=True)
    for name, tensor in load_file(directory / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, part = stem.removeprefix("model.layers.").split(".", 1)
            stem = f"blk.{layer}.{TENSORS[part]}"
        else:
            stem = TENSORS[stem]
        if stem.endswith(("attn_q", "attn_k")):
            parts = heads if stem.endswith("attn_q") else config["num_key_value_heads"]
            tensor = interleaved(tensor, parts)
        writer.add_tensor(f"{stem}.weight", tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def served(model: Path) -> Iterator[str]:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 512, 1, 0, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server
