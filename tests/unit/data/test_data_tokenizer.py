from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.data.templates import TEMPLATES
from nemo_lmpo.data.tokenizer import (
    chat_template_text,
    check_vocabulary,
    load_tokenizer,
    padding_id,
    tokenizer_fingerprint,
)
from nemo_lmpo.errors import ConfigError
from tests.unit.data.pair_rows import package_file


def test_directory_loads_as_saved(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny.get_vocab()


def test_sentencepiece_directory_puts_a_bos_in_front_and_finds_its_template(
    mistral: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert mistral("hi")["input_ids"] == [1, 12014]
    assert mistral("hi", add_special_tokens=False)["input_ids"] == [12014]
    assert (mistral.bos_token, mistral.eos_token, mistral.unk_token) == ("<s>", "</s>", "<unk>")
    shutil.copy(package_file("mistral_common", "data", "tokenizer.model.v1"), tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "one"}))
    assert load_tokenizer(str(tmp_path)).get_chat_template() == "one"
    (tmp_path / "chat_template.jinja").write_text("two")
    assert load_tokenizer(str(tmp_path)).get_chat_template() == "two"
    mistral.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    text = "<s>[INST] a    b [/INST] Yo.</s>"
    assert again(text)["input_ids"] == mistral(text)["input_ids"]


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.tokenizer=.*missing is not a directory"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match=r"cannot be loaded .*tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="file is not a directory"):
        load_tokenizer(str(file))


def test_llama3_tiktoken_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ConfigError, match=r"not a SentencePiece model .*tiktoken"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["unigram", "bpe without a space in front"])
def test_other_sentencepiece_models_are_refused(tmp_path: Path, kind: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(f"the quick brown fox {i} jumps over the lazy dog, it's number {i}." for i in range(50)))
    options = {"model_type": "unigram"} if kind == "unigram" else {"model_type": "bpe", "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, hard_vocab_limit=False,
        minloglevel=2, **options,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="not a BPE model as Llama 2 and Mistral have"):
        load_tokenizer(str(tmp_path))


def test_mistral_v3_file(tmp_path: Path) -> None:
    path = package_file("mistral_common", "data", "mistral_instruct_tokenizer_240323.model.v3")
    shutil.copy(path, tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(str(tmp_path))
    # as mistral-common encodes a user's "hi"; the markers are tokens of their own here
    assert tokenizer("<s>[INST]hi[/INST]", add_special_tokens=False)["input_ids"] == [1, 3, 12782, 4]


def test_choice_of_template(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert chat_template_text(None, tiny) == tiny.chat_template
    for name, text in TEMPLATES.items():
        assert chat_template_text(name, tiny) == text
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}\n")
    assert chat_template_text(str(file), tiny) == "{{ messages }}\n"
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="is an empty file"):
        chat_template_text(str(file), tiny)
    with pytest.raises(ConfigError, match=r"neither a readable file .*did you mean 'llama3'"):
        chat_template_text("lama3", tiny)


def test_tokenizer_without_template_names_the_choices(mistral: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match=r"no chat template; set data\.chat_template .*plain"):
        chat_template_text(None, mistral)


def test_vocabulary_must_fit_the_model(tiny: PreTrainedTokenizerBase) -> None:
    check_vocabulary(tiny, 64)
    check_vocabulary(tiny, 128)
    with pytest.raises(ConfigError, match=r"ids up to 63, but the model's vocab_size is 63; .*at least 64"):
        check_vocabulary(tiny, 63)


def test_padding_id(tiny: PreTrainedTokenizerBase, mistral: PreTrainedTokenizerBase) -> None:
    assert padding_id(tiny) == tiny.pad_token_id == 0
    assert padding_id(mistral) == mistral.eos_token_id


def test_fingerprint_follows_what_decides_ids(tiny: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path)
    again = load_tokenizer(str(tmp_path))
    again.chat_template = "other"
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(load_tokenizer(str(tmp_path)))
    again.add_tokens(["new"])
    assert tokenizer_fingerprint(again) != tokenizer_fingerprint(load_tokenizer(str(tmp_path)))


def test_a_tokenizer_with_several_templates(tiny: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tiny)
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    with pytest.raises(ConfigError, match=r"several chat templates and none called default; .* one of rag, tool_use"):
        chat_template_text(None, tokenizer)
    assert chat_template_text("tool_use", tokenizer) == "T"
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    assert chat_template_text(None, tokenizer) == "D"
