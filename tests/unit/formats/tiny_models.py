"""Tiny random models of every supported family, made by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_COMMON = {"num_hidden_layers": 4, "max_position_embeddings": 256, "initializer_range": 0.2}


def _llama(**settings: object) -> LlamaConfig:
    return LlamaConfig(**{**_COMMON, "hidden_size": 64, "intermediate_size": 96, **settings})


def _mistral(**settings: object) -> MistralConfig:
    return MistralConfig(**{**_COMMON, "hidden_size": 64, "intermediate_size": 96, **settings})


_QWEN = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_MOE = {
    **{"vocab_size": 131, "num_hidden_layers": 2, "head_dim": 16, "rope_theta": 1e6},
    **{"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2},
}
_MAKERS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: _llama(vocab_size=320, num_attention_heads=4, num_key_value_heads=4),
    "llama3": lambda: _llama(vocab_size=259, num_attention_heads=4, num_key_value_heads=2, rope_theta=500000.0),
    "llama31": lambda: _llama(
        vocab_size=259,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA3_SCALING, "factor": 8.0},
    ),
    "llama32": lambda: _llama(
        vocab_size=131,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA3_SCALING, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "smollm2": lambda: _llama(
        vocab_size=200,
        hidden_size=72,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_theta=100000.0,
        tie_word_embeddings=True,
    ),
    "mistral_v01": lambda: _mistral(vocab_size=256, num_attention_heads=4, num_key_value_heads=2, sliding_window=16),
    "mistral_v02": lambda: _mistral(
        vocab_size=256, num_attention_heads=4, num_key_value_heads=2, sliding_window=None, rope_theta=1e6
    ),
    "mistral_v03": lambda: _mistral(
        vocab_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=24, sliding_window=None, rope_theta=1e6
    ),
    "qwen25": lambda: Qwen2Config(**{**_COMMON, **_QWEN, "vocab_size": 259, "rope_theta": 1e6}),
    "qwen25_tied": lambda: Qwen2Config(**{**_COMMON, **_QWEN, "vocab_size": 131, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**{**_COMMON, **_QWEN, "vocab_size": 259, "head_dim": 24, "rope_theta": 1e6}),
    "qwen3_tied": lambda: Qwen3Config(
        **{**_COMMON, **_QWEN, "vocab_size": 131, "head_dim": 16, "tie_word_embeddings": True}
    ),
    "mixtral": lambda: MixtralConfig(
        **{**_COMMON, **_QWEN, "vocab_size": 256, "num_hidden_layers": 2, "num_local_experts": 4, "head_dim": 24}
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(**{**_COMMON, **_QWEN, **_MOE, "norm_topk_prob": True}),
    "qwen3_moe_plain": lambda: Qwen3MoeConfig(**{**_COMMON, **_QWEN, **_MOE, "num_experts_per_tok": 3}),
}
FAMILIES = tuple(_MAKERS)


def config(family: str) -> PretrainedConfig:
    """The tiny config of a family; vocabularies are odd on purpose, and sizes differ from each other."""
    return _MAKERS[family]()


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> Path:
    """Save a random model of the family, with tokenizer, chat template and generation config."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config(family)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", ".bias")):  # ones and zeros would hide one in the wrong place
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, temperature=0.7, do_sample=True)
    model.save_pretrained(directory, **options)
    words = {f"w{index}": index for index in range(64)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(words), bos_token="w1", eos_token="w2", unk_token="w0"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} w3 {{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(directory)
    return directory


def _word_tokenizer(words: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer
