"""Models on disk in every form, and ways to damage them; a seed decides what is damaged and how."""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf
from nemo_lmpo.formats.architecture import read_architecture
from nemo_lmpo.formats.distributed_writer import write_distributed_checkpoint
from nemo_lmpo.formats.huggingface import HuggingFaceSource
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.formats.nemo import nemo_config
from nemo_lmpo.formats.sinks import DirectorySink
from tests.unit.formats import tiny_models as tiny

LONGEST_SECONDS = 40
VALUES: tuple[object, ...] = (
    *(None, True, False, -1, 0, 1, 3, 4.7, 0.0, -1e-5, 10**9, 10**30, float("nan"), float("inf")),
    *("", "four", "1e-5x", "nan", "false", [], [4], ["a", 0], [-1, -1], [0, 0], {}, {"a": 1}, "x" * 100_000),
)
TEXTS: tuple[bytes, ...] = (
    *(b"", b"[]", b"null", b"{", b"5", b'"text"', b"\xff\xfe\x00", b"\0" * 100, b"{]", b"a: b: c", b"- 1\n- 2"),
    *(b"[" * 200_000, b"{" * 3000, b'{"a":' * 5000, b'{"hidden_size": ' + b"9" * 5000 + b"}", b"1999-99-99"),
    b"a: &a [x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\nd: &d [*c, *c, *c, *c]\nnum_layers: *d",
    b"!!python/object/apply:os.getcwd []",
)


@dataclass(frozen=True)
class Case:
    """One damaged model: how it is made from whole ones, and how it is converted."""

    name: str
    make: Callable[[dict[str, Path], Path], Path]
    """Makes the damaged copy in a new directory and gives its path."""
    must_be_right: bool = False
    """If the conversion succeeds, the tensors are those of the whole model."""


def whole_models(directory: Path) -> dict[str, Path]:
    """The same tiny model in each form: `hf`, `sharded`, `archive`, `tree`, `foreign` (as NeMo writes it), `nemo2`."""
    models = {"hf": tiny.save("llama3", directory / "hf")}
    models["sharded"] = tiny.save("llama3", directory / "sharded", max_shard_size="200KB")
    for name, output in (("archive", "model.nemo"), ("tree", "tree"), ("foreign", "foreign")):
        models[name] = directory / output
        assert hf_to_nemo(["--input", str(models["hf"]), "--output", str(models[name]), "--quiet"]) == 0
    shutil.rmtree(models["foreign"] / "huggingface")
    (models["foreign"] / "model_weights" / "checksums.json").unlink()
    models["nemo2"] = _nemo2(models["hf"], directory / "nemo2")
    return models


def _nemo2(hf: Path, directory: Path) -> Path:
    architecture = read_architecture(hf)
    sink = DirectorySink(directory)
    source = HuggingFaceSource(hf)
    write_distributed_checkpoint(sink, "weights", source, architecture, prefix="module.", dtype=torch.float32)
    sink.close()
    ours = nemo_config(architecture, "32", {})
    same = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "rotary_base")
    settings = {
        **{name: ours[name] for name in (*same, "layernorm_epsilon", "init_method_std", "kv_channels")},
        **{"seq_length": 256, "vocab_size": 259, "normalization": "RMSNorm", "gated_linear_unit": True},
        **{"share_embeddings_and_output_weights": False, "make_vocab_size_divisible_by": 128, "window_size": None},
        **{"add_qkv_bias": False, "qk_layernorm": False, "rotary_percent": 1.0, "scale_factor": None},
        "activation_func": {"_call_": False, "_target_": "torch.nn.functional.silu"},
    }
    context = directory / "context"
    (context / "nemo_tokenizer").mkdir(parents=True)
    target = "nemo.collections.llm.gpt.model.llama.LlamaModel"
    (context / "model.yaml").write_text(yaml.safe_dump({"_target_": target, "config": settings}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, context / "nemo_tokenizer" / name)
    return directory


def cases() -> list[Case]:
    """All of them, always the same."""
    random_numbers = random.Random(12)
    return [*_values(random_numbers), *_texts(), *_bytes(random_numbers), *_cut(), *_special()]


def _copy(model: Path, directory: Path) -> Path:
    target = directory / model.name
    if model.is_dir():
        shutil.copytree(model, target)
    else:
        shutil.copy(model, target)
    return target


_SETTINGS: dict[str, tuple[str, Callable[[str], Any], Callable[[Any], str]]] = {
    "hf": ("config.json", json.loads, json.dumps),
    "foreign": ("model_config.yaml", yaml.safe_load, yaml.safe_dump),
    "nemo2": ("context/model.yaml", yaml.safe_load, yaml.safe_dump),
}
_FIELDS = {
    "hf": (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("tie_word_embeddings", "initializer_range", "hidden_act", "attention_bias", "mlp_bias", "rope_theta"),
        *("rope_parameters.rope_theta", "rope_parameters.rope_type", "rope_parameters.factor"),
    ),
    "foreign": (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
        *("max_position_embeddings", "layernorm_epsilon", "rotary_base", "make_vocab_size_divisible_by", "tokenizer"),
        *("tensor_model_parallel_size", "share_embeddings_and_output_weights", "scale_positional_embedding"),
        *("seq_len_interpolation_factor", "window_size", "init_method_std", "qkv_bias", "qk_layernorm", "activation"),
        *("tokenizer.model", "tokenizer.type", "scale_factor", "old_context_len", "rotary_interleaved", "model"),
    ),
    "nemo2": (
        *("_target_", "config", "config.num_layers", "config.hidden_size", "config.ffn_hidden_size"),
        *("config.num_attention_heads", "config.num_query_groups", "config.kv_channels", "config.seq_length"),
        *("config.rotary_base", "config.layernorm_epsilon", "config.init_method_std", "config.vocab_size"),
        *("config.share_embeddings_and_output_weights", "config.make_vocab_size_divisible_by", "config.window_size"),
        *("config.activation_func", "config.normalization", "config.rotary_percent", "config.scale_factor"),
        *("config.seq_len_interpolation_factor", "config.add_qkv_bias", "config.qk_layernorm"),
    ),
}


def _values(random_numbers: random.Random) -> Iterator[Case]:
    for form, fields in _FIELDS.items():
        for field in fields:
            for value in random_numbers.sample(VALUES, 6):
                yield Case(f"{form}: {field}={str(value)[:20]!r}", _with_value(form, field, value))


def _with_value(form: str, field: str, value: object) -> Callable[[dict[str, Path], Path], Path]:
    def make(models: dict[str, Path], directory: Path) -> Path:
        model = _copy(models[form], directory)
        name, load, dump = _SETTINGS[form]
        content = load((model / name).read_text())
        *parents, last = field.split(".")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
        (model / name).write_text(dump(content))
        return model

    return make


def _texts() -> Iterator[Case]:
    places = {
        "hf": ("config.json", "tokenizer.json", "generation_config.json"),
        "sharded": ("model.safetensors.index.json",),
        "foreign": ("model_config.yaml", "model_weights/metadata.json", "model_weights/.metadata"),
        "tree": ("huggingface/config.json", "model_weights/checksums.json"),
        "nemo2": ("context/model.yaml", "context/nemo_tokenizer/tokenizer.json"),
    }
    for form, names in places.items():
        for name in names:
            for number, text in enumerate(TEXTS):
                yield Case(f"{form}: {name} is text {number}", _replaced(form, name, text))


def _replaced(form: str, name: str, text: bytes) -> Callable[[dict[str, Path], Path], Path]:
    def make(models: dict[str, Path], directory: Path) -> Path:
        model = _copy(models[form], directory)
        (model / name).write_bytes(text)
        return model

    return make


def _bytes(random_numbers: random.Random) -> Iterator[Case]:
    """Changed bytes: anywhere in an archive, in the catalog of a checkpoint, in the header of safetensors."""
    for form, name, count, limit, right in (
        ("archive", "", 60, None, True),
        ("archive", "", 30, 20_000, True),
        ("tree", "model_weights/.metadata", 60, None, True),
        ("foreign", "model_weights/.metadata", 30, None, False),
        ("hf", "model.safetensors", 40, 4000, False),
    ):
        for _ in range(count):
            seed = random_numbers.random()
            yield Case(
                f"{form}: {name or 'archive'} with changed bytes {seed}", _flipped(form, name, seed, limit), right
            )


def _flipped(form: str, name: str, seed: float, limit: int | None) -> Callable[[dict[str, Path], Path], Path]:
    def make(models: dict[str, Path], directory: Path) -> Path:
        model = _copy(models[form], directory)
        path = model / name if name else model
        content, numbers = bytearray(path.read_bytes()), random.Random(seed)
        for _ in range(numbers.choice((1, 1, 3, 20))):
            content[numbers.randrange(min(limit or len(content), len(content)))] ^= numbers.randrange(1, 256)
        path.write_bytes(content)
        return model

    return make


def _cut() -> Iterator[Case]:
    for form, name in (
        *(("archive", ""), ("tree", "model_weights/.metadata"), ("tree", "model_weights/__0_0.distcp")),
        *(("hf", "model.safetensors"), ("foreign", "model_config.yaml")),
    ):
        for part in (0.0, 0.01, 0.3, 0.7, 0.99):
            yield Case(f"{form}: {name or 'archive'} cut to {part}", _shortened(form, name, part))


def _shortened(form: str, name: str, part: float) -> Callable[[dict[str, Path], Path], Path]:
    def make(models: dict[str, Path], directory: Path) -> Path:
        model = _copy(models[form], directory)
        path = model / name if name else model
        content = path.read_bytes()
        path.write_bytes(content[: int(part * len(content))])
        return model

    return make


def _special() -> Iterator[Case]:
    """Files that are none, and members that an archive may not have."""
    import os

    for form, name in (
        *(("hf", "config.json"), ("hf", "model.safetensors"), ("foreign", "model_config.yaml")),
        *(("tree", "model_weights/.metadata"), ("tree", "model_weights/__0_0.distcp"), ("hf", "tokenizer.json")),
    ):

        def pipe(models: dict[str, Path], directory: Path, form: str = form, name: str = name) -> Path:
            model = _copy(models[form], directory)
            (model / name).unlink()
            os.mkfifo(model / name)
            return model

        yield Case(f"{form}: {name} is a pipe", pipe)
    for number, info in enumerate(("/etc/x", "../x", "x" * 300, "model_config.yaml", "model_weights/.metadata")):

        def member(models: dict[str, Path], directory: Path, info: str = info) -> Path:
            model = _copy(models["archive"], directory)
            with tarfile.open(model, "a:") as archive:
                archive.addfile(tarfile.TarInfo(info), io.BytesIO())
            return model

        yield Case(f"archive: further member {number}", member)


class TooLong(BaseException):
    """The conversion did not end in time."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    remaining = signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(remaining)
        signal.signal(signal.SIGALRM, before)


def judge(case: Case, models: dict[str, Path], directory: Path) -> str | None:
    """What is wrong with how the conversion took the damage; None: nothing."""
    given = case.make(models, directory)
    to_nemo = given.name in ("hf", "sharded")
    output = directory / ("out.nemo" if to_nemo else "out")
    command = hf_to_nemo if to_nemo else nemo_to_hf
    told, sys.stderr = sys.stderr, io.StringIO()
    try:
        with _limited(), contextlib.redirect_stdout(io.StringIO()):
            status = command(["--input", str(given), "--output", str(output), "--quiet"])
        text = sys.stderr.getvalue()
    except TooLong:
        return f"no answer within {LONGEST_SECONDS} s"
    except Exception as error:  # whatever comes through is the finding
        return f"a traceback: {type(error).__name__}: {str(error)[:200]}"
    finally:
        sys.stderr = told
    left = [path.name for path in directory.iterdir() if path not in (given, output)]
    if left:
        return f"left behind: {left}"
    return _refused(status, text, output) if status else _converted(case, output, models)


def _refused(status: int, text: str, output: Path) -> str | None:
    if status != 1 or text.count("error: ") != 1 or "Traceback" in text:
        return f"status {status} with: {text[:300]}"
    if len(text) > 6000:
        return f"a message of {len(text)} letters"
    return f"{output} exists after an error" if output.exists() else None


def _converted(case: Case, output: Path, models: dict[str, Path]) -> str | None:
    found = open_model(output)
    content = found.side_file("config.json")
    assert content is not None
    if b"NaN" in content or b"Infinity" in content:
        return f"a config that is not JSON: {content!r}"
    expected = load_file(models["hf"] / "model.safetensors")
    if case.must_be_right:
        wrong = [name for name, tensor in expected.items() if not torch.equal(found.source.get(name), tensor)]
        if wrong:
            return f"silently wrong: {wrong}"
    return None
