"""KTO on answers with a label: every layout gives the numbers of one process, and one process those of TRL."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_conversations import TP2_SP, assert_same_gradients, our_steps
from tests.distributed.test_lora import write_base
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import run_workers

LETTERS = "abcdefghijkl"
ROWS, BATCH = 36, 12
BETA, DESIRABLE, UNDESIRABLE = 0.5, 1.3, 0.7
SETTINGS = (
    "loss=kto",
    f"loss.beta={BETA}",
    f"loss.desirable_weight={DESIRABLE}",
    f"loss.undesirable_weight={UNDESIRABLE}",
    "data.max_length=64",
    "data.max_prompt_length=40",
    "data.validation.split=train",
)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2_sequence_pp2": (4, (*TP2_SP, "model.pipeline_model_parallel_size=2")),
    "cp2_dp2": (4, ("model.context_parallel_size=2",)),
    "dp2_fsdp": (2, ("model.fsdp=true", "model.reference_in_memory=true")),
    "one_answer_a_row": (1, ("model.micro_batch_size=1",)),
}


def labelled(count: int) -> list[dict[str, Any]]:
    """Prompts of one turn or two about letters, with an answer of any length; in TRL's form."""
    draw = random.Random(7)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 2)):
            letters = draw.sample(LETTERS, draw.randint(1, 6))
            messages.append({"role": "user", "content": "sort " + " ".join(letters)})
            messages.append({"role": "assistant", "content": " ".join(sorted(letters))})
        label = draw.random() < 0.6
        if not label:
            messages[-1]["content"] = " ".join(draw.sample(LETTERS, draw.randint(1, 10)))
        rows.append({"prompt": messages[:-1], "completion": messages[-1:], "label": label})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Answers with a label for training, pairs among those for validation."""
    directory = tmp_path_factory.mktemp("answers")
    rows = labelled(ROWS + 8)
    (directory / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))
    pair = {"prompt": "sort c b a", "chosen": "a b c", "rejected": "c b a well"}
    (directory / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[ROWS:], pair]))
    paths = (f"data.{which}.path={directory / which}.jsonl" for which in ("train", "validation"))
    return (*SETTINGS, *paths, f"data.cache_dir={directory / 'cache'}")


@pytest.fixture(scope="module")
def one_process(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_workers(1, train, str(run), (*data, "checkpoint.save_interval=2", "checkpoint.keep_last=3"))
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout: str, data: tuple[str, ...], one_process: Path, tmp_path: Path) -> None:
    """Other rows, ranks and micro-batches; and a reference in memory gives what kept values give."""
    world, overrides = LAYOUTS[layout]
    run_workers(world, train, str(tmp_path / "run"), (*data, *overrides))
    found, expected = metrics_of(tmp_path / "run"), metrics_of(one_process)
    assert max(line.get("kto/z", 0.0) for line in expected) > 0.01
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            if (name, wanted["step"]) == ("rewards/accuracies", 1):
                continue  # all rewards are 0, but for rounding
            assert line[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    weights = weights_of(one_process, 3)
    for name, tensor in weights_of(tmp_path / "run", 3).items():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name


def test_what_validation_tells(one_process: Path) -> None:
    (told,) = [line for line in metrics_of(one_process) if "val/loss" in line]
    labels = [row["label"] for row in labelled(ROWS + 8)[ROWS:]] + [True, False]
    assert told["val/answers/desirable"] == pytest.approx(sum(labels) / len(labels))
    tokens = [len(row["completion"][0]["content"].split()) + 1 for row in labelled(ROWS + 8)[ROWS:]] + [4, 5]
    for side, wanted in (("chosen", True), ("rejected", False)):
        lengths = [count for count, label in zip(tokens, labels, strict=True) if label == wanted]
        assert told[f"val/lengths/{side}"] == pytest.approx(sum(lengths) / len(lengths))
    assert told["val/rewards/margins"] == pytest.approx(told["val/rewards/chosen"] - told["val/rewards/rejected"])
    assert 0 <= told["val/rewards/accuracies"] <= 1


def test_resumes_to_the_bit(data: tuple[str, ...], one_process: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 2."""
    shutil.copytree(one_process, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000003")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:2]))
    run_workers(1, train, str(tmp_path / "run"), (*data, "checkpoint.save_interval=2", "checkpoint.keep_last=3"))
    assert metrics_of(tmp_path / "run") == metrics_of(one_process)
    expected = weights_of(one_process, 3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(tmp_path / "run", 3).items())


@pytest.mark.slow
def test_adapters_and_experts_train_alike_in_layouts(data: tuple[str, ...], tmp_path: Path) -> None:
    """The reference is the policy without its adapters; experts are balanced over the step's own tokens."""
    lora = ("model.peft.name=lora", "model.peft.rank=4", "model.reference_in_memory=true")
    experts = (
        "setting=moe_tiny",
        "model.moe_aux_loss=global_batch",
        "model.moe_aux_loss_coefficient=0.01",
        "model.architecture.num_hidden_layers=2",
    )
    for name, more in (("lora", lora), ("experts", experts)):
        run_workers(1, train, str(tmp_path / f"{name}_one"), (*data, *more))
        run_workers(2, train, str(tmp_path / f"{name}_two"), (*data, *more))
        for line, wanted in zip(
            metrics_of(tmp_path / f"{name}_two"), metrics_of(tmp_path / f"{name}_one"), strict=True
        ):
            for metric, value in wanted.items():
                if (metric, wanted["step"]) == ("rewards/accuracies", 1):
                    continue
                assert line[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), (name, metric)


def trl_steps(base: Path, rows: list[dict[str, Any]], loss_type: str, output: Path) -> dict[str, Any]:
    """Losses, metrics and gradients of TRL's trainer, which takes the rows in our order."""
    import datasets
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import KTOConfig, KTOTrainer

    gradients: list[Path] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            gradients.append(output.with_name(f"{output.name}_{len(gradients)}.safetensors"))
            save_file({name: parameter.grad for name, parameter in model.named_parameters()}, gradients[-1])

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # transformers gives the input side of the padding token no gradient; a language model has one
    model.get_input_embeddings().padding_idx = None
    config = KTOConfig(
        output_dir=str(output),
        loss_type=loss_type,
        beta=BETA,
        desirable_weight=DESIRABLE,
        undesirable_weight=UNDESIRABLE,
        max_length=None,
        train_sampling_strategy="sequential",
        per_device_train_batch_size=BATCH,
        max_steps=3,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        adam_epsilon=1e-5,
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = KTOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=[Keep()],
    )
    trainer.train()
    return {"logged": [line for line in trainer.state.log_history if "loss" in line], "gradients": gradients}


@pytest.mark.parametrize(("point", "loss_type"), [("kl", "kto"), ("zero", "apo_zero_unpaired")])
def test_equals_trl(point: str, loss_type: str, tmp_path: Path) -> None:
    """Three steps of one epoch, mismatched answers included, which TRL makes by itself."""
    pytest.importorskip("trl")
    base = tmp_path / "base"
    write_base(base)
    rows = labelled(ROWS)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = (
        *COMMON,
        *SETTINGS,
        f"loss.reference_point={point}",
        f"model.restore_from_path={base}",
        "model.architecture=null",
        "model.tokenizer=null",
        f"data.train.path={tmp_path / 'train.jsonl'}",
        "data.validation.path=null",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "optim.sched.name=constant",
        "trainer.gradient_clip_val=0",
    )
    (ours,) = run_workers(1, our_steps, "kto_tiny", overrides, str(tmp_path / "gradients"))
    ordered = [rows[index] for step in ours["ids"] for index in step]
    theirs = trl_steps(base, ordered, loss_type, tmp_path / "trl")
    for metrics, logged in zip(ours["metrics"], theirs["logged"], strict=True):
        assert metrics["loss"] == pytest.approx(float(logged["loss"]), rel=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert metrics[name] == pytest.approx(float(logged[name]), rel=1e-4, abs=2e-5), name
        assert metrics["kto/z"] == pytest.approx(BETA * float(logged["kl"]), rel=1e-4, abs=1e-5)
    if point == "kl":
        assert max(metrics["kto/z"] for metrics in ours["metrics"]) > 0.01
    assert_same_gradients(ours, theirs)
