"""Each bad input ends in one clear message, and leaves nothing that looks complete."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_lmpo.convert.__main__ import main
from nemo_lmpo.convert.command import hf_to_nemo, nemo_to_hf
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats import conversion
from nemo_lmpo.formats.model_files import open_model
from tests.unit.formats import tiny_models as tiny


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save("llama3", tmp_path / "hf")


@pytest.fixture
def nemo(source: Path, tmp_path: Path) -> Path:
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "good.nemo"), "--quiet"]) == 0
    return tmp_path / "good.nemo"


def _error(command: Callable[[list[str]], int], given: Path | str, output: Path, *more: str) -> str:
    """Run a command that must fail, and return its one message."""
    stderr = sys.stderr
    sys.stderr = io.StringIO()
    try:
        assert command(["--input", str(given), "--output", str(output), "--quiet", *more]) == 1
        message = sys.stderr.getvalue()
    finally:
        sys.stderr = stderr
    assert message.startswith("error: ")
    assert not output.exists()
    return message


def _change(source: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})


def test_missing_shard(tmp_path: Path) -> None:
    source = tiny.save("llama3", tmp_path / "sharded", max_shard_size="200KB")
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
    assert gone.name in message
    assert "model.safetensors.index.json" in message


def test_index_that_points_elsewhere(tmp_path: Path) -> None:
    source = tiny.save("llama3", tmp_path / "sharded", max_shard_size="200KB")
    index = source / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    assert "outside its directory: ../other.safetensors" in _error(hf_to_nemo, source, tmp_path / "x.nemo")
    index.write_text("{}")
    assert "no" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_wrong_shape(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(95, 64)

    _change(source, change)
    message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
    assert "model.layers.1.mlp.gate_proj.weight is [95, 64] instead of [96, 64]" in message


def test_missing_and_unexpected_names_are_all_listed(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["model.layers.3.self_attn.k_proj.weight"]
        tensors["model.layers.4.mlp.up_proj.weight"] = torch.zeros(96, 64)
        tensors["extra"] = torch.zeros(1)

    _change(source, change)
    message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
    assert "2 missing tensors: model.layers.3.self_attn.k_proj.weight, model.norm.weight" in message
    assert "2 unexpected tensors: extra, model.layers.4.mlp.up_proj.weight" in message


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_truncated_safetensors(source: Path, tmp_path: Path, keep: int) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "model.safetensors is truncated" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_pickled_weights(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "unpickling can run code" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_integer_weights(source: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)

    _change(source, change)
    assert "model.norm.weight is I8" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_full_disk_is_noticed_before_writing(
    source: Path, nemo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    for command, given in ((hf_to_nemo, source), (nemo_to_hf, nemo)):
        message = _error(command, given, tmp_path / "x.nemo")
        assert "1000 B free" in message
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom(4096)], ids=["empty", "text", "noise"])
def test_not_a_nemo_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(content)
    assert "is not a NeMo file" in _error(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "out")


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_archive_of_something_else(tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.nemo", (tarfile.TarInfo("readme.txt"), b"hello"))
    assert "it holds no model_config.yaml" in _error(nemo_to_hf, archive, tmp_path / "out")


def test_archive_of_an_older_format(tmp_path: Path) -> None:
    members = [(tarfile.TarInfo(name), b"num_layers: 2") for name in ("./model_config.yaml", "./model_weights.ckpt")]
    archive = _tar(tmp_path / "x.nemo", *members)
    assert "older format (model_weights.ckpt)" in _error(nemo_to_hf, archive, tmp_path / "out")


def test_compressed_archive(nemo: Path, tmp_path: Path) -> None:
    (tmp_path / "x.nemo").write_bytes(gzip.compress(nemo.read_bytes()))
    assert "gzip -dc" in _error(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "out")


@pytest.mark.parametrize("part", [0.3, 0.8, 0.98])
def test_cut_off_archive(nemo: Path, tmp_path: Path, part: float) -> None:
    content = nemo.read_bytes()
    (tmp_path / "x.nemo").write_bytes(content[: int(part * len(content))])
    assert "is cut off" in _error(nemo_to_hf, tmp_path / "x.nemo", tmp_path / "out")


def _special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("/etc/evil"),
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("model_weights/../../evil"),
        _special("link", tarfile.SYMTYPE, "/etc/passwd"),
        _special("hard", tarfile.LNKTYPE, "/etc/passwd"),
        _special("device", tarfile.CHRTYPE),
        _special("pipe", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name,
)
def test_dangerous_archive_members(member: tarfile.TarInfo, tmp_path: Path) -> None:
    archive = _tar(tmp_path / "x.nemo", (tarfile.TarInfo("model_config.yaml"), b"a: 1"), (member, b""))
    message = _error(nemo_to_hf, archive, tmp_path / "out")
    assert member.name in message
    assert "do not use it" in message


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _unpacked(nemo: Path, directory: Path) -> Path:
    with tarfile.open(nemo) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_nothing_is_run_from_a_checkpoint(nemo: Path, tmp_path: Path, file: str) -> None:
    tree = _unpacked(nemo, tmp_path / "tree")
    marker = tmp_path / "ran"
    (tree / "model_weights" / "checksums.json").unlink()  # who puts code there leaves no checksum behind
    if file == ".metadata":
        (tree / "model_weights" / file).write_bytes(pickle.dumps(_Payload(marker)))
    elif file == "common.pt":
        torch.save(_Payload(marker), tree / "model_weights" / file)
    else:
        evil = io.BytesIO()
        torch.save(_Payload(marker), evil)
        size = (tree / "model_weights" / file).stat().st_size
        (tree / "model_weights" / file).write_bytes(evil.getvalue().ljust(size, b"\0"))
    if file == "common.pt":  # it is not read at all
        assert nemo_to_hf(["--input", str(tree), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    else:
        message = _error(nemo_to_hf, tree, tmp_path / "out")
        assert ("posix.system" in message) == (file == ".metadata")
    assert not marker.exists()


def test_yaml_cannot_construct_objects(nemo: Path, tmp_path: Path) -> None:
    tree = _unpacked(nemo, tmp_path / "tree")
    marker = tmp_path / "ran"
    (tree / "model_config.yaml").write_text(f"!!python/object/apply:os.system ['touch {marker}']\n")
    assert "is not plain YAML" in _error(nemo_to_hf, tree, tmp_path / "out")
    assert not marker.exists()


def test_missing_and_damaged_data_file(nemo: Path, tmp_path: Path) -> None:
    tree = _unpacked(nemo, tmp_path / "tree")
    data = tree / "model_weights" / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in _error(nemo_to_hf, tree, tmp_path / "out")
    data.unlink()
    assert "lacks 1 data file: __0_0.distcp" in _error(nemo_to_hf, tree, tmp_path / "out")


def test_config_that_does_not_fit_the_weights(nemo: Path, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    message = _error(nemo_to_hf, nemo, tmp_path / "out", "--config", str(tmp_path / "other.json"))
    assert "model.decoder.layers.mlp.linear_fc1.weight is [4, 192, 64] instead of [4, 200, 64]" in message
    (tmp_path / "other.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    message = _error(nemo_to_hf, nemo, tmp_path / "out", "--config", str(tmp_path / "other.json"))
    assert "instead of [5, 64, 64]" in message


def test_unsupported_architecture_names_the_supported_ones(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gemma2"}))
    message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
    assert "model_type 'gemma2' is not supported; supported: llama, mistral, qwen2, qwen3" in message
    for name, reason in (
        ("qwen2_moe", "shared experts"),
        ("llama4_text", "attention has chunks"),
        ("deepseek_v3", "attention is latent"),
        ("new_moe", "not known here"),
    ):
        (source / "config.json").write_text(json.dumps({**config, "model_type": name}))
        message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
        assert f"model_type '{name}' is a mixture of experts that is not supported" in message
        assert reason in message
        assert message.count("\n") == 1
        assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("hidden_size", "abc", "hidden_size='abc' is not a whole number"),
        ("num_attention_heads", None, "num_attention_heads=None is not a whole number"),
        ("num_attention_heads", 0, "num_attention_heads=0 is not a whole number of at least 1"),
        ("vocab_size", -5, "vocab_size=-5 is not a whole number of at least 1"),
        ("rms_norm_eps", "small", "rms_norm_eps='small' is not a number"),
        ("rope_parameters", "x", "does not describe one rotary embedding"),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "rope_parameters: the field factor is missing"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor=0.5 is not supported"),
    ],
)
def test_config_with_a_value_that_is_none(source: Path, tmp_path: Path, field: str, value: object, told: str) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, field: value}))
    message = _error(hf_to_nemo, source, tmp_path / "x.nemo")
    assert told in message
    assert "config.json" in message


def test_config_that_is_a_list(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("[]")
    assert "holds a list instead of named fields" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_tokenizer_that_is_none(nemo: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given in ("empty", "missing"):
        message = _error(nemo_to_hf, nemo, tmp_path / "out", "--tokenizer", str(tmp_path / given))
        assert f"{given} holds no tokenizer" in message


@pytest.mark.parametrize("command", ["to_nemo", "to_hf"])
def test_values_that_overflow_the_dtype(command: str, source: Path, nemo: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    _change(source, lambda tensors: tensors[name][3, 4].fill_(-7e4))
    given, convert, output = source, hf_to_nemo, tmp_path / "x.nemo"
    if command == "to_hf":
        given, convert, output = tmp_path / "large.nemo", nemo_to_hf, tmp_path / "out"
        assert hf_to_nemo(["--input", str(source), "--output", str(given), "--quiet"]) == 0
    message = _error(convert, given, output, "--dtype", "fp16")
    assert f"{name} holds 70000, more than 65504, the largest number of float16" in message
    assert convert(["--input", str(given), "--output", str(output), "--dtype", "bf16", "--quiet"]) == 0


def test_damaged_tokenizer_is_told_when_verifying(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("{")
    output = tmp_path / "x.nemo"
    stderr, sys.stderr = sys.stderr, io.StringIO()
    try:
        assert hf_to_nemo(["--input", str(source), "--output", str(output), "--quiet", "--verify"]) == 1
        assert "its tokenizer cannot be read" in sys.stderr.getvalue()
    finally:
        sys.stderr = stderr


def test_only_side_files_of_the_model_leave_an_archive(nemo: Path, tmp_path: Path) -> None:
    tree = _unpacked(nemo, tmp_path / "tree")
    strangers = ("evil.py", "pytorch_model.bin", "model.safetensors.index.json", "folder/tokenizer.json")
    for name in strangers:
        (tree / "huggingface" / name).parent.mkdir(exist_ok=True)
        (tree / "huggingface" / name).write_text("{}")
    assert nemo_to_hf(["--input", str(tree), "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert not [name for name in strangers if (tmp_path / "out" / name).exists()]


def test_nothing_there(tmp_path: Path) -> None:
    assert "does not exist" in _error(hf_to_nemo, tmp_path / "nothing", tmp_path / "x.nemo")
    assert "does not exist" in _error(nemo_to_hf, tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "is not a model" in _error(nemo_to_hf, tmp_path / "empty", tmp_path / "out")


def test_wrong_direction(source: Path, nemo: Path, tmp_path: Path) -> None:
    assert "use nemo-to-hf" in _error(hf_to_nemo, nemo, tmp_path / "x.nemo")
    assert "use hf-to-nemo" in _error(nemo_to_hf, source, tmp_path / "out")


def test_existing_output(source: Path, nemo: Path, tmp_path: Path) -> None:
    before = nemo.read_bytes()
    assert hf_to_nemo(["--input", str(source), "--output", str(nemo), "--quiet"]) == 1
    assert nemo.read_bytes() == before
    assert hf_to_nemo(["--input", str(source), "--output", str(nemo), "--quiet", "--overwrite", "--dtype", "bf16"]) == 0
    assert nemo.stat().st_size < 0.7 * len(before)

    output = tmp_path / "out"
    arguments = ["--input", str(nemo), "--output", str(output), "--quiet"]
    assert nemo_to_hf(arguments) == 0
    (output / "stale.txt").write_text("from before")
    assert nemo_to_hf(arguments) == 1
    assert nemo_to_hf([*arguments, "--overwrite"]) == 0
    assert not (output / "stale.txt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_overwrite_spares_other_directories_and_the_input(source: Path, nemo: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert nemo_to_hf(["--input", str(nemo), "--output", str(precious), "--quiet", "--overwrite"]) == 1
    assert hf_to_nemo(["--input", str(source), "--output", str(source), "--quiet", "--overwrite"]) == 1
    assert hf_to_nemo(["--input", str(source), "--output", str(source / "x.nemo"), "--quiet"]) == 1
    assert (precious / "thesis.txt").exists()
    assert open_model(source).kind == "huggingface"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, CheckpointError])
@pytest.mark.parametrize("form", ["x.nemo", "directory"])
def test_interruption_leaves_nothing(source: Path, tmp_path: Path, error: type[BaseException], form: str) -> None:
    def interrupt(name: str) -> None:
        if name == "model.layers.2.mlp.up_proj.weight":
            raise error("now")

    before = sorted(tmp_path.iterdir())
    work = conversion.plan(open_model(source), tmp_path / form)
    with pytest.raises(error):
        conversion.write_nemo(work, progress=interrupt)
    with pytest.raises(error):
        conversion.write_huggingface(work, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_prints_the_mapping_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    assert hf_to_nemo(["--input", str(source), "--output", str(tmp_path / "x.nemo"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.{0..3}.self_attn.q_proj.weight" in printed
    assert "decoder.layers.self_attention.linear_qkv.weight [4, 128, 64]" in printed
    assert sorted(tmp_path.iterdir()) == before


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["convert"])
    assert "hf-to-nemo" in capsys.readouterr().err


def test_bad_hub_name_and_bad_options(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*arguments: object, **keywords: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "cannot be fetched from the hub (no network)" in _error(hf_to_nemo, "someone/model", tmp_path / "x.nemo")
    for size in ("0", "inf", "nan"):
        assert "--max-shard-gb" in _error(nemo_to_hf, source, tmp_path / "out", "--max-shard-gb", size)
    assert "create it first" in _error(hf_to_nemo, source, tmp_path / "no" / "such" / "x.nemo")
    (source / "config.json").write_text("{")
    assert "is not valid JSON" in _error(hf_to_nemo, source, tmp_path / "x.nemo")


def test_safetensors_header_that_lies(source: Path, tmp_path: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [64], "data_offsets": [0, 10**9]}}).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    assert "truncated or no safetensors file" in _error(hf_to_nemo, source, tmp_path / "x.nemo")
