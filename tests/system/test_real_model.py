"""SmolLM2-135M on real preference pairs against transformers, and LMPO's loss against the formulas in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_lmpo.convert.command import hf_to_nemo
from nemo_lmpo.convert.megatron import megatron_model, model_logits
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.launch import LaunchInfo
from tests.distributed.plain_trainer import MarginStatistics, Pair, Settings, margin, pair_loss
from tests.distributed.workers import run_workers

PAIRS = 2


def first_step(launch: LaunchInfo, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Losses and per-token log-probabilities of step 0, and the pairs that they belong to."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.pair_metrics import STATISTIC
    from nemo_lmpo.training.session import open_session

    config = load_recipe("lmpo_smollm2_135m", overrides)
    with open_session(config, launch) as session:
        indices = session.steps.sampler.pairs_of_step(0)
        batch = session.steps.builder.build(session.data.train, indices)
        model = session.policy.models[0].eval()
        tokens: dict[int, list[float]] = {}
        for row in batch.micro_batches:
            with torch.no_grad():
                hidden = model(row.input_ids, row.position_ids, row.attention_plan)
                logps = model.scores(hidden, row.predict_positions, row.target_ids, chunk_tokens=100, correct=False)[0]
            for sequence, logp in zip(row.sequence_index.tolist(), logps.tolist(), strict=True):
                number = 2 * int(row.example_index[sequence // 2]) + sequence % 2
                tokens.setdefault(number, []).append(logp)
        # The same batch twice: the second time the first one's statistics count.
        losses = []
        for _ in range(2):
            table = session.policy.run_batch(batch, forward_only=True)
            losses.append(table.metrics()["loss"])
            if config.loss.compat == "paper":  # training does it after each step; the released code always does it
                session.policy.statistics.update(table.column(STATISTIC))
        pairs = [session.data.train[int(index)] for index in indices]
        return {
            "tokens": [tokens[number] for number in range(2 * len(pairs))],
            "losses": losses,
            "pairs": [(pair.prompt_ids, *(response.ids for response in pair.responses)) for pair in pairs],
        }


@pytest.mark.slow
@pytest.mark.parametrize("compat", ["paper", "released_code"])
def test_step_zero_on_real_pairs(compat: str, smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    overrides = (
        f"model.restore_from_path={smollm2_dir}",
        f"data.train.path={shared_dir / 'data' / 'alpaca_pairs_train.jsonl.gz'}",
        "data.train.limit=16",
        "data.validation.path=null",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"model.global_batch_size={PAIRS}",
        "data.max_length=128",
        "data.max_prompt_length=64",
        f"run_dir={tmp_path / 'run'}",
        f"loss.compat={compat}",
        "data.row_tokens=4000",  # one row
    )
    (found,) = run_workers(1, first_step, overrides, timeout=300)
    tokens = [torch.tensor(logps, dtype=torch.float64) for logps in found["tokens"]]
    pairs = [Pair(*ids) for ids in found["pairs"]]
    if compat == "paper":
        compare_tokens(smollm2_dir, pairs, tokens)
    compare_losses(pairs, tokens, found["losses"], Settings(beta=2.5, log_h=1.4, released=compat == "released_code"))


@torch.no_grad()
def compare_tokens(directory: Path, pairs: list[Pair], tokens: list[torch.Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for number, logps in enumerate(tokens):
        pair = pairs[number // 2]
        response = (pair.chosen, pair.rejected)[number % 2]
        logits = model(input_ids=torch.tensor([pair.prompt + response])).logits[0].double()
        first = len(pair.prompt) - 1
        expected = torch.log_softmax(logits, dim=-1)[range(first, first + len(response)), response]
        assert (logps - expected).abs().max() < 1e-4


def compare_losses(pairs: list[Pair], tokens: list[torch.Tensor], losses: list[float], settings: Settings) -> None:
    statistics = MarginStatistics(settings)
    sums = [(w.sum(), rejected.sum()) for w, rejected in zip(tokens[::2], tokens[1::2], strict=True)]
    margins = torch.stack(
        [margin(*both, len(pair.chosen), len(pair.rejected), settings) for both, pair in zip(sums, pairs, strict=True)]
    )
    for loss in losses:
        if settings.released:
            statistics.update(margins)
        ab = statistics.current()
        per_pair = [pair_loss(*both, pair, settings, ab) for both, pair in zip(sums, pairs, strict=True)]
        assert loss == pytest.approx(float(torch.stack(per_pair).mean()), rel=1e-5)
        if not settings.released:
            statistics.update(margins)


def sampled(launch: LaunchInfo, overrides: tuple[str, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """The sampled prompts of validation, and the start model's answers in its training layout."""
    from nemo_lmpo.config.recipe import load_recipe
    from nemo_lmpo.training.session import open_session

    with open_session(load_recipe("lmpo_smollm2_135m", overrides), launch) as session:
        samples = session.trainer().samples
        assert samples is not None
        return samples.prompts, samples.answers(samples.prompts)


@pytest.mark.slow
def test_sampled_answers_to_real_prompts(smollm2_dir: Path, shared_dir: Path, tmp_path: Path) -> None:
    from nemo_lmpo.answers.engine import load_generator
    from nemo_lmpo.answers.sampling import Sampling

    pairs = shared_dir / "data" / "alpaca_pairs_train.jsonl.gz"
    overrides = (
        f"model.restore_from_path={smollm2_dir}",
        *(f"data.{which}.path={pairs}" for which in ("train", "validation")),
        *(f"data.{which}.limit=4" for which in ("train", "validation")),
        "data.validation.split=train",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.max_length=128",
        "data.max_prompt_length=64",
        f"model.global_batch_size={PAIRS}",
        f"run_dir={tmp_path / 'run'}",
        "logging.samples=2",
        "logging.sample_tokens=5",
    )
    ((prompts, answers),) = run_workers(1, sampled, overrides, timeout=300)
    assert len({tuple(answer) for answer in answers}) == 2
    generator = load_generator(smollm2_dir, device="cpu", dtype=torch.float32)
    expected = generator.respond(prompts, Sampling(max_new_tokens=5, batch_size=1))
    assert answers == [answer.token_ids for answer in expected]


def _greedy(next_logits: object, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(next_logits(ids)[-1].argmax())]  # type: ignore[operator]
    return ids


@pytest.mark.slow
def test_converted_it_answers_as_transformers(
    smollm2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["--input", str(smollm2_dir), "--output", str(tmp_path / "m.nemo"), "--verify", "--quiet"]
    assert hf_to_nemo(arguments) == 0
    assert "passed: tolerance 0.0001" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    reference = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    with torch.no_grad():
        expected = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist()
    converted = open_model(tmp_path / "m.nemo")
    with megatron_model(converted.architecture, converted.source) as model:
        found = _greedy(lambda ids: model_logits(model, ids), ids, len(expected) - len(ids))
    assert tokenizer.decode(found[len(ids) :]) == tokenizer.decode(expected[len(ids) :])
    assert "Paris" in tokenizer.decode(found[len(ids) :])
