"""The first stage: candidate answers of every model and seed, each in a journal as soon as it is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.pairs import folder as files
from nemo_lmpo.pairs.candidate import Answered, AskedPrompt, Candidate
from nemo_lmpo.pairs.models import SampledModel

PUBLISHED_SEEDS = (13, 21, 42, 79, 100)
"""Of SimPO's sets of own answers, one candidate each."""


def seeds_for(samples: int) -> list[int]:
    """The published seeds; where more are wanted, further ones of a fixed sequence."""
    more = random.Random(PUBLISHED_SEEDS[-1])
    seeds = list(PUBLISHED_SEEDS[:samples])
    while len(seeds) < samples:
        seed = more.randrange(1000, 10**6)
        if seed not in seeds:
            seeds.append(seed)
    return seeds


@dataclass(frozen=True)
class SamplePlan:
    """Who answers what."""

    prompts: Sequence[AskedPrompt]
    prompts_sha256: str
    models: Sequence[SampledModel]
    seeds: Sequence[int]

    def identity(self) -> dict[str, Any]:
        """What candidates are made of; the same in every command that continues a folder."""
        return {
            "prompts": self.prompts_sha256,
            "model": [model.weights_sha256 for model in self.models],
            "seeds": list(self.seeds),
            "settings": [model.identity() for model in self.models],
        }

    def name(self, prompt: str, model: int, seed: int) -> str:
        """The key of an answer."""
        return f"{prompt}/{seed}" if len(self.models) == 1 else f"{prompt}/{model}-{seed}"


def collect_candidates(plan: SamplePlan, work: Path, *, quiet: bool) -> list[Answered]:
    """All candidates of all prompts; those of an earlier command are taken as they are.

    Raises:
        ConfigError: the folder holds candidates of other models, prompts or settings.
        UserError: a model cannot answer; what was answered is kept.
    """
    begun = files.is_begun(work, files.SAMPLES)
    claim_folder(work, files.SAMPLE_SETTINGS, plan.identity(), "candidates", begun=begun)
    wanted = sum(len(model.prompts) for model in plan.models) * len(plan.seeds)
    with Journal(work / files.SAMPLES, "id") as journal:
        done = len(journal.rows)
        with tqdm(total=wanted, initial=done, desc="sample", unit="answer", disable=True if quiet else None) as bar:
            for place, model in enumerate(plan.models):
                for seed in plan.seeds:
                    names = {id: plan.name(id, place, seed) for id in model.prompts}
                    missing = [name for name in names.values() if name not in journal.rows]
                    if missing:
                        model.of_seed(seed, names).answer(missing, journal, bar.update)
                model.unload()
        return _answered(plan, journal)


def _answered(plan: SamplePlan, journal: Journal) -> list[Answered]:
    tokenizer = plan.models[0].prompting.tokenizer
    found = []
    for prompt in plan.prompts:
        rows = [
            (place, seed, name, journal.rows[name])
            for place, model in enumerate(plan.models)
            if prompt.id in model.prompts
            for seed in plan.seeds
            for name in [plan.name(prompt.id, place, seed)]
        ]
        texts = [str(row["output"]) for *_, row in rows]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
        candidates = [
            Candidate(name, place, seed, text, length, not row["truncated"])
            for (place, seed, name, row), text, length in zip(rows, texts, lengths, strict=True)
        ]
        found.append(Answered(prompt, candidates))
    return found
