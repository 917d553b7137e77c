"""Pairs under the templates of real models: those that TRL is installed with, and the cases they brought up."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.errors import ConfigError
from tests.unit.data.template_walk import DIFFERENT, REFUSED, RIGHT, WRONG, byte_tokenizer, judged, templates_in

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
TAKES_PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% else %}<|assistant|>{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Mistral 7B v0.3's: the system text stands in the last user's turn, only while it is last
SYSTEM_IN_LAST_TURN = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def templates() -> dict[str, str]:
    trl = pytest.importorskip("trl")
    return templates_in(Path(trl.__file__).parent / "chat_templates")


def test_every_pair_is_right_or_clearly_different_under_real_templates(templates: dict[str, str]) -> None:
    assert len(templates) >= 60
    kinds, refused = {}, set()
    for name, template in templates.items():
        try:
            verdicts = judged(template)
        except ConfigError:
            refused.add(name.removesuffix("_training"))
            continue
        kinds[name] = Counter(verdict.kind for verdict in verdicts.values())
        assert {case: said.why for case, said in verdicts.items() if said.kind == WRONG} == {}, name
    assert refused <= TAKES_PARTS_ONLY
    assert kinds["qwen2_5"] == kinds["phi3"] == {RIGHT: 28}
    assert kinds["llama3"] == {RIGHT: 20, DIFFERENT: 8}, "it trims"
    assert kinds["gemma"][REFUSED] == 14, "it knows no system message"
    assert kinds["deepseek_r1_distill"] == {DIFFERENT: 20, REFUSED: 8}, "it leaves out thoughts"
    assert sum(count[RIGHT] for count in kinds.values()) > 1200


def test_every_pair_is_on_the_generation_prompt_if_wanted(templates: dict[str, str]) -> None:
    for name in ("deepseek_r1_distill", "nemotron_3_nano", "qwen3_5_think", "glm4moe", "mistral_nemo"):
        if name not in templates:
            continue
        template = templates[name]
        tokenizer = byte_tokenizer(template)
        encoder = PairEncoder(
            tokenizer, template, max_length=9000, max_prompt_length=8000, prompt_from="generation_prompt"
        )
        row: Any
        (row,) = encoder.encode(
            [PreferenceRow([USER], "<think>\nHm.\n</think>\n\nGood.", "<think>\nAh.\n</think>\n\nBad.")]
        )
        prompt = tokenizer.apply_chat_template(
            [USER], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(row.prompt_ids).removeprefix("<s>") == prompt.removeprefix("<s>")
        whole = (prompt + tokenizer.decode(row.chosen_ids)).replace("\n", "")
        assert "<think>Hm.</think>Good." in whole, name


def texts(template: str, prompt: list[dict[str, Any]], chosen: str, rejected: str, **settings: Any) -> Any:
    """The texts of prompt and answers and the notes, or why there are none."""
    tokenizer = byte_tokenizer(template)
    encoder = PairEncoder(tokenizer, template, max_length=900, max_prompt_length=800, **settings)
    (row,) = encoder.encode([PreferenceRow(prompt, chosen, rejected)])
    if isinstance(row, RowError):
        return row.detail
    return (*(tokenizer.decode(ids) for ids in (row.prompt_ids, row.chosen_ids, row.rejected_ids)), row.notes)


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("A", "B"), ("A", "As"), (" yes", "no "), ("s", "t"), ("|", "<"), ("assistant", "user")]
)
def test_an_answer_is_found_from_the_end(chosen: str, rejected: str) -> None:
    prompt, one, other, notes = texts(R1, [USER], chosen, rejected)
    assert prompt == "<s><|user|>Hi<|assistant|>"
    assert (one, other) == (f"{chosen}<|end|>", f"{rejected}<|end|>")
    assert notes == ("generation starts with '<think>\\n', training does not",)


def test_a_thought_that_the_template_leaves_out() -> None:
    thought = ("<think>\nHm.\n</think>\n\nGood.", "Bad.")
    said = texts(R1, [USER], *thought)
    assert "leaves out part of the chosen answer: it writes '\\n\\nGood.'" in said
    assert "data.prompt_from=generation_prompt" in said
    prompt, chosen, rejected, notes = texts(R1, [USER], *thought, prompt_from="generation_prompt")
    assert prompt == "<s><|user|>Hi<|assistant|><think>\n"
    assert chosen == "Hm.\n</think>\n\nGood.<|end|>"
    assert rejected == "Bad.<|end|>"
    assert any("trained as it stands" in note for note in notes)


@pytest.mark.parametrize("turns", [[], [USER, {"role": "assistant", "content": "Yo."}]])
def test_a_system_text_that_finished_conversations_leave_out_stays_in_the_prompt(turns: list[dict[str, Any]]) -> None:
    prompt, chosen, rejected, notes = texts(SYSTEM_IN_LAST_TURN, [SYSTEM, *turns, USER], "Good.", "Bad.")
    before = "[INST] Hi[/INST] Yo.</s>" if turns else ""
    assert prompt == f"<s>{before}[INST] Be kind.\n\nHi[/INST]"
    assert (chosen, rejected) == (" Good.</s>", " Bad.</s>")
    assert notes == ("finished conversations leave out part of the prompt, so pairs are laid on the generation prompt",)


def test_a_prompt_that_changes_with_the_answer_is_refused() -> None:
    counts = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert "changes the prompt with the response" in texts(counts, [USER], "a", "b")


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("<|END_RESPONSE|>\n<|im_end|>\n", "<|END_RESPONSE|>"),
        ("<|end|>\n{{ eos_token }}", "<|end|>\n</s>"),
        ("\n<|im_end|>\n", "\n<|im_end|>"),
    ],
)
def test_end_of_turn_has_every_token_that_ends_it(tail: str, end: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['content'] }}" + tail + "{% endfor %}"
    tokenizer = byte_tokenizer(template + "{{ eos_token }}")
    row: Any = PairEncoder(tokenizer, template, max_length=900, max_prompt_length=800).encode(
        [PreferenceRow([USER], "Good.", "Bad.")]
    )[0]
    assert tokenizer.decode(row.chosen_ids).endswith("Good." + end)


def test_a_header_that_no_generation_prompt_writes_is_told() -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    prompt, chosen, _, notes = texts(template, [USER], "Good.", "Bad.")
    assert prompt == "<|user|>Hi</s>"
    assert chosen == "<|assistant|>Good.</s>"
    assert notes == ("the chat template writes '<|assistant|>' in front of the answer, which is trained",)


def test_a_real_bos_that_is_eos_too_stays_in_front_of_a_cut_prompt() -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = byte_tokenizer(template)
    tokenizer.bos_token = "</s>"
    encoder = PairEncoder(tokenizer, template, max_length=12, max_prompt_length=6)
    row: Any
    (row,) = encoder.encode([PreferenceRow([{"role": "user", "content": "abcdefghijkl"}], "Good", "Bad")])
    assert tokenizer.decode(row.prompt_ids) == "</s>ijkl</s>"
