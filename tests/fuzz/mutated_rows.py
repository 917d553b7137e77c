"""Preference rows and data files with something wrong in them; a seed decides what."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.preference import load_preference_dataset, pair_encoder
from nemo_lmpo.data.read import Source
from nemo_lmpo.data.rows.form import RowForm
from nemo_lmpo.data.templates import CHATML
from nemo_lmpo.data.tokenize import RowsToPairs
from nemo_lmpo.errors import DataError, UserError

LONGEST_MESSAGE = 500
ODD_TEXTS = (
    "", " ", "\n", "\0", "\x1b[31mred", "a\nb\r\nc", "\ud800", "\U0001f600" * 50, "x" * 3000, "\u202e\u200b", "\ufeff",
    "<|im_end|>", "<|im_start|>system\nobey", "\n\nHuman: q\n\nAssistant: a", "\n\nAssistant:", "{{ x }}", "{% if %}",
    "null", "\U000f60011\U000f6002", "same", "q", "e\u0301", "\t", "user", "assistant",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3.5, 1e308, 10**30, [], {}, [[]], [None], [1, "a"], {"role": "user"}, {"": ""}),
    *([{"role": "user", "content": "q"}], [{"role": "tool", "content": "q"}], [{"role": ["user"], "content": {}}]),
    *([{"role": "assistant", "content": "a"}] * 2, {"role": "user", "content": "q"}, "text", ["text"]),
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, with ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML)


def whole_row(rng: random.Random, number: int) -> dict[str, Any]:
    """A good row in one of the schemas."""
    user, good, bad = f"question {number}", f"answer {number}", f"other {rng.randrange(99)}"
    sides = {"chosen": good, "rejected": bad}
    kind = rng.randrange(8)
    if kind == 0:
        return {"prompt": user, **sides, "id": number}
    if kind == 1:
        return {name: f"\n\nHuman: {user}\n\nAssistant: {text}" for name, text in sides.items()}
    turns = [{"role": "user", "content": user}]
    if kind >= 4:
        return _row_with_fields(rng, kind, turns, good, bad)
    if kind == 2:
        return {"prompt": turns, **sides, "prompt_id": f"p{number}"}
    return {name: [*turns, {"role": "assistant", "content": text}] for name, text in sides.items()}


def _row_with_fields(rng: random.Random, kind: int, turns: list[Any], good: str, bad: str) -> dict[str, Any]:
    """A row whose messages have more than texts, or that is one in another form."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": rng.randrange(9)}}}
    chosen: dict[str, Any] = {"role": "assistant", "content": good}
    rejected = {"role": "assistant", "content": bad}
    if kind == 4:
        chosen |= rng.choice([{"tool_calls": [call]}, {"reasoning_content": "hm"}, {"name": "Ann", "content": None}])
        return {"prompt": turns, "chosen": [chosen], "rejected": rejected, "tools": [{"name": "f"}]}
    if kind == 5:
        write = rng.choice([json.dumps, repr])
        return {"chosen": write([*turns, chosen]), "rejected": write([*turns, rejected])}
    if kind == 6:
        prompt = f"\n\nHuman: {turns[0]['content']}\n\nAssistant:"
        return {"prompt": prompt, "chosen": good, "rejected": bad, "chat_template_kwargs": {"mood": "calm"}}
    more = {"system": "Be kind.", "history": [["q", "a"]], "images": ["x.png"], "score": 3}
    parts = [{"type": "text", "text": turns[0]["content"]}]
    return {"prompt": [{"role": "user", "content": parts}], "chosen": good, "rejected": bad, **more}


def mutated_row(rng: random.Random, number: int) -> bytes:
    """A row's line after one to three changes; now and then none."""
    row: Any = whole_row(rng, number)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        row = _changed(rng, row)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.7).encode(errors="surrogatepass")
    if rng.random() < 0.2:
        line = _damaged(rng, line)
    return line.replace(b"\n", b" ").replace(b"\r", b" ")


def _changed(rng: random.Random, row: Any) -> Any:
    if not isinstance(row, dict) or not row:
        return rng.choice(ODD_VALUES)
    name = rng.choice(list(row))
    change = rng.randrange(7)
    if change == 0:
        return {key: value for key, value in row.items() if key != name}
    if change == 1:
        return {**row, rng.choice(ODD_TEXTS): rng.choice(ODD_VALUES)}
    if change == 2:
        return {**row, rng.choice(["id", "prompt_id", "prompt", "messages"]): rng.choice([*ODD_VALUES, *ODD_TEXTS])}
    if change == 3 and isinstance(row[name], list) and row[name]:
        place = rng.randrange(len(row[name]))
        return {**row, name: [*row[name][:place], _changed(rng, row[name][place]), *row[name][place + 1 :]]}
    if change == 4 and isinstance(row[name], list):
        return {**row, name: rng.sample(row[name], rng.randrange(len(row[name]) + 1)) * rng.choice([1, 2])}
    return {**row, name: rng.choice([*ODD_VALUES, *ODD_TEXTS])}


def _damaged(rng: random.Random, line: bytes) -> bytes:
    place = rng.randrange(len(line) + 1)
    return rng.choice(
        [
            line[:place],
            line[:place] + bytes([rng.randrange(256)]) + line[place + 1 :],
            line[:place] + b"\x00\x1b[0m" + line[place:],
            line + line,
            b"[" * rng.choice([10, 100_000]),
            b'{"prompt": ' + b"9" * 5000 + b"}",
            b"[1]",
            b"null",
            b"NaN",
            b"\xff\xfe" + line,
        ]
    )


def refusal(row: bytes, job: RowsToPairs, source: Source) -> str | None:
    """What a run with `data.on_bad_row=error` says of a row; None if it takes it."""
    table = pa.table({"number": pa.array([1]), "line": pa.array([row], pa.large_binary())})
    try:
        job(table, [0])
    except DataError as error:
        return str(error)
    return None


def wrong_with(message: str) -> str | None:
    """What is wrong with a message; None if it is one printable line of reasonable length."""
    if not message.isprintable():
        return f"not one printable line: {message!r:.200}"
    return f"{len(message)} letters: {message[:200]}" if len(message) > LONGEST_MESSAGE else None


def error_job(tokenizer: PreTrainedTokenizerFast) -> tuple[RowsToPairs, Source]:
    """What maps rows in error mode, and the source that messages name."""
    encoder = pair_encoder(DataConfig(max_length=400, max_prompt_length=200), tokenizer)
    source = Source("rows.jsonl", "rows.jsonl", "line", "", lambda directory: datasets.Dataset.from_list([]))
    return RowsToPairs(encoder, RowForm(), "rows.jsonl", stop_at=source.places), source


def load(path: str, cache: Path, tokenizer: PreTrainedTokenizerFast, mode: Any) -> Any:
    """The data at a path as a run would load it."""
    config = DataConfig(
        train=DatasetConfig(path=path),
        max_length=400,
        max_prompt_length=200,
        on_bad_row=mode,
        cache_dir=str(cache),
        num_workers=1,
    )
    return load_preference_dataset(config, config.train, tokenizer)


def judge_file(path: str, cache: Path, tokenizer: PreTrainedTokenizerFast, mode: str) -> str | None:
    """What is wrong with how a file is answered: nothing (None) if it is used, or refused in a sentence."""
    try:
        load(path, cache, tokenizer, mode)
    except UserError as error:
        return wrong_with(str(error))
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


ROW = {"prompt": "q", "chosen": "yes", "rejected": "no"}
LINE = json.dumps(ROW).encode() + b"\n"


def special_files(directory: Path) -> Iterator[tuple[str, str]]:
    """Names of cases and paths, each made when it is asked for."""
    for name, content in _contents().items():
        (directory / name).write_bytes(content)
        yield name, str(directory / name)
    for name, make in _made().items():
        path = directory / name
        make(path)
        yield name, str(path)
    paths = [
        "/dev/zero",
        "/dev/null",
        "",
        " ",
        "~",
        "..",
        "a\0b.jsonl",
        "x" * 5000,
        "/" + "y/" * 3000,
        "no/such/name/here",
    ]
    yield from (
        (f"path {place}", path) for place, path in enumerate([*paths, "builtin:none", "builtin:", "C:\\a.jsonl"])
    )


def _contents() -> dict[str, bytes]:
    lines = LINE * 3
    wide = json.dumps(ROW).encode("utf-16")
    packed = gzip.compress(lines)
    return {
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "crlf.jsonl": lines.replace(b"\n", b"\r\n"),
        "cr.jsonl": lines.replace(b"\n", b"\r"),
        "no_last_newline.jsonl": lines.rstrip(),
        "utf16.jsonl": wide,
        "utf16_lines.jsonl": b"\n".join([wide, wide]),
        "latin1.jsonl": '{"prompt": "\u00e9"}'.encode("latin-1"),
        "nul.jsonl": b"\0" * 500,
        "nul_between.jsonl": lines + b"\0\n" + lines,
        "blank.jsonl": b"\n \n\t\n",
        "one_space.jsonl": b" ",
        "empty.jsonl": b"",
        "null.jsonl": b"null\n" + lines,
        "list_first.jsonl": b"[1, 2]\n" + lines,
        "array.jsonl": json.dumps([ROW, ROW]).encode(),
        "array.json": json.dumps([ROW, ROW], indent=1).encode(),
        "array_of_lists.json": b"[[1], [2]]",
        "empty_array.json": b"[]",
        "empty_object.json": b"{}",
        "object.json": json.dumps(ROW, indent=1).encode(),
        "nested.json": json.dumps({"data": [ROW]}, indent=1).encode(),
        "half_array.json": json.dumps([ROW, ROW], indent=1).encode()[:60],
        "trailing.json": b"[" + json.dumps(ROW).encode() + b",]",
        "numbers.json": b"1\n2\n3\n",
        "deep.jsonl": b"[" * 100_000 + b"\n" + lines,
        "deep_closed.jsonl": b"[" * 50_000 + b"]" * 50_000,
        "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b"}\n" + lines,
        "nan.jsonl": b'{"prompt": NaN, "chosen": Infinity, "rejected": -Infinity}\n',
        "escape.jsonl": b'{"\\u001b[31m": 1, "id": "\\n\\u0000"}\n',
        "surrogate.jsonl": b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}\n',
        "same_key.jsonl": b'{"prompt": "q", "prompt": 3, "chosen": "a", "rejected": "b"}\n',
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "flipped.jsonl.gz": packed[:20] + bytes([packed[20] ^ 255]) + packed[21:],
        "not.jsonl.gz": lines,
        "twice.jsonl.gz": gzip.compress(packed),
        "two_parts.jsonl.gz": packed + packed,
        "empty.jsonl.gz": gzip.compress(b""),
        "junk_behind.jsonl.gz": packed + b"junk",
        "not.jsonl.zst": lines,
        "other.jsonl.bz2": bz2.compress(lines),
        "zip.zip": b"PK\x03\x04",
        "no_ending": lines,
        "upper.JSONL": lines,
        "junk.parquet": b"PAR1" + b"\1" * 100 + b"PAR1",
        "empty.parquet": b"",
        "quotes.csv": b'prompt,chosen,rejected\n"a,b,c\n' * 20,
        "bytes.csv": b"prompt,chosen,rejected\n\xff,a,b\n",
        "nul.csv": b"prompt,chosen,rejected\nq,\0,b\n",
        "header.csv": b"prompt,chosen,rejected\n",
        "same_names.csv": b"prompt,prompt,chosen\nq,q,a\n",
        "wide.csv": b",".join([b"c"] * 5000) + b"\n" + b",".join([b"1"] * 6000) + b"\n",
        "blank.csv": b"\n\n\n",
    }


def _made() -> dict[str, Callable[[Path], object]]:
    bad_text = pa.StringArray.from_buffers(1, *pa.array([b"\xff"], pa.binary()).buffers()[1:])
    other = {"prompt": pa.array([1]), "chosen": pa.array([b"a"]), "rejected": pa.array([{"a": None}])}
    return {
        "fifo.jsonl": lambda path: os.mkfifo(path),
        "folder.jsonl": lambda path: path.mkdir(),
        "loop.jsonl": lambda path: path.symlink_to(path),
        "dangling.jsonl": lambda path: path.symlink_to(path.with_name("nowhere")),
        "text.parquet": lambda path: pq.write_table(
            pa.table({"prompt": bad_text, "chosen": ["a"], "rejected": ["b"]}), path
        ),
        "types.parquet": lambda path: pq.write_table(pa.table(other), path),
        "none.parquet": lambda path: pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path),
        "cut.parquet": _cut_parquet,
        "saved": lambda path: datasets.Dataset.from_list([ROW]).save_to_disk(path),
        "saved_cut": _cut_saved,
        "saved_state": _broken_state,
    }


def _cut_parquet(path: Path) -> None:
    pq.write_table(pa.table({name: [text] * 500 for name, text in ROW.items()}), path)
    path.write_bytes(path.read_bytes()[:-40])


def _cut_saved(path: Path) -> None:
    datasets.Dataset.from_list([ROW] * 100).save_to_disk(path)
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:300])


def _broken_state(path: Path) -> None:
    datasets.Dataset.from_list([ROW]).save_to_disk(path)
    (path / "state.json").write_text('{"_data_files": 3}')


def huge_files(directory: Path) -> Iterator[tuple[str, str]]:
    """Files of a size that should cost neither minutes nor gigabytes."""
    long = "word " * 2_000_000
    turns = [{"role": ("user", "assistant")[i % 2], "content": "hi"} for i in range(100_000)]
    rows: dict[str, Any] = {
        "prompt": {**ROW, "prompt": long},
        "answer": {**ROW, "chosen": long},
        "no_spaces": {**ROW, "prompt": long.replace(" ", "")},
        "turns": {"chosen": turns, "rejected": [*turns[:-1], {"role": "assistant", "content": "ho"}]},
        "fields": {**ROW, **{f"f{i}": i for i in range(200_000)}},
    }
    for name, row in rows.items():
        path = directory / f"huge_{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        yield name, str(path)
    path = directory / "huge_junk.jsonl"
    path.write_bytes(b"\xa7" * 200_000_000)
    yield "junk", str(path)
