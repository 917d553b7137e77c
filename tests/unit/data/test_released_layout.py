"""Token ids of the paper's four settings, ours and as the released trainers lay them.

The texts are written down here from the rules of the released code (`apply_chat_template` of its run script,
`tokenize_row` of its trainer), and made ids by the tokenizers' own libraries, section by section between special
tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data.preference import pair_encoder
from nemo_lmpo.data.schema import PreferenceRow
from tests.unit.data.pair_rows import package_file

PROMPT, GOOD, BAD = "Name a fruit.", "An apple.", "No"
LENGTHS: dict[str, Any] = {"max_length": 2048, "max_prompt_length": 1800}


@pytest.fixture(scope="module")
def mistral_ids() -> Callable[..., Any]:
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(str(package_file("mistral_common", "data", "tokenizer.model.v1")))
    special = {"<s>": pieces.bos_id(), "</s>": pieces.eos_id()}
    return sections(special, pieces.encode)


@pytest.fixture(scope="module")
def llama3_ids() -> Callable[..., Any]:
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    special = {
        "<|begin_of_text|>": 128000,
        "<|start_header_id|>": 128006,
        "<|end_header_id|>": 128007,
        "<|eot_id|>": 128009,
    }
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = load_tiktoken_bpe(str(package_file("llama_models", "llama3", "tokenizer.model")))
    encoding = tiktoken.Encoding("llama3", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return lambda text: encoding.encode(text, allowed_special="all")


def sections(special: dict[str, int], encode: Callable[..., Any]) -> Callable[..., Any]:
    split = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    def ids(text: str) -> list[int]:
        parts = [part for part in split.split(text) if part]
        return [number for part in parts for number in ([special[part]] if part in special else encode(part))]

    return ids


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


HISTORY = [turn("user", "Hi"), turn("assistant", "Yo."), turn("user", PROMPT)]
SETTINGS: dict[str, Any] = {
    # name: tokenizer, settings of the recipe, then (prompt, what follows the chosen text and stands before it) of
    # ours and of the released trainer
    "mistral_7b_instruct": (
        "mistral",
        {"chat_template": "mistral"},
        ("<s>[INST] Hi [/INST] Yo.</s>[INST] Name a fruit. [/INST]", " {}</s>"),
        ("<s>[INST] Hi [/INST] Yo. </s>[INST] Name a fruit. [/INST]", " {} </s>"),
    ),
    "mistral_7b_base": (
        "mistral",
        {"chat_template": "zephyr", "system_prompt": ""},
        (
            "<s><|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo.</s>\n"
            "<|user|>\nName a fruit.</s>\n<|assistant|>\n",
            "{}</s>",
        ),
        (
            "<s><|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo.</s>\n<|user|>\nName a fruit.</s>\n",
            "<|assistant|>\n{}</s>\n</s>",
        ),
    ),
    "llama3_8b": (
        "llama3",
        {"chat_template": "llama3"},
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{}<|eot_id|>",
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYo.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
        ),
    ),
}
SETTINGS["llama3_8b_base"] = SETTINGS["llama3_8b"]


@pytest.mark.parametrize("compat", [None, "released_code"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_ids_of_the_four_settings(setting: str, compat: Any, request: pytest.FixtureRequest) -> None:
    name, fields, ours, released = SETTINGS[setting]
    prompt, response = ours if compat is None else released
    ids = request.getfixturevalue(f"{name}_ids")
    encoder = pair_encoder(DataConfig(compat=compat, **LENGTHS, **fields), request.getfixturevalue(name))
    row: Any
    (row,) = encoder.encode([PreferenceRow(HISTORY, GOOD, BAD)])
    before = ids(prompt)
    assert row.prompt_ids == before
    for found, text in ((row.chosen_ids, GOOD), (row.rejected_ids, BAD)):
        # the response's ids are those that the whole has beyond the prompt's
        whole = ids(prompt + response.format(text))
        assert whole[: len(before)] == before
        assert found == whole[len(before) :]


def test_tokens_that_the_released_layout_adds(
    mistral: PreTrainedTokenizerBase, llama3: PreTrainedTokenizerBase
) -> None:
    """Llama 3's header is four tokens; Mistral's blank is one; zephyr's header, newline and second EOS are more."""
    ours: Any
    theirs: Any
    compats: list[Any] = [None, "released_code"]
    cases: list[tuple[PreTrainedTokenizerBase, dict[str, Any], int]] = [
        (llama3, {"chat_template": "llama3"}, 4),
        (mistral, {"chat_template": "mistral"}, 1),
    ]
    for tokenizer, fields, more in cases:
        ours, theirs = (
            pair_encoder(DataConfig(compat=compat, **LENGTHS, **fields), tokenizer).encode(
                [PreferenceRow([turn("user", PROMPT)], GOOD, BAD)]
            )[0]
            for compat in compats
        )
        assert len(theirs.chosen_ids) == len(ours.chosen_ids) + more
        assert len(theirs.rejected_ids) == len(ours.rejected_ids) + more


@pytest.mark.parametrize(
    ("length", "prompt", "uncut", "left"),
    [
        # tokens of prompt, chosen and rejected before and after, from the released trainer's rules
        (1024, 512, (609, 202, 282), (609, 202, 282)),
        (2048, 1800, (68, 2201, 601), (68, 248, 248)),
        (1024, 512, (68, 1041, 201), (68, 512, 201)),
        (1024, 512, (900, 202, 282), (512, 202, 282)),
        (1024, 512, (900, 602, 282), (512, 512, 282)),
    ],
)
def test_lengths_as_the_released_trainer_cuts_them(
    length: int, prompt: int, uncut: tuple[int, int, int], left: tuple[int, int, int], llama3: PreTrainedTokenizerBase
) -> None:
    words = [" a" * (uncut[0] - 1), " a" * (uncut[1] - 1), " b" * (uncut[2] - 1)]
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    config = DataConfig(compat="released_code", max_length=length, max_prompt_length=prompt)
    llama3_plain = ReplacedTemplate(llama3, template)
    row: Any
    (row,) = pair_encoder(config, llama3_plain).encode([PreferenceRow([turn("user", words[0])], words[1], words[2])])
    assert (len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)) == left
    assert (row.prompt_ids[0] == 128000) == (left[0] == uncut[0]), "a cut prompt has lost its BOS"
    assert row.prompt_cut == (left[0] < uncut[0])
    assert row.response_cut == (left[1:] < uncut[1:])


class ReplacedTemplate:
    """A tokenizer with another chat template of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def get_chat_template(self) -> str:
        return self._template

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_last_prompt_token_that_merges_belongs_to_the_response(llama3: PreTrainedTokenizerBase) -> None:
    config = DataConfig(compat="released_code", **LENGTHS)
    encoder = pair_encoder(config, ReplacedTemplate(llama3, "{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    row: Any
    (row,) = encoder.encode([PreferenceRow([turn("user", "Say Hel")], "lo", "p")])
    assert llama3.decode(row.prompt_ids) == "<|begin_of_text|>Say"
    assert llama3.decode(row.chosen_ids) == " Hello<|eot_id|>"
    assert llama3.decode(row.rejected_ids) == " Help<|eot_id|>"
