"""Where rows come from: files, saved datasets, the hub, generated tasks. Each source knows a hash of its content.

Whatever the source is, its rows become a memory-mapped `datasets.Dataset`, so that nothing here grows with the data.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.data.builtin.tiny_task import builtin_rows
from nemo_lmpo.data.hub import cache_only_without_network, downloaded_dataset
from nemo_lmpo.data.progress import on_terminal, progress_bars
from nemo_lmpo.data.raw import Places, RawRow, raw_rows
from nemo_lmpo.data.text import (
    FILE_SUFFIXES,
    PLAIN_TEXT,
    TEXT_SUFFIXES,
    TextFormat,
    read_lines,
    text_unit,
    uncompressed_name,
)
from nemo_lmpo.errors import DataError, first_line, shown
from nemo_lmpo.runtime.files import is_hub_name

if TYPE_CHECKING:
    import datasets

BUILTIN_PREFIX = "builtin:"
PAIRS_SUMMARY = "pairs.json"
"""What tells a folder of own pairs, beside the file of the same stem that holds them."""
_FORMATS = "JSON lines, JSON, CSV or TSV (also .gz and .zst), Parquet"
_READ_ROWS = 1024
_LINES_FILE = "lines.arrow"
_LONGEST_NAME = 200
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Source:
    """One path of a dataset."""

    name: str
    """The path as given."""
    short_name: str
    """What pair ids begin with when rows have none: the same on every machine."""
    unit: str
    """`line` or `row`: what ``RawRow.number`` counts."""
    fingerprint: str
    """Changes whenever the content does."""
    load: Callable[[str], datasets.Dataset]
    """The rows, memory-mapped; those of files are converted into the directory given."""
    files: tuple[str, ...] = ()
    """As :attr:`Places.files`."""
    form: TextFormat = PLAIN_TEXT
    """Of text files."""

    @property
    def places(self) -> Places:
        """How messages name a row, by its number."""
        return Places(self.name, self.unit, self.files, self.form)

    def location(self, number: int) -> str:
        """How messages name a row."""
        return self.places(number)

    def rows(self, directory: str) -> datasets.Dataset:
        """The rows as :func:`raw_rows` takes them.

        Args:
            directory: where files that have to be converted are; it may go when the rows are not used any more.

        Raises:
            DataError: the source breaks off or cannot be read.
        """
        return self.load(directory).with_format("arrow")

    def read(self) -> Iterator[RawRow]:
        """All rows, one after the other."""
        with tempfile.TemporaryDirectory() as directory:
            with progress_bars(show=False):
                rows = self.rows(directory)
            for start in range(0, len(rows), _READ_ROWS):
                table = rows[start : start + _READ_ROWS]
                yield from raw_rows(table, range(start, start + table.num_rows))


def open_source(path: str, split: str, limit: int | None = None, form: TextFormat = PLAIN_TEXT) -> Source:
    """Find a source and hash its content; rows are read only when asked for.

    Args:
        path: a JSON lines, JSON, CSV or Parquet file, a pattern of files of one of these kinds, a directory written by
            `datasets`' `save_to_disk`, fetched by `hf download --repo-type dataset` or of files of one kind,
            `builtin:NAME`, or a hub name: `OWNER/NAME`, and `OWNER/NAME:CONFIG` for one of several configurations.
        split: the split of hub datasets, saved dataset dictionaries and builtin tasks; files have none.
        limit: only the first so many rows.
        form: of text files.

    Raises:
        DataError: nothing there, empty, no such split, or unreadable.
    """
    if path.startswith(BUILTIN_PREFIX):
        return _builtin(path, split, limit)
    with progress_bars(show=on_terminal()):
        return _found(path, split, limit, form)


def _found(path: str, split: str, limit: int | None, form: TextFormat) -> Source:
    try:
        file = Path(path).expanduser()
        if file.is_dir():
            pairs = _pairs_within(file)
            if pairs is not None:
                return _files(str(pairs), [str(pairs)], pairs.name, limit, form)
            return _saved_dataset(path, file, split, limit)
        if file.is_file():
            return _files(path, [path], file.name, limit, form)
        special = file.exists()
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, no permission, a NUL in it, no home
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{_printable(path)} cannot be looked for ({reason}); correct the path") from None
    path = _printable(path)
    if special:
        raise DataError(f"{path} is neither a file nor a directory; give a file with preference pairs")
    if re.search(r"[*?\[]", path):
        return _pattern(path, limit, form)
    if not is_hub_dataset(path):
        raise DataError(f"{path} does not exist; give a file ({_FORMATS}), a saved dataset or a hub name")
    return _hub_dataset(path, split, limit)


def _pairs_within(folder: Path) -> Path | None:
    """The file of a folder that `nemo-lmpo pairs` made.

    The pairs alone are the data. As a folder of `datasets`, the stages' journals and the page would count as its
    content, too: a run could not resume once the sampled model's files were copied, whose times `work/` notes.
    """
    if not (folder / PAIRS_SUMMARY).is_file():
        return None
    files = (folder / f"{Path(PAIRS_SUMMARY).stem}{suffix}" for suffix in (".jsonl", ".parquet"))
    return next((file for file in files if file.is_file()), None)


def is_hub_dataset(path: str) -> bool:
    """Whether a path that is not here names a dataset on the hub, where old ones have no owner."""
    name, colon, config = path.partition(":")
    named = is_hub_name(name, owner=bool(colon)) and (not colon or re.fullmatch(r"[\w.-]+", config) is not None)
    return named and not path.lower().endswith(FILE_SUFFIXES)


def _printable(path: str) -> str:
    """How messages name a path: as it is, unless that is not a line of reasonable length."""
    return path if path.isprintable() and len(path) <= _LONGEST_NAME else shown(path, _LONGEST_NAME)


def _builtin(path: str, split: str, limit: int | None) -> Source:
    import datasets
    import xxhash

    name = path.removeprefix(BUILTIN_PREFIX)
    rows = builtin_rows(name, split, limit)
    digest = xxhash.xxh3_128_hexdigest(json.dumps(rows).encode())
    return Source(path, f"{name}-{split}", "row", digest, lambda directory: datasets.Dataset.from_list(rows))


def _pattern(path: str, limit: int | None, form: TextFormat) -> Source:
    """All files of a pattern in the order of their names, as one source; `**` stands for folders of any depth."""
    try:
        found = sorted(glob.glob(str(Path(path).expanduser()), recursive=True))  # noqa: PTH207 (Path's knows no "/a/*")
        files = [name for name in found if Path(name).is_file()]
    except (OSError, RuntimeError, re.error) as error:
        raise DataError(f"{path} cannot be looked for ({first_line(error)}); correct the path") from None
    if not files:
        raise DataError(f"{path} matches no file; correct the pattern, or put quotes around it in a shell")
    return _files(path, files, Path(path).name, limit, form)


def _files(path: str, files: Sequence[str], short_name: str, limit: int | None, form: TextFormat) -> Source:
    """One file, or several of one kind, as a source."""
    parquet = [name.lower().endswith(".parquet") for name in files]
    for name, is_parquet in zip(files, parquet, strict=True):
        if not is_parquet and not uncompressed_name(name).endswith(TEXT_SUFFIXES):
            raise DataError(f"{name} has an unknown ending; give {_FORMATS}, a saved dataset or a hub name")
    if len(set(parquet)) > 1:
        raise DataError(f"{path} matches Parquet and text files; give a pattern for each kind")
    paths = [Path(name).expanduser() for name in files]
    for name, file in zip(files, paths, strict=True):
        try:
            if file.stat().st_size == 0:
                raise DataError(f"{name} is empty; give a file with preference pairs")
            with file.open("rb"):
                pass
        except OSError as error:
            raise DataError(f"{name} cannot be read ({error.strerror}); check its permissions") from None
    digest = _hash_files(paths) + _first(limit)
    if all(parquet):
        return Source(path, short_name, "row", digest, partial(_load_parquet, path, paths, limit))
    unit = text_unit(files[0], form) if len(files) == 1 else "row"
    load = partial(_load_text, tuple(files), limit, form)
    return Source(path, short_name, unit, digest + form.key(), load, tuple(files) if len(files) > 1 else (), form)


def _first(limit: int | None) -> str:
    return "" if limit is None else f"/first {limit}"


def _hash_files(files: list[Path]) -> str:
    """A hash of names and contents; against accidents, so a fast one."""
    import xxhash

    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"\0{file.name}\0".encode())
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()


def _load_text(paths: tuple[str, ...], limit: int | None, form: TextFormat, directory: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("number", pa.int64()), ("line", pa.large_binary())])
    rows = read_lines(paths, limit, form)
    # `datasets.from_generator` writes the same file, but checks and copies each row in Python
    with pa.OSFile(str(folder / _LINES_FILE), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        while batch := list(islice(rows, _READ_ROWS)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    return datasets.Dataset.from_file(str(folder / _LINES_FILE))


def _load_parquet(path: str, files: list[Path], limit: int | None, directory: str) -> datasets.Dataset:
    import datasets
    import pyarrow as pa

    try:
        loaded = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=directory)
    except (pa.ArrowException, OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(f"{path} is not a readable Parquet file ({first_line(cause)}); restore the file") from None
    return _head(loaded, limit)


def _saved_dataset(path: str, directory: Path, split: str, limit: int | None) -> Source:
    import datasets

    folder = directory
    try:
        if (directory / "dataset_dict.json").exists():
            splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise DataError(f"{path} has no split '{split}'; its splits are: {', '.join(splits)}")
            folder = directory / split
        elif not (directory / "state.json").exists():
            return _data_folder(path, directory.name, directory, split, limit)
        if not json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]:
            raise DataError(f"{path} holds no rows; give a dataset with preference pairs")
        loaded = datasets.Dataset.load_from_disk(str(folder))
        files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
        return _arrow_source(path, directory.name, loaded, _hash_files(files), limit)
    except DataError:
        raise
    except Exception as error:  # whatever a damaged directory makes pyarrow, json or datasets raise
        raise DataError(f"{path} is not a readable saved dataset ({first_line(error)}); save it again") from None


def _data_folder(path: str, short_name: str, folder: Path, split: str, limit: int | None, *config: str) -> Source:
    """A folder as a dataset's repository on the hub has it, or just of files of one kind."""
    import datasets

    try:
        files = [file for file in folder.rglob("*") if file.is_file()]
        digest = _hash_files(sorted(file for file in files if not file.name.startswith(".") and file.suffix != ".md"))
        described = _hash_files(sorted(file for file in files if file.suffix == ".md"))
        loaded = datasets.load_dataset(str(folder), *config, split=split, cache_dir=_cache_of(digest, described))
    except Exception as error:  # no data files, files of two kinds, a missing split, damage, ...
        raise DataError(
            f"{path} (split '{split}') is a directory that cannot be read as a dataset ({_reason(error)}); "
            "give a directory that datasets' save_to_disk wrote or `hf download --repo-type dataset` fetched, "
            f"or the files themselves ({_FORMATS}) as a list"
        ) from None
    return _arrow_source(path, short_name, loaded, digest, limit)


def _cache_of(content: str, description: str) -> str:
    """Where `datasets` keeps what it makes of a folder: a place that this content alone has.

    In its common place it takes the rows of any folder of the same name whose README has a section `configs` for those
    of this one, also those that were in it before (5.2).
    """
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "nemo_lmpo" / f"{content[:16]}-{description[:16]}")


def _reason(error: Exception) -> str:
    """What `datasets` says, whose second line names the configurations or splits that there are."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def _hub_dataset(path: str, split: str, limit: int | None) -> Source:
    import datasets

    name, *config = path.split(":")
    try:
        with cache_only_without_network():
            loaded = datasets.load_dataset(name, *config, split=split)
    except Exception as error:  # network, authentication, missing repository or split, unsafe loading script, ...
        folder = downloaded_dataset(name)
        if folder is not None:  # which `datasets` does not look for
            return _data_folder(path, path, folder, split, limit, *config)
        raise DataError(
            f"{path} (split '{split}') is not a file here and could not be loaded from the hub "
            f"({_reason(error)}); "
            "check the name (OWNER/NAME, or OWNER/NAME:CONFIG), the split and the network, fetch it with "
            f"`hf download --repo-type dataset {name}`, or give a local file"
        ) from None
    return _arrow_source(path, path, loaded, str(loaded._fingerprint), limit)


def _arrow_source(path: str, short_name: str, dataset: datasets.Dataset, fingerprint: str, limit: int | None) -> Source:
    if len(dataset) == 0:
        raise DataError(f"{path} holds no rows; give a dataset with preference pairs")
    rows = _head(dataset, limit)
    return Source(path, short_name, "row", fingerprint + _first(limit), lambda directory: rows)


def _head(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return dataset if limit is None else dataset.select(range(min(limit, len(dataset))))
