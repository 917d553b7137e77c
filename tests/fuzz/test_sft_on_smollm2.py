"""SFT of SmolLM2-135M on conversations is what TRL's trainer computes, in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_conversations import assert_alike, our_steps, trl_steps
from tests.distributed.workers import run_workers

BATCH = 4
LEARNING_RATE = 2e-5
TOPICS = ("a cat", "the sea in winter", "17 x 3", "rain, as a short poem", "DNA", "tea", "prime numbers", "Rome")
ANSWERS = (
    "It purrs.",
    "The sea is grey then, and the wind comes from the north most of the time.",
    "51",
    "Rain on the roof,\nrain on the street;\n\nnobody hurries.",
    "A molecule that carries genes.",
    "Leaves in hot water.",
    "2, 3, 5, 7, 11, ...",
    "It is the capital of Italy, and it was not built in one day.",
)
BODY = "message['content'] + '<|im_end|>'"


def conversations() -> list[dict[str, Any]]:
    """One to three short turns, one in four with a system message."""
    rows = []
    for number in range(3 * BATCH):
        messages = [{"role": "system", "content": "Be brief."}] if number % 4 == 3 else []
        for turn in range(1 + number % 3):
            place = (number + 3 * turn) % len(TOPICS)
            messages += [
                {"role": "user", "content": f"Tell me about {TOPICS[place]}."},
                {"role": "assistant", "content": ANSWERS[place]},
            ]
        rows.append({"messages": messages})
    return rows


def with_marks(template: str) -> str:
    """SmolLM2's template with marks around what the assistant says, end of turn included: TRL needs them."""
    said = "{{'<|im_start|>' + message['role'] + '\n' + " + BODY + " + '\n'}}"
    assert said in template
    header = "{{'<|im_start|>' + message['role'] + '\n'}}"
    marked = "{% generation %}{{" + BODY + "}}{% endgeneration %}"
    choice = "{% if message['role'] == 'assistant' %}" + marked + "{% else %}{{" + BODY + "}}{% endif %}"
    return template.replace(said, header + choice + "{{'\n'}}")


@pytest.mark.timeout(1800)
def test_smollm2_trains_as_with_trl(smollm2_dir: Path, tmp_path: Path) -> None:
    """Its padding token is its end of turn: transformers gives the input side of that token no gradient unless told."""
    pytest.importorskip("trl")
    rows = conversations()
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        f"model.restore_from_path={smollm2_dir}",
        f"model.global_batch_size={BATCH}",
        f"data.train.path={tmp_path / 'train.jsonl'}",
        "data.train.split=train",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        *("trainer.max_steps=3", "checkpoint.save_interval=0", "logging.tensorboard=false", "logging.report=false"),
        *(f"optim.lr={LEARNING_RATE}", "optim.eps=1e-5", "optim.sched.name=constant", "optim.sched.warmup_fraction=0"),
        "trainer.gradient_clip_val=0",
    )
    (ours,) = run_workers(1, our_steps, "sft_smollm2_135m", overrides, str(tmp_path / "gradients"), timeout=900)
    ordered = [rows[index] for step in ours["ids"] for index in step]
    template = with_marks((smollm2_dir / "chat_template.jinja").read_text())
    for padding_free in (False, True):
        theirs = trl_steps(
            smollm2_dir,
            template,
            ordered,
            padding_free=padding_free,
            batch=BATCH,
            output=tmp_path / f"trl_{padding_free}",
            learning_rate=LEARNING_RATE,
        )
        assert_alike(ours, theirs, each=3e-5)  # TRL's own two ways are up to 1.3e-5 of a tensor apart
