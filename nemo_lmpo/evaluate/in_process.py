"""Answers by `transformers` in this process, for machines without a server. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.engine import Generator, Prompting
from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.evaluate.answers import Progress, room, row_of
from nemo_lmpo.evaluate.data_files import Instruction
from nemo_lmpo.evaluate.suites import GenerationSettings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class InProcessSource:
    """A model that is loaded when the first answer is missing."""

    prompting: Prompting
    prompts: Mapping[str, list[int]]
    settings: GenerationSettings
    seed: int
    batch_size: int
    device: str
    dtype: str

    def generation(self) -> Mapping[str, Any]:
        """Everything that decides the answers; sampled ones depend on the batch size, too."""
        import transformers

        return {
            **asdict(self.settings),
            "seed": self.seed,
            "stop_token_ids": list(self.prompting.stop_ids),
            "backend": f"transformers {transformers.__version__}, torch {torch.__version__}",
            "device": self.device,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
        }

    @cached_property
    def _generator(self) -> Generator:
        return self.prompting.load(self.device, DTYPES[self.dtype])

    def answer(self, instructions: Sequence[Instruction], keep: Journal, progress: Progress) -> None:
        """Answer in batches of similar length; a batch that was kept as a whole is not made again.

        Batches are those of all prompts, so a run that goes on makes the same ones, with the same seeds.
        """
        missing = {one.id for one in instructions}
        order = sorted(self.prompts, key=lambda name: (len(self.prompts[name]), name))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if missing.isdisjoint(batch):
                continue
            answers = zip(batch, self._batch(batch, self.seed + start), strict=True)
            fresh = [row_of(name, answer) for name, answer in answers if name in missing]
            keep.extend(fresh)
            progress(len(fresh))

    def _batch(self, names: Sequence[str], seed: int) -> list[Answer]:
        prompts = [self.prompts[name] for name in names]
        positions = self.prompting.files.architecture.max_position_embeddings
        longest = max(range(len(names)), key=lambda index: len(prompts[index]))
        limit = room(self.settings.max_new_tokens, len(prompts[longest]), positions, names[longest])
        sampling = Sampling(limit, self.settings.temperature, self.settings.top_p, seed=seed, batch_size=len(names))
        return self._generator.respond(prompts, sampling)


def default_dtype(device: str) -> str:
    """BF16 on a GPU, float32 elsewhere."""
    return "bf16" if device.startswith("cuda") else "fp32"
