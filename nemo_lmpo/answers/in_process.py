"""Answers by `transformers` in this process, for machines without a server. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.engine import Generator, Prompting
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.sampling import DEFAULT_NEW_TOKENS, MAX_SEED, Sampling
from nemo_lmpo.answers.sources import Progress, decisive, room, row_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class InProcessSource:
    """A model that is loaded when the first answer is missing."""

    prompting: Prompting
    prompts: Mapping[str, list[int]]
    """Token ids by name."""
    sampling: Sampling
    device: str
    dtype: str
    noun: str = "instruction"
    """What messages call a prompt."""
    loaded: list[Generator] = field(default_factory=list)
    """The model once it was needed; sources made by `dataclasses.replace` share it."""

    def generation(self) -> Mapping[str, Any]:
        """Everything that decides the answers; sampled ones depend on the batch size, too."""
        import transformers

        return {
            **decisive(self.sampling),
            "stop_token_ids": list(self.prompting.stop_ids),
            "backend": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": self.sampling.batch_size,
        }

    @property
    def _generator(self) -> Generator:
        if not self.loaded:
            self.loaded.append(self.prompting.load(self.device, DTYPES[self.dtype]))
        return self.loaded[0]

    def answer(self, names: Sequence[str], keep: Journal, progress: Progress) -> None:
        """Answer in batches of similar length; a batch that was kept as a whole is not made again.

        Batches are those of all prompts, so a resumed run makes the same ones, with the same seeds.
        """
        missing, size = set(names), self.sampling.batch_size
        order = sorted(self.prompts, key=lambda name: (len(self.prompts[name]), name))
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            if missing.isdisjoint(batch):
                continue
            answers = zip(batch, self._batch(batch, self.sampling.seed + start), strict=True)
            fresh = [row_of(name, answer) for name, answer in answers if name in missing]
            keep.extend(fresh)
            progress(len(fresh))

    def _batch(self, names: Sequence[str], seed: int) -> list[Answer]:
        prompts = [self.prompts[name] for name in names]
        positions = self.prompting.files.architecture.max_position_embeddings
        longest = max(range(len(names)), key=lambda index: len(prompts[index]))
        wanted = self.sampling.max_new_tokens or DEFAULT_NEW_TOKENS
        limit = room(wanted, len(prompts[longest]), positions, f"{self.noun} {names[longest]}")
        sampling = replace(self.sampling, max_new_tokens=limit, seed=seed % (MAX_SEED + 1), batch_size=len(names))
        return self._generator.respond(prompts, sampling)


def default_dtype(device: str) -> str:
    """BF16 on a GPU, float32 elsewhere."""
    return "bf16" if device.startswith("cuda") else "fp32"
