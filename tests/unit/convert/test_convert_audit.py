"""Conversions that once gave another model, a traceback or a hang without a word."""

from __future__ import annotations

import io
import json
import os
import pickle
import platform
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats import conversion
from nemo_lmpo.formats.model_files import open_model
from tests.fuzz.mutated_models import whole_models
from tests.unit.formats import tiny_models as tiny

Command = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return whole_models(tmp_path_factory.mktemp("models"))


def _copy(models: dict[str, Path], form: str, directory: Path) -> Path:
    return Path(shutil.copytree(models[form], directory / form))


def _run(command: Command, given: Path, output: Path, *more: str) -> tuple[int, str]:
    told, sys.stderr = sys.stderr, io.StringIO()
    try:
        status = command(["--input", str(given), "--output", str(output), "--quiet", *more])
        return status, sys.stderr.getvalue()
    finally:
        sys.stderr = told


def _error(command: Command, given: Path, output: Path, *more: str) -> str:
    status, text = _run(command, given, output, *more)
    assert status == 1
    assert text.startswith("error: ")
    assert text.count("\n") == 1 or "does not fit the model" in text
    assert not output.exists()
    return text


def _set(path: Path, **values: object) -> None:
    yaml_file = path.suffix == ".yaml"
    content = yaml.safe_load(path.read_text()) if yaml_file else json.loads(path.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        inner = content
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    path.write_text(yaml.safe_dump(content) if yaml_file else json.dumps(content))


# An output layer of its own is never dropped.


@pytest.mark.parametrize("differs", [True, False])
def test_tied_hugging_face_model_with_an_output_layer(tmp_path: Path, differs: bool) -> None:
    source = tiny.save("llama32", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + differs
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    if differs:
        message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
        assert "differs from the embedding" in message
        assert "tie_word_embeddings: false" in message
        _set(source / "config.json", tie_word_embeddings=False)
    assert _run(hf_to_nemo, source, tmp_path / "x.nemo")[0] == 0
    assert _run(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "back")[0] == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert ("lm_head.weight" in back) == differs
    for name, tensor in back.items():
        assert torch.equal(tensor, tensors[name]), name


def test_tied_nemo_model_with_an_output_layer(models: dict[str, Path], tmp_path: Path) -> None:
    tree = _copy(models, "foreign", tmp_path)
    _set(tree / "model_config.yaml", share_embeddings_and_output_weights=True)
    assert "differs from the embedding" in _error(nemo_to_hf, tree, tmp_path / "out")
    _set(tree / "model_config.yaml", share_embeddings_and_output_weights="false")
    assert "='false' is neither true nor false" in _error(nemo_to_hf, tree, tmp_path / "out")


def test_config_of_another_model(models: dict[str, Path], tmp_path: Path) -> None:
    """Tied, and with fewer rows: neither the output layer nor rows that are no padding disappear."""
    config = tmp_path / "config.json"
    shutil.copy(models["hf"] / "config.json", config)
    _set(config, tie_word_embeddings=True, vocab_size=250)
    given = ("--config", str(config))
    assert "differs from the embedding" in _error(nemo_to_hf, models["archive"], tmp_path / "out", *given)


def test_rows_that_are_no_padding(tmp_path: Path) -> None:
    source = tiny.save("llama3", tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(9000, 64)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", tmp_path / "small.json")
    _set(source / "config.json", vocab_size=9000)
    assert _run(hf_to_nemo, source, tmp_path / "x.nemo")[0] == 0
    message = _error(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "out", "--config", str(tmp_path / "small.json"))
    assert "9000 rows of vocabulary, more than padding of a vocabulary of 259 explains" in message


# What NeMo makes of a file is said as it is.


def test_what_is_said_of_nemos_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family, warned in (("llama32", True), ("llama3", False)):
        source = tiny.save(family, tmp_path / family)
        assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / f"{family}.nemo"), "--quiet"]) == 0
        printed = capsys.readouterr().out
        assert ("from 2.2 on" in printed and "apply factor 8" in printed) == warned


@pytest.mark.parametrize(
    ("form", "settings", "said"),
    [
        ("nemo2", {"config__scale_factor": 32.0}, "keeps the factor of a model's rotary scaling only"),
        (
            "nemo2",
            {"_target_": "x.MistralModel", "config__window_size": [64, 0]},
            "max_position_embeddings becomes 256",
        ),
    ],
)
def test_what_nemo2_loses_is_said(
    models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    form: str,
    settings: dict[str, Any],
    said: str,
) -> None:
    tree = _copy(models, form, tmp_path)
    _set(tree / "context" / "model.yaml", **settings)
    assert _run(nemo_to_hf, tree, tmp_path / "out")[0] == 0
    assert said in caplog.text


# A training checkpoint's export says its dtype and special tokens.


def _training_checkpoint(models: dict[str, Path], directory: Path, *, generation: bool) -> Path:
    step = directory / "step_0000010"
    shutil.copytree(models["tree"] / "model_weights", step / "state")
    settings = json.loads((models["hf"] / "config.json").read_text())
    for name in ("dtype", "bos_token_id", "eos_token_id", "pad_token_id"):
        settings.pop(name, None)
    (step / "architecture.json").write_text(json.dumps(settings))
    (step / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", *(("generation_config.json",) if generation else ())):
        shutil.copy(models["hf"] / name, step / "tokenizer" / name)
    return step


def test_export_of_training_states_dtype_and_special_tokens(models: dict[str, Path], tmp_path: Path) -> None:
    step = _training_checkpoint(models, tmp_path, generation=False)
    assert _run(nemo_to_hf, step, tmp_path / "out", "--dtype", "bf16")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # The tiny tokenizer's BOS is the word w1, its EOS w2; it has no padding.
    assert (config["torch_dtype"], config["bos_token_id"], config["eos_token_id"]) == ("bfloat16", 1, 2)
    assert config.get("pad_token_id") is None
    shutil.rmtree(step)
    step = _training_checkpoint(models, tmp_path, generation=True)
    _set(step / "tokenizer" / "generation_config.json", eos_token_id=[2, 7])
    assert _run(nemo_to_hf, step, tmp_path / "other")[0] == 0
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert (config["torch_dtype"], config["eos_token_id"]) == ("float32", [2, 7])


# A disk that fills up.


@contextmanager
def _files_up_to(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow further, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("form", ["x.nemo", "tree", "hf"])
def test_disk_that_fills_up(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    command, given = (nemo_to_hf, models["archive"]) if form == "hf" else (hf_to_nemo, models["hf"])
    with _files_up_to(300_000):
        message = _error(command, given, tmp_path / form)
    assert "File too large" in message
    assert not list(tmp_path.iterdir())


# Values and switches in NeMo's files.


@pytest.mark.parametrize(
    ("form", "settings", "told"),
    [
        ("foreign", {"num_layers": "four"}, "num_layers='four' is not a whole number of at least 1"),
        ("foreign", {"num_layers": 4.7}, "num_layers=4.7 is not a whole number"),
        ("foreign", {"num_attention_heads": 0}, "num_attention_heads=0 is not a whole number of at least 1"),
        ("foreign", {"layernorm_epsilon": float("nan")}, "layernorm_epsilon=nan is not a number above 0"),
        ("foreign", {"rotary_base": -5}, "rotary_base=-5 is not a number above 0"),
        ("foreign", {"max_position_embeddings": None}, "max_position_embeddings=None is not a whole number"),
        ("foreign", {"window_size": [-1, -1]}, "window_size=[-1, -1] is not a window"),
        ("foreign", {"tokenizer": 5}, "tokenizer holds a int instead of named fields"),
        ("foreign", {"tokenizer__model": "nemo:model_config.yaml"}, "model_config.yaml is not a SentencePiece model"),
        ("foreign", {"make_vocab_size_divisible_by": "x"}, "make_vocab_size_divisible_by='x' is not a whole number"),
        ("foreign", {"scale_positional_embedding": True, "scale_factor": 0}, "scale_factor=0 is not a number above 0"),
        ("foreign", {"rotary_interleaved": True}, "rotary_interleaved=True is not supported"),
        ("foreign", {"layernorm_zero_centered_gamma": True}, "layernorm_zero_centered_gamma=True is not supported"),
        ("foreign", {"apply_embedding_scaling": True}, "apply_embedding_scaling=True is not supported"),
        ("foreign", {"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not supported"),
        ("foreign", {"num_moe_experts": 8}, "does not fit the model"),
        (
            "foreign",
            {"qkv_bias": True, "qk_layernorm": True},
            "no supported family has qkv_bias=True, qk_layernorm=True",
        ),
        ("nemo2", {"config__vocab_size": -5}, "vocab_size=-5 is not a whole number of at least 1"),
        ("nemo2", {"config": ["a"]}, "config holds a list instead of named fields"),
        ("nemo2", {"config__normalization": "LayerNorm"}, "normalization='LayerNorm' is not supported"),
        ("nemo2", {"config__gated_linear_unit": False}, "gated_linear_unit=False is not supported"),
        ("nemo2", {"config__activation_func___target_": "torch.nn.functional.gelu"}, "activation_func="),
        ("nemo2", {"config__rotary_percent": 0.5}, "rotary_percent=0.5 is not supported"),
        ("nemo2", {"config__qk_layernorm": True}, "qk_layernorm=True is not supported"),
        ("nemo2", {"config__add_qkv_bias": True}, "add_qkv_bias=True is not supported"),
        ("nemo2", {"config__window_size": [64, 0]}, "window_size=[64, 0] is not supported for a llama"),
        ("hf", {"rope_parameters__rope_theta": 0}, "rope_theta=0 is not a number above 0"),
        ("hf", {"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor=-1 is not a number above 0"),
        ("hf", {"num_attention_heads": 3}, "which a rotary embedding cannot halve"),
    ],
)
def test_value_that_is_none(
    models: dict[str, Path], tmp_path: Path, form: str, settings: dict[str, object], told: str
) -> None:
    model = _copy(models, form, tmp_path)
    if form == "hf" and "num_attention_heads" in settings:
        _set(model / "config.json", head_dim=21)
    names = {"foreign": "model_config.yaml", "nemo2": "context/model.yaml", "hf": "config.json"}
    _set(model / names[form], **settings)
    assert told in _error(hf_to_nemo if form == "hf" else nemo_to_hf, model, tmp_path / "out")


@pytest.mark.parametrize("form", ["hf", "foreign", "nemo2"])
def test_billion_layers_are_answered_at_once(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    model = _copy(models, form, tmp_path)
    name, field = {
        "hf": ("config.json", "num_hidden_layers"),
        "foreign": ("model_config.yaml", "num_layers"),
        "nemo2": ("context/model.yaml", "config__num_layers"),
    }[form]
    _set(model / name, **{field: 10**9})
    started = time.process_time()
    message = _error(hf_to_nemo if form == "hf" else nemo_to_hf, model, tmp_path / "out")
    assert "=1000000000 is more than 10000" in message
    # Counting through so many layers takes minutes.
    assert time.process_time() - started < 10


# Names and files.


def test_long_side_file_names(tmp_path: Path) -> None:
    """Beyond the 100 letters of a plain tar header, names take blocks of their own."""
    source = tiny.save("llama2", tmp_path / "hf")
    name = f"LICENSE_{'x' * 150}"
    (source / name).write_text("mine")
    assert _run(hf_to_nemo, source, tmp_path / "x.nemo")[0] == 0
    assert _run(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "back")[0] == 0
    assert (tmp_path / "back" / name).read_text() == "mine"


@pytest.mark.parametrize("form", ["tree", "foreign"])
def test_changed_weights_are_noticed(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    """By this project's checksums, and in others' checkpoints by those of torch's own records."""
    tree = _copy(models, form, tmp_path)
    data = tree / "model_weights" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert "its checksum differs" in _error(nemo_to_hf, tree, tmp_path / "out")


def test_changed_catalog_is_noticed(models: dict[str, Path], tmp_path: Path) -> None:
    tree = _copy(models, "tree", tmp_path)
    catalog = tree / "model_weights" / ".metadata"
    content = pickle.loads(catalog.read_bytes())  # noqa: S301 - written above
    places = [place for index, place in content.storage_data.items() if "linear_proj.weight" in index.fqn]
    places[0].offset, places[1].offset = places[1].offset, places[0].offset
    catalog.write_bytes(pickle.dumps(content))
    assert ".metadata was changed after it was written" in _error(nemo_to_hf, tree, tmp_path / "out")


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_damaged_data_gets_no_dangerous_advice(models: dict[str, Path], tmp_path: Path) -> None:
    tree = _copy(models, "foreign", tmp_path)
    data = tree / "model_weights" / "__0_0.distcp"
    # A saved object that is none of a tensor's: torch's own message advises to load it without care.
    evil, marker = io.BytesIO(), tmp_path / "ran"
    torch.save(_Payload(marker), evil)
    data.write_bytes(evil.getvalue())
    catalog = tree / "model_weights" / ".metadata"
    content = pickle.loads(catalog.read_bytes())  # noqa: S301 - written above
    for place in content.storage_data.values():
        place.offset, place.length = 0, len(evil.getvalue())
    catalog.write_bytes(pickle.dumps(content))
    message = _error(nemo_to_hf, tree, tmp_path / "out")
    assert "Weights only load failed" in message
    assert "weights_only=False" not in message
    assert not marker.exists()


# Two at once, and interruptions.


@pytest.mark.parametrize("form", ["x.nemo", "tree"])
def test_output_that_appears_meanwhile_stays(models: dict[str, Path], tmp_path: Path, form: str) -> None:
    work = conversion.plan(open_model(models["hf"]), tmp_path / form)

    def other_writer(name: str) -> None:
        if name == "model.norm.weight":
            conversion.write_nemo(work)

    with pytest.raises(CheckpointError, match="was made by another process meanwhile"):
        conversion.write_nemo(work, progress=other_writer)
    assert [path.name for path in tmp_path.iterdir()] == [form]
    assert open_model(tmp_path / form).kind == "nemo"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_termination_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def terminated(*arguments: object, **keywords: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(conversion, "write_distributed_checkpoint", terminated)
    # Whoever starts the tests may ignore it, as nohup does, and then the command does, too.
    ignored = signal.signal(number, signal.SIG_DFL)
    told = (128 + number, "interrupted: nothing was left behind\n")
    try:
        assert _run(hf_to_nemo, models["hf"], tmp_path / "x.nemo") == told
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, ignored)
    assert not list(tmp_path.iterdir())


def test_leftovers_of_killed_processes_go(models: dict[str, Path], tmp_path: Path) -> None:
    alive, elsewhere = f".x.nemo.{platform.node()}.{os.getppid()}.partial", ".x.nemo.other-host.99999999.partial"
    for name in (alive, elsewhere, f".x.nemo.{platform.node()}.99999999.partial"):
        (tmp_path / name).write_text("half")
    assert _run(hf_to_nemo, models["hf"], tmp_path / "x.nemo")[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {alive, elsewhere, "x.nemo"}


def test_a_stale_partial_output_of_the_same_process_number_is_not_written_into(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """Containers number their processes alike: the leftover is told by when its process started."""
    start = f".out.{platform.node()}.{os.getpid()}"
    for name in (f"{start}.partial", f"{start}-1234.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00007-of-00007.safetensors").write_text("stale")
    assert _run(nemo_to_hf, models["archive"], tmp_path / "out")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("*-of-*"))


@pytest.mark.parametrize("left", [".out.99999999.old", f".out.{platform.node()}.99999999-5.old"])
def test_an_output_that_was_stepping_aside_comes_back(models: dict[str, Path], tmp_path: Path, left: str) -> None:
    (tmp_path / left).mkdir()
    (tmp_path / left / "config.json").write_text("{}")
    status, said = _run(nemo_to_hf, models["archive"], tmp_path / "out")
    assert status == 1
    assert "exists; give another output or --overwrite" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / left).mkdir()
    assert _run(nemo_to_hf, models["archive"], tmp_path / "out", "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert open_model(tmp_path / "out").kind == "huggingface"


def test_full_precision_weights_are_not_called_quantized(
    models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A config can keep the settings of a quantized model that its weights are not any more."""
    given = _copy(models, "hf", tmp_path)
    config = json.loads((given / "config.json").read_text())
    said = {**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (given / "config.json").write_text(json.dumps(said))
    assert _run(hf_to_nemo, given, tmp_path / "x.nemo")[0] == 0
    assert _run(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "back")[0] == 0
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    assert f"{given}: quantization_config of config.json is left out" in caplog.text


def test_links_out_of_a_model_are_not_followed(models: dict[str, Path], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    for form, folder, command in (("hf", "", hf_to_nemo), ("tree", "huggingface", nemo_to_hf)):
        given = _copy(models, form, tmp_path)
        (given / folder / "LICENSE").symlink_to(secret)
        told = _error(command, given, tmp_path / "out")
        assert f"LICENSE is a link to {secret}, outside of the model; put the file itself there" in told
        (given / folder / "LICENSE").unlink()
        (given / folder / "terms").write_text("terms")
        (given / folder / "LICENSE").symlink_to("terms")
        assert _run(command, given, tmp_path / f"{form}_out")[0] == 0
    assert (tmp_path / "hf_out" / "huggingface" / "LICENSE").read_text() == "terms"
    assert (tmp_path / "tree_out" / "LICENSE").read_text() == "terms"


def test_the_cache_of_the_hub_is_links(models: dict[str, Path], tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    given, blobs = repository / "snapshots" / "1a2b", repository / "blobs"
    given.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(models["hf"].iterdir()):
        shutil.copy(path, blobs / str(number))
        (given / path.name).symlink_to(f"../../blobs/{number}")
    assert _run(hf_to_nemo, given, tmp_path / "x.nemo")[0] == 0
