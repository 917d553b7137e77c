"""How large: which recipes, how many steps and seeds, and how runs are started. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_lmpo.errors import ConfigError


@dataclass(frozen=True)
class Scale:
    """One size of a comparison."""

    name: str
    about: str
    setting: str
    """Recipes are called METHOD_SETTING."""
    overrides: tuple[str, ...] = ()
    """For every run."""
    start: tuple[str, ...] = ()
    """Overrides of the SFT run that makes the start model; none: the recipe's own start."""
    seeds: int = 1
    answers: int = 0
    """Held-out prompts to answer greedily."""
    answer_tokens: int = 512
    separate: bool = False
    """Start runs through torchrun with the recipe's number of processes, instead of in one process each."""

    def recipe(self, method: str) -> str:
        """The recipe of a method."""
        return f"{method}_{self.setting}"


_QUIET = ("logging.report=false", "logging.tensorboard=false")
# Only the end of a run is looked at.
_LAST_CHECKPOINT = ("checkpoint.save_interval=0", "checkpoint.keep_best=0", "checkpoint.keep_last=1")

_ONE_THREAD = (*_QUIET, *_LAST_CHECKPOINT, "trainer.num_threads=1")

TINY = Scale(
    "tiny",
    "A Llama of 0.9 million parameters on the generated sorting task, one CPU thread per run. The start model is "
    "trained by this project's SFT loss on the builtin set tiny_sft, whose answers are right and padded with filler "
    "words; the pairs are the builtin set tiny_long, whose chosen answers are right and longer than the rejected ones "
    "more often than not.",
    "tiny",
    (
        *_ONE_THREAD,
        "data.train.path=builtin:tiny_long",
        "data.validation.path=builtin:tiny_long",
        "model.global_batch_size=32",
        "optim.lr=1e-4",
        "trainer.max_steps=60",
        "trainer.val_check_interval=20",
    ),
    start=(
        *_ONE_THREAD,
        "data.train.path=builtin:tiny_sft",
        "data.validation.path=builtin:tiny_sft",
        "optim.lr=2e-3",
        "trainer.max_steps=300",
        "trainer.val_check_interval=100",
    ),
    seeds=3,
    answers=128,
    answer_tokens=40,
)

SMOLLM2 = Scale(
    "smollm2",
    "SmolLM2-135M-Instruct on preference pairs of the user's choice.",
    "smollm2_135m",
    (*_QUIET, *_LAST_CHECKPOINT, "trainer.max_steps=30", "trainer.val_check_interval=10"),
    answers=16,
    answer_tokens=256,
)


def _paper(setting: str) -> Scale:
    about = f"The paper's setting {setting}: its recipes as they are, on one node of four GPUs."
    return Scale(setting, about, setting, ("logging.report=false",), answers=256, answer_tokens=1024, separate=True)


SCALES: dict[str, Scale] = {
    scale.name: scale
    for scale in (
        TINY,
        SMOLLM2,
        *(_paper(setting) for setting in ("mistral_7b_base", "mistral_7b_instruct", "llama3_8b_base", "llama3_8b")),
    )
}


def find_scale(name: str) -> Scale:
    """The scale of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in SCALES:
        raise ConfigError(f"--scale {name} is unknown; choose {', '.join(SCALES)}")
    return SCALES[name]
