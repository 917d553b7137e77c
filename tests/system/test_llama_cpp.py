"""An export in llama.cpp itself: it writes the prompts of training, and stops where the answers of training end."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.unit.export import test_chat_of_training as chat
from tests.unit.export.test_chat_of_training import starts, state  # noqa: F401 - fixtures

pytest.importorskip("xllamacpp", reason="needs llama.cpp: pip install xllamacpp")

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
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    server = xllamacpp.Server(params)
    yield server.listening_address
    del server


def ask(address: str, path: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.parametrize(("template", "start"), [("chatml", "none"), ("chatml", "inline"), ("file", "both")])
def test_llama_cpp_renders_and_stops_as_in_training(
    template: str,
    start: str,
    starts: dict[str, Path],  # noqa: F811
    state: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    end = chat.ENDS.get(template, "<|turn_end|>")
    choice = template
    if template == "file":
        choice = str(tmp_path / "own.jinja")
        Path(choice).write_text(chat.FILE)
    chat.trained(tmp_path / "run", state, starts[start], choice, chat.SYSTEM)
    chat.by_conversion(tmp_path / "run", tmp_path / "hf")
    write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    words = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = words.apply_chat_template(chat.QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    with served(tmp_path / "model.gguf") as address:
        prompt = ask(address, "/apply-template", {"messages": chat.QUESTION})["prompt"]
        ids = ask(address, "/tokenize", {"content": prompt, "add_special": True, "parse_special": True})["tokens"]
        assert ids == expected, (prompt, words.decode(expected))
        for token, reason in ((end, "stop"), ("x", "length")):
            bias = [[words.convert_tokens_to_ids(token), 1000.0]]
            answer = ask(
                address, "/v1/chat/completions", {"messages": chat.QUESTION, "max_tokens": 4, "logit_bias": bias}
            )
            assert answer["choices"][0]["finish_reason"] == reason, answer
