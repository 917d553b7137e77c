"""SFT on conversations: every layout gives the numbers of one process, and one process those of TRL's trainer."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.test_lora import write_base
from tests.distributed.training_runs import COMMON, metrics_of, train, weights_of
from tests.distributed.workers import run_workers

LETTERS = "abcdefghijkl"
CONVERSATIONS = 36
BATCH = 12
SETTINGS = ("loss=sft", "data.max_length=80", "data.max_prompt_length=40", "data.validation.split=train")
TP2_SP = ("model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "tp2_sequence_pp2": (4, (*TP2_SP, "model.pipeline_model_parallel_size=2")),
    "cp2_dp2": (4, ("model.context_parallel_size=2",)),
    "dp2_fsdp": (2, ("model.fsdp=true",)),
    "one_conversation_a_row": (1, ("model.micro_batch_size=1",)),
}
MARKED = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant> {% generation %}{{ message['content'] }} {{ eos_token }}"
    "{% endgeneration %}{% else %} <user> {{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <assistant> {% endif %}"
)


def conversations(count: int) -> list[dict[str, Any]]:
    """One to three turns about letters, of very different lengths."""
    draw = random.Random(5)
    rows = []
    for _ in range(count):
        messages = []
        for _ in range(draw.randint(1, 3)):
            letters = draw.sample(LETTERS, draw.randint(1, 8))
            messages.append({"role": "user", "content": "sort " + " ".join(letters)})
            messages.append({"role": "assistant", "content": " ".join(sorted(letters))})
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    directory = tmp_path_factory.mktemp("conversations")
    lines = [json.dumps(row) + "\n" for row in conversations(CONVERSATIONS)]
    (directory / "train.jsonl").write_text("".join(lines))
    (directory / "validation.jsonl").write_text("".join(lines[:10]))
    paths = (f"data.{which}.path={directory / which}.jsonl" for which in ("train", "validation"))
    return (*SETTINGS, *paths, f"data.cache_dir={directory / 'cache'}")


@pytest.fixture(scope="module")
def one_process(data: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("one") / "run"
    run_workers(1, train, str(run), (*data, "checkpoint.save_interval=2", "checkpoint.keep_last=3"))
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(layout: str, data: tuple[str, ...], one_process: Path, tmp_path: Path) -> None:
    world, overrides = LAYOUTS[layout]
    run_workers(world, train, str(tmp_path / "run"), (*data, *overrides))
    found, expected = metrics_of(tmp_path / "run"), metrics_of(one_process)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=1e-5), name
    weights = weights_of(one_process, 3)
    for name, tensor in weights_of(tmp_path / "run", 3).items():
        assert torch.allclose(tensor, weights[name], atol=1e-5), name


def test_what_validation_tells(data: tuple[str, ...], one_process: Path) -> None:
    (told,) = [line for line in metrics_of(one_process) if "val/loss" in line]
    assert told.keys() == {"step", "val/loss", "val/perplexity", "val/token_accuracy", "val/lengths/predicted"}
    counts = [
        len(message["content"].split()) + 1
        for row in conversations(CONVERSATIONS)[:10]
        for message in row["messages"]
        if message["role"] == "assistant"
    ]
    assert told["val/lengths/predicted"] == pytest.approx(sum(counts) / 10)
    assert told["val/perplexity"] == pytest.approx(torch.tensor(told["val/loss"]).exp().item())


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


def test_adapters_go_on_in_another_layout(data: tuple[str, ...], tmp_path: Path) -> None:
    lora = (*data, "model.peft.name=lora", "model.peft.rank=4", "checkpoint.save_interval=2", "checkpoint.keep_last=3")
    run_workers(1, train, str(tmp_path / "run"), lora)
    expected = metrics_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000003")
    run_workers(2, train, str(tmp_path / "run"), (*lora, *TP2_SP))
    for line, wanted in zip(metrics_of(tmp_path / "run")[-2:], expected[-2:], strict=True):
        for name, value in wanted.items():
            assert line[name] == pytest.approx(value, rel=1e-5), name


def our_steps(launch: LaunchInfo, recipe: str, overrides: tuple[str, ...], directory: str) -> dict[str, Any]:
    """Losses and metrics of three steps and the order of the data; each gradient becomes a model in a folder."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    found: dict[str, Any] = {"losses": [], "metrics": [], "gradients": [f"{directory}/{n}" for n in range(3)]}
    found["ids"] = []
    with open_session(load_recipe(recipe, list(overrides)), launch) as session:
        trainer = session.trainer()
        for step in range(3):
            indices = session.steps.sampler.pairs_of_step(step)
            batch = session.steps.builder.build(session.data.train, indices)
            found["ids"].append([int(index) for index in indices])
            session.policy.prepare_for_training_step()
            session.optimizer.zero_grad()
            outcome = session.policy.get_loss_and_metrics(batch, forward_only=False)
            session.policy.finish_training_step()
            found["losses"].append(outcome.loss)
            found["metrics"].append(outcome.metrics)
            parameters = [parameter for chunk in session.policy.models for parameter in chunk.parameters()]
            kept = [parameter.data.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.copy_(parameter.main_grad)
            session.files.save_to(found["gradients"][step])
            for parameter, values in zip(parameters, kept, strict=True):
                parameter.data.copy_(values)
            trainer.train_step(step)
    return found


def trl_steps(
    base: Path,
    template: str,
    rows: list[dict[str, Any]],
    *,
    padding_free: bool,
    batch: int,
    output: Path,
    learning_rate: float = 1e-3,
) -> dict[str, Any]:
    """The same of TRL's trainer, which is given the rows in our order; its gradients become files of tensors."""
    import datasets
    from safetensors.torch import save_file
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    gradients: list[Path] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            gradients.append(output.with_name(f"{output.name}_{len(gradients)}.safetensors"))
            save_file({name: parameter.grad for name, parameter in model.named_parameters()}, gradients[-1])

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # transformers gives the input side of the padding token no gradient; a language model has one
    model.get_input_embeddings().padding_idx = None
    config = SFTConfig(
        output_dir=str(output),
        assistant_only_loss=True,
        padding_free=padding_free,
        max_length=None,
        per_device_train_batch_size=batch,
        max_steps=3,
        learning_rate=learning_rate,
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
    trainer = InOrder(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Keep()],
    )
    trainer.train()
    logged = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "losses": [line["loss"] for line in logged],
        "accuracies": [line["mean_token_accuracy"] for line in logged],
        "gradients": gradients,
    }


def assert_alike(ours: dict[str, Any], theirs: dict[str, Any], *, each: float = 1e-5) -> None:
    """Losses, accuracies and whole gradients within 1e-5; the gradient of ``each`` tensor within that of its norm."""
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    accuracies = [metrics["token_accuracy"] for metrics in ours["metrics"]]
    assert accuracies == pytest.approx(theirs["accuracies"], rel=1e-5)
    assert_same_gradients(ours, theirs, each=each)


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any], *, each: float = 1e-5) -> None:
    """Whole gradients within 1e-5; the gradient of ``each`` tensor within that of its norm."""
    from safetensors.torch import load_file

    for directory, file in zip(ours["gradients"], theirs["gradients"], strict=True):
        wanted, source = load_file(file), open_model(Path(directory)).source
        assert set(source.names()) >= wanted.keys()
        apart = {name: float((source.get(name) - gradient).norm()) for name, gradient in wanted.items()}
        norms = {name: float(gradient.norm()) for name, gradient in wanted.items()}
        assert math.hypot(*apart.values()) <= 1e-5 * math.hypot(*norms.values())
        for name, distance in apart.items():
            assert distance <= each * norms[name], name


@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_equals_trl(padding_free: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    base = tmp_path / "base"
    write_base(base)
    rows = conversations(CONVERSATIONS)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "marked.jinja").write_text(MARKED)
    overrides = (
        *COMMON,
        *SETTINGS,
        f"model.restore_from_path={base}",
        "model.architecture=null",
        "model.tokenizer=null",
        f"data.train.path={tmp_path / 'train.jsonl'}",
        "data.validation.path=null",
        f"data.chat_template={tmp_path / 'marked.jinja'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'run'}",
        "optim.sched.name=constant",
        "trainer.gradient_clip_val=0",
    )
    (ours,) = run_workers(1, our_steps, "sft_tiny", overrides, str(tmp_path / "gradients"))
    ordered = [rows[index] for step in ours["ids"] for index in step]
    theirs = trl_steps(base, MARKED, ordered, padding_free=padding_free, batch=BATCH, output=tmp_path / "trl")
    assert_alike(ours, theirs)
