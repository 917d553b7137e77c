"""The command `nemo-lmpo convert`; the scripts in `conversion/` call its subcommands, too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.errors import CheckpointError, ConfigError, shown
from nemo_lmpo.formats.find_model import MODEL_HELP, find_model
from nemo_lmpo.runtime.command import answer, run_parser

if TYPE_CHECKING:
    from nemo_lmpo.formats.conversion import Conversion
    from nemo_lmpo.formats.model_files import ModelFiles

_DTYPES = ("bf16", "fp16", "fp32")
DEFAULT_TOLERANCE = 1e-4
_NOTHING_LEFT = "nothing was left behind"


def hf_to_nemo(arguments: Sequence[str] | None = None) -> int:
    """Convert a Hugging Face model to NeMo; returns the exit status."""
    return _run_alone("hf-to-nemo", "convert_hf_to_nemo", arguments)


def nemo_to_hf(arguments: Sequence[str] | None = None) -> int:
    """Convert any NeMo form to a Hugging Face directory; returns the exit status."""
    return _run_alone("nemo-to-hf", "convert_nemo_to_hf", arguments)


def verify(arguments: Sequence[str] | None = None) -> int:
    """Compare a Hugging Face model with a converted one; returns the exit status."""
    return _run_alone("verify", "verify_conversion", arguments)


def _run_alone(name: str, prog: str, arguments: Sequence[str] | None) -> int:
    """A subcommand as a program of its own, for the scripts in `conversion/`."""
    add_options, about = _SUBCOMMANDS[name]
    parser = argparse.ArgumentParser(prog=prog, description=about)
    add_options(parser)
    return run_parser(parser, arguments)


def build_parser(prog: str) -> argparse.ArgumentParser:
    """All subcommands."""
    parser = argparse.ArgumentParser(prog=prog, description="Convert models between Hugging Face and NeMo.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_options, about) in _SUBCOMMANDS.items():
        add_options(commands.add_parser(name, help=about.partition(";")[0].rstrip("."), description=about))
    return parser


def _add_hf_to_nemo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", "--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--output", required=True, type=Path, metavar="PATH", help="FILE.nemo, or a directory")
    _add_conversion(parser)
    parser.set_defaults(run=_hf_to_nemo, when_interrupted=_NOTHING_LEFT)


def _add_nemo_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", "--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="Hugging Face directory to write")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="the model's config.json, or a directory with one; needed for bare distributed checkpoints",
    )
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer files from here")
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, metavar="GB", help="size of one safetensors file (default: 5)"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write the adapters of a LoRA run's checkpoint for peft and vLLM, instead of the merged model",
    )
    _add_conversion(parser)
    parser.set_defaults(
        run=lambda options: _adapter_to_peft(options) if options.adapter else _nemo_to_hf(options),
        when_interrupted=_NOTHING_LEFT,
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf", required=True, metavar="MODEL", help="Hugging Face directory or hub name")
    parser.add_argument("--nemo", required=True, metavar="MODEL", help="run, checkpoint, .nemo or NeMo 2 directory")
    parser.add_argument("--config", type=Path, metavar="PATH", help="config.json for a bare distributed checkpoint")
    parser.add_argument("--tensors-only", action="store_true", help="do not run the models")
    _add_comparison(parser)
    parser.set_defaults(run=_verify_given)


_SUBCOMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "hf-to-nemo": (
        _add_hf_to_nemo,
        "Convert a Hugging Face Llama, Mistral or Qwen to NeMo; writes a .nemo file, or its tree as a directory.",
    ),
    "nemo-to-hf": (
        _add_nemo_to_hf,
        "Convert a NeMo model to a Hugging Face directory; the input is a .nemo file, a NeMo 2 directory, a training "
        "checkpoint of this project, or a bare megatron-core distributed checkpoint.",
    ),
    "verify": (
        _add_verify,
        "Compare a Hugging Face model with a converted one; compares every tensor and the logits of a fixed set of "
        "prompts, and exits with status 1 if any difference is larger than the tolerance.",
    ),
}


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance",
        type=float,
        default=DEFAULT_TOLERANCE,
        help=f"largest absolute difference allowed in float32 (default: {DEFAULT_TOLERANCE})",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_conversion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="store the weights in this dtype (default: as they are)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the mapping, write nothing")
    parser.add_argument("--verify", action="store_true", help="compare tensors and logits after writing")
    _add_comparison(parser)


def _hf_to_nemo(options: argparse.Namespace) -> int:
    from nemo_lmpo.formats.conversion import plan, tokens_not_in_nemo, write_nemo
    from nemo_lmpo.formats.export_record import check_weights
    from nemo_lmpo.formats.model_files import open_model
    from nemo_lmpo.formats.nemo import nemo_applies_other_scaling

    found = find_model(options.input)
    path, hub_name = found.path, found.hub_name
    model = open_model(path)
    if model.kind in ("nemo", "nemo2", "megatron"):
        raise CheckpointError(f"{model.origin} is a NeMo model already; to get a Hugging Face one, use nemo-to-hf")
    work = plan(model, options.output, options.dtype)
    if not _ready(work, [path], options):
        return 0
    check_weights(path)
    if nemo_applies_other_scaling(model.architecture):
        _say(
            f"warning: NeMo reads this model's rotary scaling ({model.architecture.rope_scaling}) from 2.2 on; "
            "NeMo 2.0, 2.1 and NeMo-Aligner's pinned version apply factor 8 instead, and older ones do not scale"
        )
    if beyond := tokens_not_in_nemo(model):
        named = ", ".join(map(shown, beyond[:3]))
        _say(
            f"warning: tokenizer.model lacks {len(beyond)} tokens of the tokenizer ({named}); "
            "NeMo would cut them into pieces, so the .nemo names the Hugging Face tokenizer "
            f"{hub_name or path.resolve()} instead"
        )
    with _progress(work.num_tensors, options.quiet, "writing") as advance:
        write_nemo(work, hub_name=hub_name, overwrite=options.overwrite, progress=advance)
    _say(f"wrote {options.output}")
    return _verify(path, options.output, options) if options.verify else 0


def _nemo_to_hf(options: argparse.Namespace) -> int:
    from nemo_lmpo.answers.trained_model import open_trained
    from nemo_lmpo.formats.conversion import plan, write_huggingface

    if not 0 < options.max_shard_gb < float("inf"):
        raise ConfigError(f"--max-shard-gb {options.max_shard_gb} is not a size; give for example 5")
    path = find_model(options.input).path
    model = open_trained(path, config=options.config, tokenizer=options.tokenizer)
    if model.kind == "huggingface":
        raise CheckpointError(f"{model.origin} is a Hugging Face model already; to get a NeMo one, use hf-to-nemo")
    work = plan(model, options.output, options.dtype)
    given = [given for given in (path, options.config, options.tokenizer) if given is not None]
    if not _ready(work, given, options):
        return 0
    if not any(name.startswith("tokenizer") for name in model.sidecars):
        _say(f"warning: {model.origin} holds no tokenizer files; add them with --tokenizer DIR")
    with _progress(work.num_tensors, options.quiet, "writing") as advance:
        shard = int(options.max_shard_gb * 1e9)
        write_huggingface(work, max_shard_bytes=shard, overwrite=options.overwrite, progress=advance)
    _say(f"wrote {options.output}")
    return _verify(options.output, path, options, config=options.config) if options.verify else 0


def _adapter_to_peft(options: argparse.Namespace) -> int:
    from nemo_lmpo.formats.adapters import named_base, write_peft
    from nemo_lmpo.formats.export_record import write_record
    from nemo_lmpo.formats.model_files import adapter_side_files, open_adapters
    from nemo_lmpo.formats.outputs import check_output, complete_or_not_at_all

    path = find_model(options.input).path
    adapters, architecture = open_adapters(path)
    base, _ = named_base(adapters.description, str(path))
    files = adapter_side_files(path)
    check_output(options.output, [path], overwrite=options.overwrite)
    if not options.dry_run:
        with complete_or_not_at_all(options.output, overwrite=options.overwrite) as directory:
            write_peft(directory, adapters, architecture, files)
            write_record(directory)
        _say(f"wrote {options.output}: adapters of rank {adapters.description.rank} for {base}")
    if Path(base).exists() and not (Path(base) / "config.json").is_file():
        _say(f"warning: peft loads no {base}; convert it, and name the result in adapter_config.json")
    return 0


def _verify_given(options: argparse.Namespace) -> int:

    hf_path = find_model(options.hf).path
    nemo_path = find_model(options.nemo).path
    return _verify(hf_path, nemo_path, options, config=options.config, tensors_only=options.tensors_only)


def _verify(
    hf: Path, nemo: Path, options: argparse.Namespace, *, config: Path | None = None, tensors_only: bool = False
) -> int:
    from nemo_lmpo.convert.verify import verify_models
    from nemo_lmpo.formats.export_record import check_weights
    from nemo_lmpo.formats.model_files import open_model

    reference = open_model(hf)
    _expect(reference, "huggingface", "--hf takes a Hugging Face model")
    check_weights(hf)
    converted = open_model(nemo, config=config)
    with _progress(len(reference.source.names()), options.quiet, "comparing") as advance:
        result = verify_models(
            reference, converted, tolerance=options.tolerance, tensors_only=tensors_only, progress=advance
        )
    for line in result.lines:
        _say(line)
    return 0 if result.passed else 1


def _expect(model: ModelFiles, kind: str, remedy: str) -> None:
    if model.kind != kind:
        raise CheckpointError(f"{model.origin} is a {model.kind} model, not a {kind} one; {remedy}")


def _ready(work: Conversion, inputs: list[Path], options: argparse.Namespace) -> bool:
    """Check the output; with `--dry-run`, print what would be done and answer False."""
    from nemo_lmpo.formats.conversion import describe
    from nemo_lmpo.runtime.files import format_bytes

    work.check(inputs, overwrite=options.overwrite)
    if options.dry_run:
        for line in describe(work):
            _say(line)
    _say(
        f"{work.model.kind} {work.model.origin} -> {work.output}: {work.model.architecture.model_type}, "
        f"{work.num_tensors} tensors, {str(work.dtype).removeprefix('torch.')}, {format_bytes(work.num_bytes)}"
    )
    return not options.dry_run


@contextmanager
def _progress(total: int, quiet: bool, what: str) -> Iterator[Callable[[str], None]]:
    from tqdm import tqdm

    # disable=None: no bar where the output is not a terminal.
    with tqdm(total=total, desc=what, unit="tensor", disable=True if quiet else None, leave=False) as bar:

        def advance(name: str) -> None:
            bar.update()

        yield advance


def _say(line: str) -> None:
    answer(line)
    sys.stdout.flush()
