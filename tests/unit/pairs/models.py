"""Small random models, and options as the command line gives them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from nemo_lmpo.data.builtin.tiny_tokenizer import tiny_tokenizer
from nemo_lmpo.pairs.command import build_parser

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def save_policy(folder: Path, seed: int = 0) -> Path:
    """A model that answers with random words, and ends most of its answers within 60 tokens."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **SIZES)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, labels: int = 1, pad: int | None = None) -> Path:
    """A reward model of the usual form, whose scores spread."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, pad_token_id=pad, initializer_range=0.2, **SIZES)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def options(model: Path | list[Path], output: Path, *more: str) -> argparse.Namespace:
    """As the command line gives them: quiet, a few short answers."""
    models = [word for one in (model if isinstance(model, list) else [model]) for word in ("--model", str(one))]
    given = ["--output", str(output), "--prompts", "builtin:tiny", "--limit", "6", "--max-new-tokens", "60", "--quiet"]
    return build_parser("pairs").parse_args([*models, *given, "--batch-size", "4", *more])
