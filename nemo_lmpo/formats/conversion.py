"""Convert a whole model: Hugging Face to NeMo, and any NeMo form to Hugging Face."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_lmpo.errors import CheckpointError, UserError, printable
from nemo_lmpo.formats.architecture import architecture_to_hf, parse_json
from nemo_lmpo.formats.distributed_writer import write_distributed_checkpoint
from nemo_lmpo.formats.export_record import EDITABLE, foreign_files, write_record
from nemo_lmpo.formats.huggingface import MAX_SHARD_BYTES, write_safetensors
from nemo_lmpo.formats.mapping import hf_shapes, megatron_shape, part_shapes, rules, stacked
from nemo_lmpo.formats.model_files import EMBEDDED_FOLDER, NEMO_CONFIG, NEMO_WEIGHTS, ModelFiles, open_model
from nemo_lmpo.formats.nemo import nemo_config
from nemo_lmpo.formats.older_transformers import older_config, older_tokenizer_config
from nemo_lmpo.formats.outputs import check_disk, check_output, complete_or_not_at_all
from nemo_lmpo.formats.sidecars import sentencepiece_model, special_token_ids, tokens_beyond_sentencepiece
from nemo_lmpo.formats.sinks import DirectorySink, Sink, TarSink
from nemo_lmpo.formats.source import get_fitting
from nemo_lmpo.formats.token_files import TOKEN_FILES
from nemo_lmpo.runtime.files import replace_file

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PRECISION = {torch.bfloat16: "bf16", torch.float16: "16", torch.float32: "32"}
_SLACK_BYTES = 64 * 1024 * 1024
"""Headers, metadata and small files besides the tensors, estimated from above."""

_logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion will do; nothing is written yet."""

    model: ModelFiles
    output: Path
    dtype: torch.dtype

    @property
    def num_tensors(self) -> int:
        """Hugging Face tensors that will be converted."""
        return len(tensor_names(self.model))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors in the target dtype."""
        return self.model.architecture.num_parameters() * self.dtype.itemsize

    def check(self, inputs: list[Path], *, overwrite: bool) -> None:
        """Refuse before any work is done.

        Raises:
            CheckpointError: the output is in the way of something, or the disk is too small.
        """
        check_output(self.output, inputs, overwrite=overwrite)
        side = sum(len(self.model.side_file(name) or b"") for name in self.model.sidecars)
        check_disk(self.output, self.num_bytes + side + _SLACK_BYTES)


def plan(model: ModelFiles, output: Path, dtype: str | None = None) -> Conversion:
    """Settle the target dtype: the one named, or the widest that the model has.

    Raises:
        CheckpointError: an unknown name, or a dtype that models are not stored in.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise CheckpointError(f"dtype '{dtype}' is not supported; supported: {', '.join(_DTYPES)}")
    if dtype is not None:
        return Conversion(model, output, _DTYPES[dtype])
    found = functools.reduce(torch.promote_types, {model.source.dtype(name) for name in tensor_names(model)})
    if found not in _PRECISION:
        raise CheckpointError(f"{model.origin} is stored as {found}; name a target with --dtype, for example bf16")
    return Conversion(model, output, found)


def tensor_names(model: ModelFiles) -> list[str]:
    """The Hugging Face tensors that belong to the architecture."""
    return list(hf_shapes(model.architecture))


def describe(plan: Conversion) -> list[str]:
    """The mapping, one line for each stored tensor."""
    architecture = plan.model.architecture
    lines = []
    for rule in rules(architecture):
        counts = dict(zip(("{layer}", "{expert}"), stacked(rule, architecture), strict=False))
        names = " + ".join(rule.hf)
        for what, count in counts.items():
            names = names.replace(what, f"{{0..{count - 1}}}")
        shapes = " + ".join(str(list(shape)) for shape in part_shapes(rule, architecture))
        whole = [*stacked(rule, architecture), *megatron_shape(rule, architecture)]
        lines.append(f"{names} {shapes} <-> {rule.megatron} {whole} ({rule.layout.value})")
    return lines


def write_nemo(
    plan: Conversion, *, hub_name: str | None = None, overwrite: bool = False, progress: Progress = lambda name: None
) -> None:
    """Write a `.nemo` archive, or the same tree as a directory if the output does not end in `.nemo`.

    Besides what NeMo reads, the tree keeps the Hugging Face files of the model unchanged, so that converting
    back restores them. ``hub_name`` is what NeMo shall load a tokenizer by that it cannot keep itself.

    Raises:
        CheckpointError: the output has appeared meanwhile and is not to be overwritten; a damaged input.
    """
    archive = plan.output.suffix == ".nemo"
    with complete_or_not_at_all(plan.output, overwrite=overwrite) as temporary:
        sink: Sink = TarSink(temporary) if archive else DirectorySink(temporary)
        _write_nemo_tree(sink, plan, hub_name, progress)
        sink.close()


def _write_nemo_tree(sink: Sink, plan: Conversion, hub_name: str | None, progress: Progress) -> None:
    model = plan.model
    section, artifacts = _nemo_tokenizer(model, hub_name)
    config = nemo_config(model.architecture, _PRECISION[plan.dtype], section)
    sink.add(NEMO_CONFIG, yaml.safe_dump(config, sort_keys=False).encode())
    for name, content in artifacts.items():
        sink.add(name, content)
    for name, content in hf_files(plan).items():
        sink.add(f"{EMBEDDED_FOLDER}/{name}", content)
    write_distributed_checkpoint(
        sink,
        NEMO_WEIGHTS,
        model.source,
        model.architecture,
        prefix="model.",
        dtype=plan.dtype,
        progress=progress,
    )


def tokens_not_in_nemo(model: ModelFiles) -> list[str]:
    """Tokens without which a SentencePiece model would be another tokenizer, so that NeMo cannot keep it in the file.

    Raises:
        CheckpointError: the tokenizer's files are damaged.
    """
    names = [name for name in ("tokenizer.json", "tokenizer.model", *TOKEN_FILES) if name in model.sidecars]
    return tokens_beyond_sentencepiece({name: model.side_file(name) or b"" for name in names}, model.origin)


def _nemo_tokenizer(model: ModelFiles, hub_name: str | None) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The `tokenizer` section, and the files that it refers to."""
    section: dict[str, Any] = {
        "library": "huggingface",
        "type": hub_name or str(Path(model.origin).resolve()),
        "use_fast": True,
        "model": None,
        "vocab_file": None,
        "merge_file": None,
        "delimiter": None,
    }
    content = model.side_file("tokenizer.model")
    # Llama 3 calls a file of another format by the same name; tokenizer.json is what describes it.
    if content is None or sentencepiece_model(content) is None or tokens_not_in_nemo(model):
        return section, {}
    name = f"{hashlib.sha256(content).hexdigest()[:32]}_tokenizer.model"
    changed = {"library": "sentencepiece", "type": None, "model": f"nemo:{name}", "sentencepiece_legacy": False}
    section.pop("use_fast")
    return {**section, **changed}, {name: content}


def write_huggingface(
    plan: Conversion,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda name: None,
    add_files: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write a Hugging Face directory that `AutoModelForCausalLM` and `AutoTokenizer` load.

    ``add_files`` writes further files into the directory before it appears.

    Raises:
        CheckpointError: as for :func:`write_nemo`.
    """
    with complete_or_not_at_all(plan.output, overwrite=overwrite) as temporary:
        sink = DirectorySink(temporary)
        for name, content in hf_files(plan).items():
            sink.add(name, content)
        written = write_safetensors(
            temporary, plan.model.source, dtype=plan.dtype, max_shard_bytes=max_shard_bytes, progress=progress
        )
        write_record(temporary, written=written)
        add_files(temporary)
        sink.close()


def holds(plan: Conversion) -> bool:
    """Whether the output is a model with the very weights that would be written."""
    model, dtype = plan.model, plan.dtype
    try:
        there = open_model(plan.output, as_written=False)
    except UserError:
        return False
    return there.architecture == model.architecture and all(
        there.source.dtype(name) == dtype
        and there.source.get(name).equal(get_fitting(model.source, name, dtype).to(dtype))
        for name in tensor_names(model)
    )


def renew_side_files(plan: Conversion) -> None:
    """Give an output that :func:`holds` the side files of today, and say which ones it replaces.

    Somebody may have edited them, and an earlier version may have written other ones. A process that is killed
    meanwhile leaves an output that its record refuses, until the same is done again.

    Raises:
        CheckpointError: a file was added that decides token ids or templates; nothing is changed.
    """
    output, files = plan.output, hf_files(plan)
    earlier, added = foreign_files(output, files)
    if added:
        raise CheckpointError(
            f"{output}: {printable(added[0], 200)} is not what was written there: it was added, and would change what "
            "the export says of the run; remove it, or give another output"
        )
    halves = (*output.glob(".*.tmp"), *output.glob("*/.*.tmp"))  # of a process that was killed
    templates = output.glob("additional_chat_templates/*.jinja")
    for path in (*halves, *(path for path in templates if path.relative_to(output).as_posix() not in files)):
        path.unlink()
    for name in earlier:
        (output / name).unlink(missing_ok=True)
    write_record(output, files)
    # First what the record lets users set: while that is the old one, another file makes the record refuse it.
    for name, content in sorted(files.items(), key=lambda file: file[0] not in EDITABLE):
        there = (output / name).read_bytes() if (output / name).is_file() else None
        if there == content:
            continue
        if there is not None:
            _logger.warning(
                "%s: %s was edited, or written by another version; it is replaced by what the model gives", output, name
            )
        (output / name).parent.mkdir(exist_ok=True)
        replace_file(output / name, content)


def hf_files(plan: Conversion) -> dict[str, bytes]:
    """Side files by name, as a Hugging Face directory gets them.

    A converted model's are unchanged, except for a config that says another dtype or is missing; a
    trained one's say how it was trained (:mod:`nemo_lmpo.formats.chat_files`).
    """
    files = {name: plan.model.side_file(name) or b"" for name in sorted(plan.model.sidecars)}
    files["config.json"] = _hf_config(plan, files)
    if plan.model.kind == "training" and "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = older_tokenizer_config(files["tokenizer_config.json"], plan.model.origin)
    return files


def _hf_config(plan: Conversion, files: dict[str, bytes]) -> bytes:
    dtype = str(plan.dtype).removeprefix("torch.")
    given = files.get("config.json")
    if given is None:
        config = architecture_to_hf(plan.model.architecture)
    else:
        config = parse_json(given, f"{plan.model.origin}: config.json")
    made = given is None or plan.model.kind == "training"
    changed = older_config(config, plan.model.architecture) if made else dict(config)
    key = "dtype" if "dtype" in config else "torch_dtype"
    if made or key in config:
        changed[key] = dtype
    if made:
        # A config that was made from an architecture says nothing of tokens.
        ids = special_token_ids(files, plan.model.origin)
        changed.update({name: number for name, number in ids.items() if name not in changed})
    if "quantization_config" in changed:
        _logger.warning(
            "%s: quantization_config of config.json is left out, as the weights are written in %s",
            plan.model.origin,
            dtype,
        )
        del changed["quantization_config"]
    if given is not None and changed == config:
        return given
    return (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
