"""Texts to ids, against transformers' own chat tokenisation with real tokenizers, and by hand with a toy one."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_lmpo.data.encode import EncodedRow, PairEncoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.data.special_tokens import SpecialTokens
from nemo_lmpo.data.templates import TEMPLATES
from nemo_lmpo.errors import ConfigError
from tests.unit.data.pair_rows import package_file

USER = {"role": "user", "content": "Hi there"}
SYSTEM = {"role": "system", "content": "Be kind."}
HISTORY = [SYSTEM, USER, {"role": "assistant", "content": "Yo."}, {"role": "user", "content": "Go on"}]
LONG: dict[str, Any] = {"max_length": 4000, "max_prompt_length": 2000}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    prompt: list[dict[str, Any]],
    chosen: str = "Good.",
    rejected: str = "Bad",
    **settings: Any,
) -> Any:
    encoder = PairEncoder(tokenizer, TEMPLATES.get(template, template), **{**LONG, **settings})
    return encoder.encode([PreferenceRow(prompt, chosen, rejected)])[0]


def toy(
    bos: str | None = "<s>", eos: str | None = "</s>", adds_bos: bool = False, more: list[str] | tuple[Any, ...] = ()
) -> PreTrainedTokenizerBase:
    """Byte-level BPE whose only merge is `l` with `d`; ids of characters are easy to check by decoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "ld"])}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[("l", "d")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(token for token in (bos, eos, *more) if token))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


@pytest.mark.parametrize("prompt", [[USER], [SYSTEM, USER], HISTORY])
@pytest.mark.parametrize(
    ("name", "template", "end", "end_id"),
    [
        ("smollm2", None, "<|im_end|>", 2),
        ("smollm2", "chatml", "<|im_end|>", 2),
        ("llama3", "llama3", "<|eot_id|>", 128009),
        ("mistral", "mistral", "</s>", 2),
        ("mistral", "zephyr", "</s>", 2),
        ("tiny", None, "<eos>", 2),
    ],
)
def test_ids_are_those_of_the_whole_conversation(
    name: str, template: str | None, end: str, end_id: int, prompt: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(name)
    text = TEMPLATES[template] if template else tokenizer.get_chat_template()
    row = encode(tokenizer, text, prompt, "sort a b", "b a")
    options = {"chat_template": text, "tokenize": True, "return_dict": False}
    with_header = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)
    # zephyr's template writes no BOS, but the tokenizer puts one in front of any text
    bos = [tokenizer.bos_token_id] if template == "zephyr" else []
    assert row.prompt_ids == bos + with_header
    for ids, response in ((row.chosen_ids, "sort a b"), (row.rejected_ids, "b a")):
        whole = bos + tokenizer.apply_chat_template([*prompt, said(response)], **options)
        assert whole[: len(row.prompt_ids) + len(ids)] == row.prompt_ids + ids
        assert ids[-1] == end_id
        assert tokenizer.decode(ids).strip() == f"{response}{' ' * (name == 'tiny')}{end}"
    assert not row.prompt_cut
    assert not row.response_cut


def test_mistral_ids_as_mistral_publishes_them(mistral: PreTrainedTokenizerBase) -> None:
    row = encode(mistral, "mistral", [{"role": "user", "content": "hi"}])
    assert row.prompt_ids == [1, 733, 16289, 28793, 12014, 733, 28748, 16289, 28793]


def test_mistral_agrees_with_sentencepiece_on_real_text(
    mistral: PreTrainedTokenizerBase, real_pairs: list[dict[str, Any]]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(str(package_file("mistral_common", "data", "tokenizer.model.v1")))
    texts = ["a    b\n\n  c", "   lead", "x      y            z", "  ", "日本語 😀", "tab\tq"]
    texts += [row[side][-1]["content"] for row in real_pairs[:150] for side in ("chosen", "rejected")]
    for text in texts:
        assert mistral(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_real_pairs_have_one_bos_one_end_and_decode_to_their_texts(
    real_pairs: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    for name, template in (("smollm2", None), ("llama3", "llama3"), ("mistral", "mistral")):
        tokenizer = request.getfixturevalue(name)
        encoder = PairEncoder(tokenizer, TEMPLATES[template] if template else tokenizer.get_chat_template(), **LONG)
        rows = [
            PreferenceRow(row["chosen"][:-1], row["chosen"][-1]["content"], row["rejected"][-1]["content"])
            for row in real_pairs[:60]
        ]
        encoded: Any
        for row, encoded in zip(rows, encoder.encode(rows), strict=True):
            assert encoded.prompt_ids[0] == tokenizer.bos_token_id
            assert encoded.prompt_ids[1] != tokenizer.bos_token_id
            for ids, text in ((encoded.chosen_ids, row.chosen), (encoded.rejected_ids, row.rejected)):
                assert ids.count(tokenizer.eos_token_id) == 1
                assert ids[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False).strip() == text.strip()


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("emits_bos", [0, 1, 2])
def test_bos_whatever_template_and_tokenizer_do(adds_bos: bool, emits_bos: int) -> None:
    tokenizer = toy(adds_bos=adds_bos)
    template = "{{ bos_token }}" * emits_bos + TEMPLATES["plain"]
    row = encode(tokenizer, template, [USER])
    expected = "<s>Hi there" if adds_bos or emits_bos else "Hi there"
    assert tokenizer.decode(row.prompt_ids) == expected
    assert tokenizer.bos_token_id not in row.chosen_ids + row.rejected_ids


def test_no_bos_for_tokenizers_without_one() -> None:
    row = encode(toy(bos=None), "plain", [USER])
    assert len(row.prompt_ids) == len("Hi there")


def test_turn_marker_that_is_called_bos_is_not_added(smollm2: PreTrainedTokenizerBase) -> None:
    row = encode(smollm2, "plain", [USER])
    assert row.prompt_ids == smollm2("Hi there")["input_ids"]
    assert smollm2.bos_token_id not in row.prompt_ids


def test_plain_template_keeps_texts_and_ends_with_eos() -> None:
    tokenizer = toy()
    row = encode(tokenizer, "plain", HISTORY, " Good.\n", "Bad")
    assert tokenizer.decode(row.prompt_ids) == "Be kind.\n\nHi there\n\nYo.\n\nGo on"
    assert tokenizer.decode(row.chosen_ids) == " Good.\n</s>"
    assert tokenizer.decode(row.rejected_ids) == "Bad</s>"


def test_template_whose_end_marker_is_no_token_gets_eos() -> None:
    tokenizer = toy()
    row = encode(tokenizer, "chatml", [USER])
    assert tokenizer.decode(row.chosen_ids) == "Good.<|im_end|></s>"
    with pytest.raises(ConfigError, match="set eos_token"):
        encode(toy(eos=None), "chatml", [USER])
    row = encode(toy(more=["<|im_end|>"]), "chatml", [USER])
    assert toy(more=["<|im_end|>"]).decode(row.chosen_ids) == "Good.<|im_end|>"


def test_qwen_without_thinking_puts_the_empty_thought_into_the_prompt() -> None:
    """As Qwen3 is prompted for an answer without thinking; earlier answers have no thought."""
    tokenizer = toy(bos=None, more=["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    row = encode(tokenizer, "chatml_no_thinking", HISTORY)
    assert tokenizer.decode(row.prompt_ids) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi there<|im_end|>\n"
        "<|im_start|>assistant\nYo.<|im_end|>\n<|im_start|>user\nGo on<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert tokenizer.decode(row.chosen_ids) == "Good.<|im_end|>"
    assert tokenizer.decode(row.rejected_ids) == "Bad<|im_end|>"


def test_qwen_with_thinking_learns_the_thought_too() -> None:
    tokenizer = toy(bos=None, more=["<|im_start|>", "<|im_end|>", "<think>", "</think>"])
    row = encode(tokenizer, "chatml", [USER], "<think>\nHm.\n</think>\n\nGood.")
    assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(row.chosen_ids) == "<think>\nHm.\n</think>\n\nGood.<|im_end|>"


@pytest.mark.parametrize("template", ["plain", "zephyr", "mistral"])
def test_end_token_that_the_text_has_already_is_not_doubled(template: str) -> None:
    row = encode(toy(), template, [USER], "Good.</s>", "Bad")
    assert toy().decode(row.chosen_ids).strip() == "Good.</s>"
    assert toy().decode(row.rejected_ids).strip() == "Bad</s>"


def test_prompt_and_response_that_would_merge_into_one_token() -> None:
    tokenizer = toy()
    row = encode(tokenizer, "plain", [{"role": "user", "content": "hel"}], "d!", "p!")
    assert tokenizer.decode(row.prompt_ids) == "hel"
    assert tokenizer.decode(row.chosen_ids) == "d!</s>"
    assert tokenizer.convert_ids_to_tokens(row.chosen_ids) == ["d", "!", "</s>"]
    assert tokenizer.convert_ids_to_tokens(row.rejected_ids) == ["p", "!", "</s>"]


def test_merging_response_gets_no_space_in_front(mistral: PreTrainedTokenizerBase) -> None:
    row = encode(mistral, "plain", [{"role": "user", "content": "Hello wor"}], "ld!", "k!")
    assert mistral.decode(row.prompt_ids + row.chosen_ids) == "<s> Hello world!</s>"
    assert mistral.decode(row.prompt_ids + row.rejected_ids) == "<s> Hello work!</s>"


@pytest.mark.parametrize("name", ["smollm2", "llama3"])
def test_leading_newline_that_merges_with_the_header(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    template = tokenizer.get_chat_template() if name == "smollm2" else TEMPLATES["llama3"].replace(" | trim", "")
    row = encode(tokenizer, template, [USER], "\nGood.", "Bad")
    alone = tokenizer.apply_chat_template(
        [USER], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert row.prompt_ids == alone
    assert tokenizer.decode(row.chosen_ids) == "\nGood." + tokenizer.eos_token


def test_generation_prompt_that_finished_conversations_do_not_have() -> None:
    thinking = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
    )
    tokenizer = toy()
    row = encode(tokenizer, thinking, [USER], " Good. ", "Bad")
    assert tokenizer.decode(row.prompt_ids) == "[user]Hi there</s>[assistant]"
    assert tokenizer.decode(row.chosen_ids) == "Good.</s>"
    assert tokenizer.decode(row.rejected_ids) == "Bad</s>"


def test_template_that_takes_a_row_not_at_all() -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["plain"]
    )
    encoder = PairEncoder(toy(), strict, **LONG)
    rows = [PreferenceRow([USER], "a", "b"), PreferenceRow([SYSTEM, USER], "a", "b"), PreferenceRow([USER], "c", "d")]
    good, bad, also_good = encoder.encode(rows)
    assert isinstance(good, EncodedRow)
    assert isinstance(also_good, EncodedRow)
    assert isinstance(bad, RowError)
    assert bad.reason == "refused by the chat template"
    assert "no system" in bad.detail
    mutable = "{{ messages | length }}" + TEMPLATES["plain"]
    assert "changes the prompt" in encode(toy(), mutable, [USER]).detail


def test_templates_that_cannot_be_used_at_all() -> None:
    with pytest.raises(ConfigError, match="cannot render a plain exchange"):
        encode(toy(), "{{ raise_exception('never') }}", [USER])
    with pytest.raises(ConfigError, match="cannot render a plain exchange"):
        encode(toy(), "{% if %}", [USER])
    with pytest.raises(ConfigError, match="leaves out the assistant's text"):
        encode(toy(), "{{ messages[0]['content'] }}", [USER])


def test_system_prompt_is_for_conversations_without_one() -> None:
    tokenizer = toy()
    row = encode(tokenizer, "plain", [USER], system_prompt="Short!")
    assert tokenizer.decode(row.prompt_ids) == "Short!\n\nHi there"
    row = encode(tokenizer, "plain", [SYSTEM, USER], system_prompt="Short!")
    assert tokenizer.decode(row.prompt_ids) == "Be kind.\n\nHi there"


def test_mistral_template_puts_the_system_text_into_the_first_user_turn() -> None:
    tokenizer = toy()
    row = encode(tokenizer, "mistral", HISTORY)
    assert tokenizer.decode(row.prompt_ids) == "<s>[INST] Be kind.\n\nHi there [/INST] Yo.</s>[INST] Go on [/INST]"
    assert tokenizer.decode(row.chosen_ids) == " Good.</s>"


def test_truncation_keeps_the_bos_and_the_end_of_the_prompt() -> None:
    tokenizer = toy(adds_bos=True)
    row = encode(
        tokenizer, "plain", [{"role": "user", "content": "abcdefgh"}], "123456", "12", max_prompt_length=5, max_length=9
    )
    assert tokenizer.decode(row.prompt_ids) == "<s>efgh"
    assert tokenizer.decode(row.chosen_ids) == "1234"
    assert tokenizer.decode(row.rejected_ids) == "12</s>"
    assert row.prompt_cut
    assert row.response_cut
    row = encode(
        tokenizer, "plain", [{"role": "user", "content": "abcd"}], "1234", "1", max_prompt_length=5, max_length=10
    )
    assert tokenizer.decode(row.prompt_ids) == "<s>abcd"
    assert tokenizer.decode(row.chosen_ids) == "1234</s>"
    assert not row.prompt_cut
    assert not row.response_cut


def test_truncation_without_a_real_bos(smollm2: PreTrainedTokenizerBase) -> None:
    row = encode(toy(), "plain", [{"role": "user", "content": "abcdefgh"}], max_prompt_length=5, max_length=11)
    assert toy().decode(row.prompt_ids) == "defgh"
    assert toy().decode(row.chosen_ids) == "Good.</s>"
    # what SmolLM2 calls BOS opens every turn: it must not stand in front of the middle of one
    row = encode(smollm2, smollm2.get_chat_template(), [USER], max_prompt_length=7, max_length=13)
    assert smollm2.decode(row.prompt_ids) == " there<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("length", "prompt", "uncut", "left"),
    [
        # tokens of prompt, chosen and rejected before and after
        (1024, 512, (608, 201, 281), (608, 201, 281)),
        (2048, 1800, (68, 2201, 601), (68, 1980, 601)),
        (1024, 512, (68, 1041, 201), (68, 956, 201)),
        (1024, 512, (744, 201, 281), (512, 201, 281)),
        (1024, 512, (743, 201, 281), (743, 201, 281)),  # fits to the last token
        (1024, 512, (513, 600, 281), (512, 512, 281)),
    ],
)
def test_a_prompt_is_cut_only_where_the_pair_does_not_fit(
    length: int, prompt: int, uncut: tuple[int, int, int], left: tuple[int, int, int]
) -> None:
    texts = ["p" * uncut[0], "c" * (uncut[1] - 1), "r" * (uncut[2] - 1)]  # a token a letter, and EOS
    row = encode(
        toy(), "plain", [{"role": "user", "content": texts[0]}], *texts[1:], max_length=length, max_prompt_length=prompt
    )
    assert (len(row.prompt_ids), len(row.chosen_ids), len(row.rejected_ids)) == left
    assert row.prompt_cut == (left[0] < uncut[0])
    assert row.response_cut == (left[1:] < uncut[1:])


class CountingTokens(SpecialTokens):
    """Counts the letters that are tokenized."""

    letters = 0

    def tokenize(self, texts: list[str]) -> list[Any]:
        self.letters += sum(map(len, texts))
        return super().tokenize(texts)


def whole_ids(
    tokenizer: PreTrainedTokenizerBase, template: str, prompt: list[dict[str, Any]], response: str
) -> list[Any]:
    """Ids of the prompt and of the whole conversation, each tokenized at once."""
    texts = [
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=generate)
        for messages, generate in ((prompt, True), ([*prompt, said(response)], False))
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize(("name", "template"), [("smollm2", "chatml"), ("llama3", "llama3"), ("mistral", "mistral")])
def test_prompts_are_tokenized_once_and_long_texts_in_part(
    name: str, template: str, request: pytest.FixtureRequest, real_pairs: list[dict[str, Any]]
) -> None:
    tokenizer = request.getfixturevalue(name)
    text = " ".join(row["chosen"][-1]["content"] for row in real_pairs[:60])
    special = CountingTokens(tokenizer)
    encoder = PairEncoder(tokenizer, TEMPLATES[template], max_length=9000, max_prompt_length=8000, special=special)
    special.letters = 0
    prompt = [{"role": "user", "content": text[:20_000]}]
    row: Any = encoder.encode([PreferenceRow(prompt, "Good.", "Bad, " + text[:3000])])[0]
    assert special.letters < 20_000 + 3000 + 4 * 600, "the prompt once, its end and the responses"
    for ids, response in ((row.chosen_ids, "Good."), (row.rejected_ids, "Bad, " + text[:3000])):
        prompt_ids, whole = whole_ids(tokenizer, TEMPLATES[template], prompt, response)
        assert row.prompt_ids == prompt_ids
        assert whole[: len(prompt_ids + ids)] == prompt_ids + ids

    encoder = PairEncoder(tokenizer, TEMPLATES[template], max_length=600, max_prompt_length=300, special=special)
    special.letters = 0
    huge = text * 6
    row = encoder.encode([PreferenceRow([{"role": "user", "content": huge}], huge, "Bad." + huge)])[0]
    assert len(huge) > 300_000
    assert special.letters < 60_000
    assert row.prompt_cut
    assert row.response_cut
    prompt_ids, whole = whole_ids(tokenizer, TEMPLATES[template], [{"role": "user", "content": huge}], huge)
    assert row.chosen_ids == whole[len(prompt_ids) :][:300]
    assert row.prompt_ids[-299:] == prompt_ids[-299:]
    assert len(row.prompt_ids) == 300
    if name != "smollm2":
        assert row.prompt_ids[0] == tokenizer.bos_token_id


def test_long_runs_that_are_few_tokens(llama3: PreTrainedTokenizerBase) -> None:
    """A token of Llama 3 may be 128 blanks: the first letters that are looked at do not suffice."""
    row = encode(llama3, "plain", [USER], " " * 50_000 + "end", "Bad", max_length=600, max_prompt_length=300)
    assert row.chosen_ids == [*llama3(" " * 50_000 + "end", add_special_tokens=False)["input_ids"], 128009]
    assert not row.response_cut


def test_responses_of_the_same_ids_are_no_pair(llama3: PreTrainedTokenizerBase) -> None:
    bad = encode(llama3, "llama3", [USER], "Yes.<|eot_id|>", "Yes.")
    assert isinstance(bad, RowError)
    assert bad.reason == "chosen equals rejected"
    assert "same token ids" in bad.detail


def test_rows_that_truncation_makes_useless() -> None:
    bad = encode(toy(), "plain", [USER], "same start, other end", "same start", max_prompt_length=10, max_length=14)
    assert bad.reason == "equal after truncation"
    assert "data.max_length=14" in bad.detail
    assert encode(toy(), "plain", [{"role": "user", "content": ""}]).reason == "empty prompt"


@pytest.mark.parametrize(("length", "prompt"), [(10, 10), (10, 11), (10, 0)])
def test_lengths_that_leave_no_room(length: int, prompt: int) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_prompt_length"):
        encode(toy(), "plain", [USER], max_length=length, max_prompt_length=prompt)
