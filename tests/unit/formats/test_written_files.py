"""Files that are written as streams: the bytes of the libraries whose formats they have, and errors that say whose."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.formats import steady_file
from nemo_lmpo.formats.safetensors_file import write_tensors
from nemo_lmpo.formats.steady_file import SteadyFile
from nemo_lmpo.formats.torch_archive import save_into
from nemo_lmpo.runtime.files import file_checksum
from nemo_lmpo.runtime.threads import one_ahead

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@given(
    st.dictionaries(NAMES, SHAPES, min_size=1, max_size=6),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_bytes_are_those_of_safetensors(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], dtype: torch.dtype
) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items() if name != "__metadata__"}
    path = tmp_path_factory.mktemp("file") / "model.safetensors"
    done: list[str] = []
    checksum = write_tensors(path, tensors, iter(sorted(tensors.items())), done.append)
    assert path.read_bytes() == save(tensors, metadata={"format": "pt"})
    assert checksum == file_checksum(path)
    assert done == sorted(tensors)


def test_strided_tensors_are_written_in_their_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    write_tensors(tmp_path / "file", {"a": tensor}, iter([("a", tensor)]))
    assert (tmp_path / "file").read_bytes() == save({"a": tensor.contiguous()}, metadata={"format": "pt"})


def test_errors_of_the_source_are_not_called_errors_of_the_file(tmp_path: Path) -> None:
    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield "a", torch.zeros(2)
        raise OSError("the input's disk is gone")

    sizes = {name: torch.zeros(2) for name in "ab"}
    with pytest.raises(OSError, match="the input's disk is gone"):
        write_tensors(tmp_path / "file", sizes, tensors())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_names_the_file() -> None:
    tensors = {"a": torch.zeros(2**20)}
    with pytest.raises(CheckpointError, match=r"/dev/full cannot be written .*No space left.*free some space"):
        write_tensors(Path("/dev/full"), tensors, iter(tensors.items()))


def test_a_steady_file_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the disk is asked for a stretch."""
    monkeypatch.setattr(steady_file, "_STRETCH_BYTES", 1000)
    asked: list[int] = []
    real = os.fdatasync

    def ask(number: int) -> None:
        asked.append(number)
        real(number)

    monkeypatch.setattr(os, "fdatasync", ask)
    content = os.urandom(100_000)
    with SteadyFile(tmp_path / "file") as file:
        for start in range(0, len(content), 777):
            assert file.write(content[start : start + 777]) == len(content[start : start + 777])
        end = file.tell()
        file.seek(5)
        file.write(b"12345")
        file.seek(end)
        file.write(b"end")
    assert (tmp_path / "file").read_bytes() == content[:5] + b"12345" + content[10:] + b"end"
    assert asked


def test_what_the_disk_refuses_meanwhile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady_file, "_STRETCH_BYTES", 10)

    def refuse(number: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(OSError, match="Input/output error"), SteadyFile(tmp_path / "file") as file:
        file.write(b"0123456789")


@pytest.mark.parametrize("value", [torch.randn(600, 1000), torch.zeros(0), [None], {"a": torch.arange(3)}])
def test_archives_are_torchs(value: object) -> None:
    blocks: list[bytes] = []
    save_into(lambda block: blocks.append(bytes(block)), value)
    expected = io.BytesIO()
    torch.save(value, expected)
    assert b"".join(blocks) == expected.getvalue()


def test_an_archives_writer_says_its_own_error() -> None:
    def refuse(block: memoryview) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as info:
        save_into(refuse, torch.zeros(9))
    assert info.value.errno == 28


def test_one_item_is_made_ahead_and_no_more() -> None:
    made: list[int] = []
    at_third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 2:
                at_third.set()
            yield number

    ahead = one_ahead(items(), "test")
    assert [next(ahead), next(ahead)] == [0, 1]
    assert at_third.wait(10), "the third is made while the second is used"
    assert made == [0, 1, 2]
    assert list(ahead) == [2, 3, 4]


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise CheckpointError("damaged")

    ahead = one_ahead(items(), "test")
    assert next(ahead) == 1
    with pytest.raises(CheckpointError, match="damaged"):
        next(ahead)


def test_who_stops_early_leaves_no_thread() -> None:
    before = threading.active_count()
    ahead = one_ahead(iter(range(5)), "test")
    next(ahead)
    ahead.close()  # type: ignore[attr-defined]  # of a generator
    assert threading.active_count() == before
