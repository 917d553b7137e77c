"""The command `nemo-lmpo data`: what a run would load, counted, measured, and shown as the model sees it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.errors import ConfigError, DataError, counted, printable, shown

_KINDS = {"PreferenceRow": "pair", "ConversationRow": "conversation", "UnpairedRow": "labelled answer"}
_TAKES = ("pairs", "conversations", "labels")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Load data by hand as a run would: counts, lengths, what is dropped and why, and three rows as the "
        "model sees them, predicted parts marked. Without a tokenizer the rows are only read.",
    )
    parser.add_argument(
        "path", metavar="SOURCE", nargs="+", help="as data.train.path: a file, folder, pattern, hub name"
    )
    parser.add_argument("--columns", metavar="{FIELD: COLUMN}", help="as data.train.columns, '{prompt: question, ...}'")
    parser.add_argument("--schema", default="auto", help="as data.train.schema (default: %(default)s)")
    parser.add_argument("--split", default="train", help="of hub datasets and saved ones (default: %(default)s)")
    parser.add_argument("--encoding", default="utf-8", help="of text files (default: %(default)s)")
    parser.add_argument("--delimiter", help="of tables (default: found out)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first rows of each source")
    parser.add_argument("--model", metavar="MODEL", help="whose tokenizer and template are used")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="a directory, hub name or builtin:NAME instead of a model's"
    )
    parser.add_argument("--template", metavar="NAME", help="as data.chat_template: a built-in name or a file")
    parser.add_argument("--max-length", type=int, default=2048, metavar="N", help="as data.max_length (2048)")
    parser.add_argument("--max-prompt-length", type=int, metavar="N", help="as data.max_prompt_length (1800)")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show (default: %(default)s)")
    parser.set_defaults(run=_run)
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.rows < 0:
        raise ConfigError(f"--rows {options.rows} must be at least 0")
    config = _config(options)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    name = options.tokenizer or (None if options.model is None else _tokenizer_of(options.model))
    if name is None:
        if options.template is not None:
            raise ConfigError("--template needs a tokenizer beside it; give --model or --tokenizer")
        pages = _only_read(config, options.rows, colour)
    else:
        pages = _tokenized(config, name, options.rows, colour)
    sys.stdout.write("\n\n".join(pages) + "\n")
    return 0


def _config(options: argparse.Namespace) -> DataConfig:
    from nemo_lmpo.config.coerce import coerce, raise_all
    from nemo_lmpo.config.rules.settings import wrong_rows
    from nemo_lmpo.runtime.safe_yaml import load_yaml

    given = {name: getattr(options, name) for name in ("path", "schema", "split", "encoding", "delimiter", "limit")}
    try:
        given["columns"] = None if options.columns is None else load_yaml(options.columns)
    except ValueError as error:
        raise ConfigError(f"--columns {shown(options.columns)} cannot be read ({printable(str(error), 200)})") from None
    prompt = options.max_prompt_length or max(min(1800, options.max_length - options.max_length // 8), 1)
    raw: dict[str, Any] = {"train": given, "chat_template": options.template, "on_bad_row": "skip"}
    raw |= {"max_length": options.max_length, "max_prompt_length": prompt}
    config: DataConfig = coerce(DataConfig, raw, prefix="data.", unknown=lambda key, value: f"unknown key {key}")
    raise_all(list(wrong_rows("data.train", config.train)))
    return config


def _tokenizer_of(model: str) -> str:
    """A directory with a model's tokenizer, or a hub name."""
    from nemo_lmpo.formats.find_model import find_model
    from nemo_lmpo.formats.model_files import open_model

    found = find_model(model).path
    opened = open_model(found)
    if opened.kind == "huggingface":
        return str(found)
    directory = Path(tempfile.mkdtemp(prefix="nemo_lmpo_data_"))
    opened.save_sidecars(directory)
    return str(directory)


def _tokenized(config: DataConfig, name: str, rows: int, colour: bool) -> list[str]:
    from nemo_lmpo.data.preference import load_preference_dataset
    from nemo_lmpo.data.show import example_text
    from nemo_lmpo.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(name)
    data = load_preference_dataset(config, config.train, tokenizer, name="train", takes=_TAKES)
    pages = [str(data.summary), *(f"first unusable row: {said}" for said in data.first_unusable)]
    places = range(0, len(data), -(-len(data) // rows)) if rows > 0 else ()
    return pages + [example_text(data[place], tokenizer, colour=colour) for place in places]


def _only_read(config: DataConfig, rows: int, colour: bool) -> list[str]:
    """Counts and rows of each source without any tokenizer."""
    from nemo_lmpo.data.messages import RowError
    from nemo_lmpo.data.read import open_source
    from nemo_lmpo.data.rows.form import RowForm
    from nemo_lmpo.data.rows.parse import parse_row
    from nemo_lmpo.data.show import row_text
    from nemo_lmpo.data.text import TextFormat

    pages, which = [], config.train
    for number, path in enumerate(which.paths):
        text = TextFormat(which.encoding, which.delimiter)
        source = open_source(path, which.split_of(number), which.limit, text)
        form = RowForm(which.schema, which.columns_of(number))
        kinds: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        examples: list[str] = []
        first = ""
        for raw in map(form.named, source.read()):
            try:
                row = parse_row(raw.value, form.schema)
            except RowError as error:
                dropped[error.reason] += 1
                first = first or f"{source.location(raw.number)}: {error.detail}"
                continue
            kinds[_KINDS[type(row).__name__]] += 1
            notes.update([*(f"rows with the unused column {name}" for name in row.columns), *row.notes])
            if len(examples) < rows:
                examples.append(row_text(row, colour=colour))
        if not kinds:
            raise DataError(f"{source.name} has no usable row ({_counts(dropped)}; {first}); check the data")
        lines = [f"{printable(path)}: {', '.join(counted(count, kind) for kind, count in kinds.most_common())}"]
        lines += [f"  {count} {printable(note)}" for note, count in sorted(notes.items())]
        lines += [f"  dropped: {_counts(dropped)}", f"  first unusable row: {printable(first)}"] if dropped else []
        pages += ["\n".join(lines), *examples]
    return pages


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {printable(name)}" for name, count in counts.most_common())
