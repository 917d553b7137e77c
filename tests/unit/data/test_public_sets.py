"""First rows in the exact columns of public data sets: read as they are, or refused with the line that maps them.

Columns are the sets' as they were known in December 2026: those of OpenHermes and argilla's original set, and
HelpSteer3's main ones, stand in public code that reads them; the others from memory. Contents are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo import cli


def user(text: str = "Q") -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str = "good") -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ultrafeedback_answer(text: str, score: float) -> dict[str, Any]:
    rated = {"Rating": "3", "Rationale": "as asked", "Rationale For Rating": "so", "Type": ["1"]}
    plain = {"Rating": "4", "Rationale": "as asked"}
    aspects = {"helpfulness": rated, "honesty": plain, "instruction_following": plain, "truthfulness": rated}
    about = {"annotations": aspects, "custom_system_prompt": "Be kind.", "model": "m", "principle": "helpfulness"}
    return {**about, "response": text, "critique": "...", "overall_score": score, "fine-grained_score": 4.25}


HERMES = {
    **dict.fromkeys(("custom_instruction", "topic", "model_name", "model", "views", "language", "id", "title", "idx")),
    **dict.fromkeys(("hash", "avatarUrl", "system_prompt")),
    "skip_prompt_formatting": False,
    "category": "orca",
    "source": "airoboros2.2",
    "conversations": [
        {"from": "system", "value": "S", "weight": None},
        {"from": "human", "value": "Q", "weight": None},
        {"from": "gpt", "value": "good", "weight": None},
    ],
}
PAIR = "prompt:\n  [user] Q\nchosen:\n  >>>[assistant] good<<<\nrejected:\n  >>>[assistant] bad<<<"
TURNS = [user(), said("A"), user("Q2")]
LABELLED = ">>> and <<<)\n  [user] Q\n  >>>[assistant] good<<<"
READ: dict[str, tuple[dict[str, Any], str, str]] = {
    "trl-lib/kto-mix-14k": (
        {"prompt": [user()], "completion": [said()], "label": False},
        "1 labelled answer",
        f"answer with the label false (what is predicted stands between {LABELLED}",
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {
            **{"source": "evol_instruct", "prompt": "Q", "chosen": [user(), said()], "chosen-rating": 4.75},
            **{"chosen-model": "m", "rejected": [user(), said("bad")], "rejected-rating": 2.0, "rejected-model": "n"},
        },
        "1 pair",
        PAIR,
    ),
    "HuggingFaceH4/ultrachat_200k": (
        {"prompt": "Q", "prompt_id": "f0e37e9f78", "messages": [*TURNS, said()]},
        "1 conversation",
        "[user] Q\n  >>>[assistant] A<<<\n  [user] Q2\n  >>>[assistant] good<<<",
    ),
    "teknium/OpenHermes-2.5": (HERMES, "1 conversation", "[system] S\n  [user] Q\n  >>>[assistant] good<<<"),
    "allenai/tulu-3-sft-mixture": (
        {"id": "oasst1_1", "messages": [user(), said()], "source": "ai2-adapt-dev/oasst1_converted"},
        "1 conversation",
        "[user] Q\n  >>>[assistant] good<<<",
    ),
    "Anthropic/hh-rlhf": (
        {f"{side}": f"\n\nHuman: Q\n\nAssistant: {text}" for side, text in (("chosen", "good"), ("rejected", "bad"))},
        "1 pair",
        PAIR,
    ),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": (
        {"chosen": [user(), said()], "rejected": [user(), said("bad")], "source": "magpie_ultra"},
        "1 pair",
        PAIR,
    ),
    "openbmb/UltraFeedback": (
        {
            **{"source": "evol_instruct", "instruction": "Q", "models": ["m", "n", "o", "p"]},
            "completions": [
                ultrafeedback_answer(text, score) for text, score in (("bad", 2.0), ("good", 8.5), ("so-so", 6.0))
            ],
            **{"correct_answers": ["None"], "incorrect_answers": ["None"]},
        },
        "1 pair",
        PAIR,
    ),
}
MAPPED: dict[str, tuple[dict[str, Any], str, str]] = {
    "argilla/ultrafeedback-binarized-preferences": (
        {
            **{"source": "evol_instruct", "instruction": "Q", "chosen_response": "good", "rejected_response": "bad"},
            **{"chosen_avg_rating": 4.75, "rejected_avg_rating": 2.0, "chosen_model": "m"},
        },
        "{prompt: instruction, chosen: chosen_response, rejected: rejected_response}",
        " would make it a pair)",
    ),
    "nvidia/HelpSteer3": (
        {
            **{"domain": "general", "language": "english", "context": [user()], "response1": "good"},
            **{"response2": "bad", "overall_preference": -2},
            "individual_preference": [{"score": -2, "reasoning": "...", "feedback1": "...", "feedback2": "..."}],
        },
        "{prompt: context, chosen: response1, rejected: response2}",
        " would make it a pair, if `response1` is the better answer in every row; where `overall_preference` says it, "
        "write `chosen` and `rejected` by it)",
    ),
    "lmsys/chatbot_arena_conversations": (
        {
            **{"question_id": "x", "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "user_1"},
            **{"conversation_a": [user(), said()], "conversation_b": [user(), said("bad")], "turn": 1},
            **{"anony": True, "language": "English", "tstamp": 1.5},
        },
        "{chosen: conversation_a, rejected: conversation_b}",
        " would make it a pair, if `conversation_a` is the better answer in every row; where `winner` says it, write "
        "`chosen` and `rejected` by it)",
    ),
}  # fmt: skip


def written(folder: Path, row: dict[str, Any]) -> str:
    (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "train.jsonl")


@pytest.mark.parametrize("name", READ)
def test_rows_are_read_as_they_are(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row, counted, shown = READ[name]
    assert cli.main(["data", written(tmp_path, row)]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{tmp_path}/train.jsonl: {counted}\n")
    assert shown in page
    assert "dropped" not in page


@pytest.mark.parametrize("name", MAPPED)
def test_rows_are_read_with_the_line_that_the_message_gives(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, columns, kind = MAPPED[name]
    assert cli.main(["data", written(tmp_path, row)]) == 1
    assert f"data.train.columns={columns}{kind}" in capsys.readouterr().err
    assert cli.main(["data", written(tmp_path, row), "--columns", columns]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"{tmp_path}/train.jsonl: 1 pair\n")
    assert PAIR in page
