"""Open a model wherever it lies: Hugging Face, `.nemo`, NeMo 2, a training checkpoint, or bare weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_lmpo.errors import CheckpointError, counted
from nemo_lmpo.formats.adapters import AdapterTensors, MergedSource, read_adapter_json
from nemo_lmpo.formats.architecture import (
    Architecture,
    architecture_from_hf,
    check_architecture,
    parse_json,
    read_architecture,
)
from nemo_lmpo.formats.archive import CheckpointFiles, DirectoryFiles, TarFiles, own_file
from nemo_lmpo.formats.chat_files import with_chat
from nemo_lmpo.formats.distributed_reader import DistributedCheckpoint
from nemo_lmpo.formats.export_record import check_record
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.fingerprint import weights_fingerprint
from nemo_lmpo.formats.huggingface import INDEX_FILE, SINGLE_FILE, HuggingFaceSource
from nemo_lmpo.formats.megatron import MegatronSource, stored_rows
from nemo_lmpo.formats.nemo import architecture_from_nemo, architecture_from_nemo2, nemo_fields
from nemo_lmpo.formats.older_transformers import older_tokenizer_config
from nemo_lmpo.formats.peft import PeftAdapter
from nemo_lmpo.formats.peft_files import PEFT_CONFIG
from nemo_lmpo.formats.sidecars import SideFile, is_sidecar, pruned_vocabulary, sentencepiece_files, side_files
from nemo_lmpo.formats.source import RandomSource, TensorSource, check_source
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.chat_record import ChatRecord, read_chat_record
from nemo_lmpo.runtime.safe_yaml import load_yaml

EMBEDDED_FOLDER = "huggingface"
"""Where this project keeps the Hugging Face files of a model inside a `.nemo`."""
NEMO_CONFIG = "model_config.yaml"
NEMO_WEIGHTS = "model_weights"
NEMO2_CONFIG = "context/model.yaml"
NEMO2_WEIGHTS = "weights"
_CONFIGS = ("config.json", "generation_config.json")
_STEP = re.compile(r"(iter|step)_\d+")
"""Where trainers keep the checkpoint of a step."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what it looks like, its tensors under Hugging Face names, and the files beside them."""

    kind: str
    """`huggingface`, `peft`, `nemo`, `nemo2`, `training` or `megatron`."""
    origin: str
    architecture: Architecture
    source: TensorSource
    sidecars: dict[str, SideFile] = field(default_factory=dict)
    """Hugging Face files besides the weights (config, tokenizer, chat template, ...) by name."""
    chat: ChatRecord | None = None
    """How a model that was trained here makes token ids of conversations; its side files say the same."""

    def side_file(self, name: str) -> bytes | None:
        """Content of a side file, or None."""
        return self.sidecars[name]() if name in self.sidecars else None

    def save_sidecars(self, directory: Path) -> None:
        """Write config, tokenizer and the like where `transformers` can load them."""
        for name, read in self.sidecars.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read())


def open_model(
    path: Path, *, config: Path | None = None, tokenizer: Path | None = None, as_written: bool = True
) -> ModelFiles:
    """Open ``path`` and check names and shapes of all tensors, without reading them.

    ``config`` is a Hugging Face `config.json` (or a directory with one, or a NeMo `model_config.yaml`) and
    ``tokenizer`` a directory of tokenizer files; both replace what the checkpoint itself has, and bare
    megatron-core checkpoints need the first. ``as_written``: a directory that was exported here has to be as it was
    (:mod:`nemo_lmpo.formats.export_record`).

    Raises:
        CheckpointError: nothing there, another format, or damaged; the message says which.
    """
    if as_written and path.is_dir():
        check_record(path)
    model = _open(path, config)
    check_architecture(model.architecture)
    if tokenizer is not None:
        model = _with_tokenizer(model, tokenizer)
    return model if model.chat is None else with_training_chat(model, model.chat)


def with_training_chat(model: ModelFiles, chat: ChatRecord) -> ModelFiles:
    """The model with side files that make token ids, and end answers, as it was trained.

    Raises:
        CheckpointError: one of its side files is damaged.
    """
    files = with_chat({name: read() for name, read in model.sidecars.items()}, chat, model.origin)
    return replace(model, sidecars={name: _constant(content) for name, content in files.items()}, chat=chat)


def _constant(content: bytes) -> SideFile:
    return lambda: content


def _with_tokenizer(model: ModelFiles, tokenizer: Path) -> ModelFiles:
    given = side_files(tokenizer)
    if not any(name.startswith(("token", "tekken", "vocab")) for name in given):
        raise CheckpointError(f"{tokenizer} holds no tokenizer; give the directory of one, with tokenizer.json")
    given.pop("config.json", None)
    return replace(model, sidecars=given | {name: model.sidecars[name] for name in _CONFIGS if name in model.sidecars})


def _open(path: Path, config: Path | None) -> ModelFiles:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a model directory or a .nemo file")
    if path.is_file():
        return _open_nemo(TarFiles(path), config)
    if (path / run_files.ARCHITECTURE).is_file():
        return _open_training(path, config)
    if (path / NEMO_CONFIG).is_file():
        return _open_nemo(DirectoryFiles(path), config)
    if (path / "context").is_dir() and (path / NEMO2_WEIGHTS).is_dir():
        return _open_nemo2(path, config)
    if (path / PEFT_CONFIG).is_file():
        return _open_peft(path)
    if (path / ".metadata").is_file() or (path / "metadata.json").is_file():
        return _open_bare(path, config)
    return _open_huggingface(path, config)


def _open_huggingface(path: Path, config: Path | None) -> ModelFiles:
    if not any((path / name).is_file() for name in ("config.json", SINGLE_FILE, INDEX_FILE)):
        raise CheckpointError(_no_model(path))
    sidecars = side_files(path)
    architecture = _given_architecture(config, sidecars) if config else read_architecture(path)
    source = HuggingFaceSource(path, tied=architecture.tie_word_embeddings, experts=architecture.family.experts)
    check_source(source, architecture)
    return ModelFiles("huggingface", str(path), architecture, source, sidecars)


def _no_model(path: Path) -> str:
    steps = sorted(found.name for found in path.glob("*_*") if _STEP.fullmatch(found.name) and found.is_dir())
    if steps:
        held = f"the checkpoints of {counted(len(steps), 'step')}"
        return f"{path} holds {held}; give one of them, for example {path / steps[-1]}"
    return (
        f"{path} is not a model: it holds neither config.json ({SINGLE_FILE}), nor {NEMO_CONFIG}, "
        f"nor {NEMO2_CONFIG}, nor {run_files.ARCHITECTURE}, nor .metadata; give the directory of a model"
    )


def _open_peft(path: Path) -> ModelFiles:
    if (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds adapters beside a model ({PEFT_CONFIG}), which transformers adds to it; merge them with "
            "peft (merge_and_unload), or move them elsewhere"
        )
    adapter = PeftAdapter(path)
    if not isinstance(adapter.base, str) or not adapter.base:
        raise CheckpointError(f"{path} does not name the model it adapts; set base_model_name_or_path in {PEFT_CONFIG}")
    try:
        found = find_model(adapter.base).path
        if (found / PEFT_CONFIG).is_file():
            raise CheckpointError(f"{found} is an adapter itself; merge it with peft's merge_and_unload first")
        base = open_model(found)
    except CheckpointError as error:
        raise CheckpointError(f"{path / PEFT_CONFIG}: base_model_name_or_path: {error}") from None
    own = side_files(path)
    return ModelFiles(
        "peft", str(path), base.architecture, MergedSource(base.source, adapter), {**base.sidecars, **own}
    )


def _open_training(path: Path, config: Path | None) -> ModelFiles:
    sidecars, chat = _side_files_of_training(path)
    architecture = _given_architecture(config, sidecars) if config else read_architecture(path, run_files.ARCHITECTURE)
    checkpoint = DistributedCheckpoint(DirectoryFiles(path), run_files.STATE)
    if (path / run_files.ADAPTER).is_file():
        source: TensorSource = _merged_source(path, checkpoint, architecture)
    else:
        source = MegatronSource(checkpoint, architecture)
    return ModelFiles("training", str(path), architecture, source, sidecars, chat)


def _side_files_of_training(path: Path) -> tuple[dict[str, SideFile], ChatRecord | None]:
    sidecars = side_files(path / run_files.TOKENIZER)
    sidecars["config.json"] = (path / run_files.ARCHITECTURE).read_bytes
    record = path / run_files.CHAT
    return sidecars, read_chat_record(record) if record.is_file() else None


def open_adapters(path: Path) -> tuple[AdapterTensors, Architecture]:
    """The adapters of a training checkpoint and the architecture of their base, which need not be there.

    Raises:
        CheckpointError: it holds whole weights, or is damaged.
    """
    if not (path / run_files.ADAPTER).is_file():
        raise CheckpointError(
            f"{path} holds no adapters ({run_files.ADAPTER} is not there); export it without --adapter"
        )
    architecture = read_architecture(path, run_files.ARCHITECTURE)
    checkpoint = DistributedCheckpoint(DirectoryFiles(path), run_files.STATE)
    return _adapter_tensors(path, checkpoint, architecture), architecture


def adapter_side_files(path: Path) -> dict[str, bytes]:
    """Tokenizer, chat template and end of turn of a training checkpoint of adapters, as they go beside the adapters."""
    sidecars, chat = _side_files_of_training(path)
    files = {name: read() for name, read in sidecars.items()}
    if chat is not None:
        files = with_chat(files, chat, str(path))
    # With the base's config beside them, adapters would look like a whole model.
    del files["config.json"]
    if "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = older_tokenizer_config(files["tokenizer_config.json"], str(path))
    return files


def _adapter_tensors(path: Path, checkpoint: DistributedCheckpoint, architecture: Architecture) -> AdapterTensors:
    return AdapterTensors(checkpoint, read_adapter_json(path / run_files.ADAPTER), architecture)


def _merged_source(path: Path, checkpoint: DistributedCheckpoint, architecture: Architecture) -> TensorSource:
    adapters = _adapter_tensors(path, checkpoint, architecture)
    description = adapters.description
    if description.base is None:
        return MergedSource(RandomSource(architecture, description.seed), adapters)
    base = Path(description.base)
    if not base.exists():
        raise CheckpointError(f"{path} holds adapters of {base}, which does not exist; bring their base there")
    if weights_fingerprint(base, architecture) != description.fingerprint:
        raise CheckpointError(
            f"{path} holds adapters of {base} as it was (hash {description.fingerprint[:16]}...), and its weights are "
            f"others now; bring the base that they were trained on"
        )
    return MergedSource(open_model(base).source, adapters)


def _open_nemo(files: CheckpointFiles, config: Path | None) -> ModelFiles:
    names = set(files.names())
    if NEMO_CONFIG not in names:
        raise CheckpointError(f"{files.origin} is not a NeMo file: it holds no {NEMO_CONFIG}; give a .nemo file")
    if not any(name.startswith(f"{NEMO_WEIGHTS}/") for name in names):
        legacy = sorted(name for name in names if name.endswith(".ckpt"))
        what = f"weights of an older format ({', '.join(legacy)})" if legacy else "no weights"
        raise CheckpointError(
            f"{files.origin} holds {what} instead of {NEMO_WEIGHTS}/; save it as a distributed checkpoint with NeMo"
        )
    checkpoint = DistributedCheckpoint(files, NEMO_WEIGHTS)
    nemo = _yaml(files.read(NEMO_CONFIG), f"{files.origin}: {NEMO_CONFIG}")
    fields = nemo_fields(nemo, f"{files.origin}: {NEMO_CONFIG}")
    folder = f"{EMBEDDED_FOLDER}/"
    embedded = [name.removeprefix(folder) for name in names if name.startswith(folder)]
    sidecars: dict[str, SideFile] = {
        name: partial(files.read_own, folder + name) for name in embedded if is_sidecar(name)
    }
    if config:
        architecture = _given_architecture(config, sidecars)
    elif "config.json" in sidecars:
        origin = f"{files.origin}: {folder}config.json"
        architecture = architecture_from_hf(parse_json(sidecars["config.json"](), origin), origin)
    else:
        sidecars.update(_nemo_tokenizer(files, names, fields))
        rows = pruned_vocabulary(sidecars, stored_rows(checkpoint), _multiple(fields), files.origin)
        architecture = architecture_from_nemo(nemo, rows, fields.origin)
    return ModelFiles("nemo", files.origin, architecture, MegatronSource(checkpoint, architecture), sidecars)


def _multiple(fields: Fields) -> int:
    """What the rows of the vocabulary were padded to a multiple of."""
    sizes = (("make_vocab_size_divisible_by", 128), ("tensor_model_parallel_size", 1))
    return math.prod(fields.size(name, absent=usual, null=usual) for name, usual in sizes)


def _nemo_tokenizer(files: CheckpointFiles, names: set[str], fields: Fields) -> dict[str, SideFile]:
    """Tokenizer files of a `.nemo` that NeMo wrote: it keeps the SentencePiece model only."""
    section = Fields(fields.values.get("tokenizer") or {}, f"{fields.origin}: tokenizer").values
    artifact = str(section.get("model") or "").removeprefix("nemo:")
    if artifact in names:
        return sentencepiece_files(files.read_own(artifact), f"{files.origin}: {artifact}")
    kind = section.get("type")
    if section.get("library") == "huggingface" and kind and Path(str(kind)).is_dir():
        return {name: read for name, read in side_files(Path(str(kind))).items() if name not in _CONFIGS}
    return {}


def _open_nemo2(path: Path, config: Path | None) -> ModelFiles:
    checkpoint = DistributedCheckpoint(DirectoryFiles(path), NEMO2_WEIGHTS)
    sidecars = side_files(path / "context" / "nemo_tokenizer")
    sidecars.pop("config.json", None)
    generation = path / "context/artifacts/generation_config.json"
    if generation.is_file():
        sidecars["generation_config.json"] = own_file(path, "context/artifacts/generation_config.json").read_bytes
    if config:
        architecture = _given_architecture(config, sidecars)
    else:
        if not (path / NEMO2_CONFIG).is_file():
            raise CheckpointError(f"{path} has no {NEMO2_CONFIG}; give the model's Hugging Face config with --config")
        origin = str(path / NEMO2_CONFIG)
        model = _yaml((path / NEMO2_CONFIG).read_bytes(), origin)
        settings = Fields(model.get("config"), f"{origin}: config")
        multiple = settings.size("make_vocab_size_divisible_by", absent=128, null=128)
        rows = pruned_vocabulary(sidecars, stored_rows(checkpoint), multiple, str(path))
        architecture = architecture_from_nemo2(model, rows, origin)
    return ModelFiles("nemo2", str(path), architecture, MegatronSource(checkpoint, architecture), sidecars)


def _open_bare(path: Path, config: Path | None) -> ModelFiles:
    checkpoint = DistributedCheckpoint(DirectoryFiles(path))
    if config is None:
        raise CheckpointError(
            f"{path} is a bare distributed checkpoint, which does not describe its model; "
            "give the model's Hugging Face config with --config"
        )
    sidecars = side_files(config)
    architecture = _given_architecture(config, sidecars, rows=stored_rows(checkpoint))
    return ModelFiles("megatron", str(path), architecture, MegatronSource(checkpoint, architecture), sidecars)


def _given_architecture(config: Path, sidecars: dict[str, SideFile], rows: int | None = None) -> Architecture:
    """The architecture that the user named; a Hugging Face config also replaces the checkpoint's own."""
    path = config / "config.json" if config.is_dir() else config
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist as a file; give a config.json, a directory with one, or a {NEMO_CONFIG}"
        )
    if path.suffix in (".yaml", ".yml"):
        if rows is None:
            raise CheckpointError(f"{path}: give a Hugging Face config.json here, which holds the vocabulary's size")
        return architecture_from_nemo(_yaml(path.read_bytes(), str(path)), rows, str(path))
    sidecars["config.json"] = path.read_bytes
    return read_architecture(path.parent, path.name)


def _yaml(text: bytes, origin: str) -> dict[str, Any]:
    try:
        content = load_yaml(text)
    except ValueError as error:
        raise CheckpointError(f"{origin} is not plain YAML ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{origin} holds no settings; restore the file")
    return content
