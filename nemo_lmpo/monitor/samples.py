"""Answers that a run samples at validation, and the file that they go to: `samples.jsonl`, a line an answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_lmpo.errors import TrainingError
from nemo_lmpo.monitor.lines import cut_lines
from nemo_lmpo.runtime import run_files


@dataclass(frozen=True)
class Sample:
    """The policy's answer to a validation prompt."""

    prompt: str
    """As the model sees it, special tokens included."""
    answer: str
    tokens: int
    """Of the answer, the one that ends it included."""
    finished: bool
    """Whether the policy ended it itself, and not `logging.sample_tokens`."""


class SamplesFile:
    """Appends to `samples.jsonl`; to be made on global rank 0 only.

    A resumed run leaves the file as if it had never been interrupted; one that begins anew leaves nothing of before.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        """Cut off what lies behind ``resume_step``."""
        self._path = run_dir / run_files.SAMPLES
        self._resume_step = resume_step
        # The answers of the start model stand at step 0, which a run that begins anew takes again.
        self._present = bool(cut_lines(self._path, resume_step if resume_step > 0 else -1))

    def write(self, step: int, samples: Sequence[Sample]) -> bool:
        """Write the answers of a validation, unless they are there already; whether they were not.

        Args:
            step: finished optimizer steps; 0: the start model's answers.
            samples: one a prompt.

        Raises:
            TrainingError: they cannot be written, for example because the disk is full.
        """
        if step == self._resume_step and self._present:
            return False
        entries = [{"step": step, "prompt_index": index, **asdict(sample)} for index, sample in enumerate(samples)]
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        try:
            # One write: a kill can then only cut the last lines, which a resume takes again.
            with self._path.open("ab", buffering=0) as file:
                file.write(text.encode(errors="replace"))
        except OSError as error:
            raise TrainingError(f"cannot write {self._path} ({error}); free the disk and resume the run") from error
        return True


def as_markdown(sample: Sample) -> str:
    """Prompt and answer as code blocks, which keep every letter and line."""
    end = "" if sample.finished else ", cut"
    blocks = (
        f"Prompt\n\n{_indented(sample.prompt)}",
        f"Answer ({sample.tokens} tokens{end})\n\n{_indented(sample.answer)}",
    )
    return "\n\n".join(blocks)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
