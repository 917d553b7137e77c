"""Where a run starts: architecture, weights and tokenizer of `model.restore_from_path`, or random weights."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nemo_lmpo.config.schema import ModelConfig
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.formats.architecture import Architecture, architecture_from_hf
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.start_model import StartModel

SIZES = (
    "vocab_size",
    "hidden_size",
    "ffn_hidden_size",
    "num_layers",
    "num_attention_heads",
    "num_query_groups",
    "max_position_embeddings",
)
"""What decides whether a layout fits a model."""


def find_start_model(model: ModelConfig, *, fetch: bool = True) -> StartModel:
    """Resolve the start of a run without reading weights.

    A `model.architecture` beside `model.restore_from_path` is the one that is expected there.

    Args:
        model: says where.
        fetch: bring hub models to this machine; without, only the cache is looked into, and the expected architecture
            is taken for the model's where it is not there.

    Raises:
        ConfigError: neither a path nor an architecture is given, no tokenizer, or another model than expected.
        CheckpointError: the path is not a model, or one that is not supported.
    """
    if model.restore_from_path is None:
        return _random_start_model(model)
    path = model.restore_from_path
    if not fetch and model.architecture is not None and not _is_here(path):
        return StartModel(_expected(_with_vocabulary(model)), model.tokenizer or path)
    try:
        local = find_model(path, fetch=fetch).path
        found, sidecars = _open(local)
    except CheckpointError as error:
        raise CheckpointError(f"model.restore_from_path: {error}") from None
    if model.architecture is not None:
        # A recipe may leave the vocabulary to the tokenizer.
        expected = _expected({"vocab_size": found.vocab_size, **model.architecture})
        _refuse_other_sizes(found, expected, path)
    return StartModel(found, model.tokenizer or str(sidecars), local, sidecars)


def is_known(model: ModelConfig) -> bool:
    """Whether the architecture can be told without fetching anything."""
    path = model.restore_from_path
    return path is None or model.architecture is not None or _is_here(path)


def _is_here(path: str) -> bool:
    """Whether it exists, or is a hub name whose model (not just some files of it) is in the cache."""
    if Path(path).expanduser().exists():
        return True
    try:
        found = find_model(path, fetch=False).path
    except CheckpointError:
        return False
    return (found / "config.json").is_file() and any(found.glob("*.safetensors"))


def _open(path: Path) -> tuple[Architecture, Path]:
    """The architecture, and a directory with config and tokenizer."""
    from nemo_lmpo.formats.model_files import open_model

    model = open_model(path)
    if model.kind == "huggingface":
        return model.architecture, path
    # The other forms keep these files in places where transformers does not look, a `.nemo` inside the archive.
    directory = Path(tempfile.mkdtemp(prefix="nemo_lmpo_start_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    model.save_sidecars(directory)
    return model.architecture, directory


def _expected(architecture: dict[str, Any]) -> Architecture:
    return architecture_from_hf(architecture, origin="model.architecture")


def _refuse_other_sizes(found: Architecture, expected: Architecture, path: str) -> None:
    differing = [
        f"{name} {getattr(found, name)} instead of {getattr(expected, name)}"
        for name in SIZES
        if getattr(found, name) != getattr(expected, name)
    ]
    if differing:
        raise ConfigError(
            f"model.restore_from_path={path} is another model than the recipe is laid out for "
            f"({'; '.join(differing)}); set model.architecture=null if you mean it"
        )


def _random_start_model(model: ModelConfig) -> StartModel:
    if model.architecture is None:
        raise ConfigError(
            "neither model.restore_from_path nor model.architecture is set; give a model to start from, "
            "for example model.restore_from_path=meta-llama/Meta-Llama-3-8B-Instruct"
        )
    if model.tokenizer is None:
        raise ConfigError("model.tokenizer is not set, and random weights bring none; give a tokenizer")
    return StartModel(_expected(_with_vocabulary(model)), model.tokenizer)


def _with_vocabulary(model: ModelConfig) -> dict[str, Any]:
    """`model.architecture`; unless it says otherwise, a new model has as many embeddings as its tokenizer tokens."""
    settings: dict[str, Any] = dict(model.architecture or {})
    if "vocab_size" not in settings and model.tokenizer is not None:
        from nemo_lmpo.data.tokenizer import load_tokenizer

        settings["vocab_size"] = len(load_tokenizer(model.tokenizer, trust_remote_code=model.trust_remote_code))
    return settings
