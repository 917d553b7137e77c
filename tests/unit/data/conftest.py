from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.schema import DataConfig, DatasetConfig
from nemo_lmpo.data.tokenizer import load_tokenizer
from tests.unit.data.pair_rows import package_file


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerBase:
    return load_tokenizer("builtin:tiny")


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """The first Mistral tokenizer, from its SentencePiece file as Mistral publishes it."""
    directory = tmp_path_factory.mktemp("mistral")
    shutil.copy(package_file("mistral_common", "data", "tokenizer.model.v1"), directory / "tokenizer.model")
    return load_tokenizer(str(directory))


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerBase:
    """Llama 3's tokenizer from Meta's file; like the hub's, it puts a BOS in front of texts by itself."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pytest.importorskip("tiktoken", reason="needs the package tiktoken to read Llama 3's tokenizer file")
    path = package_file("llama_models", "llama3", "tokenizer.model")
    named = ["begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1"]
    named += ["finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag"]
    special = [f"<|{name}|>" for name in named]
    special += [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(special))]
    backend = TikTokenConverter(vocab_file=str(path), extra_special_tokens=special).converted()
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def smollm2(smollm2_dir: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(smollm2_dir))


@pytest.fixture(scope="session")
def real_pairs(shared_dir: Path) -> list[dict[str, Any]]:
    """Rows of real preference data."""
    path = shared_dir / "data" / "alpaca_pairs_train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"needs the preference pairs {path}")
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Any]:
    def write(rows: list[Any], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        opener = gzip.open if name.endswith(".gz") else open
        with opener(path, "wt", encoding="utf-8") as stream:
            for row in rows:
                stream.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
        return str(path)

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., Any]:
    """A configuration for the tiny tokenizer's lengths with a cache of its own."""

    def make(
        path: list[str] | str,
        *,
        split: str = "train",
        weights: list[Any] | None = None,
        schema: Any = "auto",
        limit: int | None = None,
        **changes: Any,
    ) -> DataConfig:
        train = DatasetConfig(path=path, split=split, weights=weights, schema=schema, limit=limit)
        settings = {"max_length": 64, "max_prompt_length": 32, "num_workers": 1, "cache_dir": str(tmp_path / "cache")}
        return DataConfig(train=train, **{**settings, **changes})

    return make
