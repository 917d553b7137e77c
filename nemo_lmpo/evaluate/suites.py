"""What the suites are: sizes, the paper's generation settings, the ten tasks. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

ALPACA_EVAL, ARENA_HARD, LEADERBOARD = "alpaca_eval", "arena_hard", "leaderboard"
TITLES = {ALPACA_EVAL: "AlpacaEval 2", ARENA_HARD: "Arena-Hard v0.1", LEADERBOARD: "Open LLM Leaderboard v1 and v2"}

ALPACA_EVAL_INSTRUCTIONS, ARENA_HARD_QUESTIONS = 805, 500

SETTINGS = {
    "mistral_7b_base": "Mistral-Base (7B)",
    "mistral_7b_instruct": "Mistral-Instruct (7B)",
    "llama3_8b_base": "Llama-3-Base (8B)",
    "llama3_8b_instruct": "Llama-3-Instruct (8B)",
}
"""The paper's settings, in its order."""
SETTING_OF_RECIPE = {**{name: name for name in SETTINGS}, "llama3_8b": "llama3_8b_instruct"}
METHODS = ("SFT", "DPO", "SLiC", "IPO", "CPO", "KTO", "SimPO", "LMPO")
METHOD_OF_LOSS = {method.lower(): method for method in (*METHODS, "ORPO")}


PAPER_LAMBDA = {"mistral_7b_base": 1.0}
"""The weight of the margin in Table 5, where it is not the usual one."""
PAPER_LAMBDA_ELSE = 0.2


def lambda_variant(setting: str | None, value: float) -> str | None:
    """Which variant has that lambda in a setting; None: it is the setting's own."""
    return None if value == PAPER_LAMBDA.get(setting or "", PAPER_LAMBDA_ELSE) else f"lambda={value:g}"


@dataclass(frozen=True)
class GenerationSettings:
    """How answers are sampled."""

    temperature: float
    """0: greedy."""
    max_new_tokens: int
    top_p: float = 1.0


_ALPACA_EVAL = {
    "mistral_7b_base": GenerationSettings(0.7, 2048),
    "mistral_7b_instruct": GenerationSettings(0.5, 2048),
    "llama3_8b_base": GenerationSettings(0.9, 4096),
    "llama3_8b_instruct": GenerationSettings(0.9, 4096),
}
_ALPACA_EVAL_OTHER = GenerationSettings(0.7, 2048)
_ARENA_HARD = GenerationSettings(0.0, 4096)


def generation_settings(suite: str, setting: str | None) -> GenerationSettings:
    """The paper's (SimPO's) settings; other models get those of Mistral-Base in AlpacaEval."""
    if suite == ARENA_HARD:
        return _ARENA_HARD
    return _ALPACA_EVAL.get(setting or "", _ALPACA_EVAL_OTHER)


@dataclass(frozen=True)
class Task:
    """A column of the paper's Table 4 as lm-evaluation-harness runs it."""

    name: str
    """Ours, unique."""
    column: str
    """The paper's."""
    harness: str
    """The harness's task or group."""
    shots: int
    metric: str
    filter: str = "none"
    version: str = "v2"
    chat_template: bool = False
    until: tuple[str, ...] = ()
    """Stop strings instead of the task's own."""
    note: str = ""


TASKS = (
    Task("mmlu_pro", "MMLU-PRO", "leaderboard_mmlu_pro", 5, "acc"),
    Task("ifeval", "IFEval", "leaderboard_ifeval", 0, "prompt_level_strict_acc", note="without a chat template"),
    Task(
        "ifeval_chat",
        "IFEval",
        "leaderboard_ifeval",
        0,
        "prompt_level_strict_acc",
        chat_template=True,
        note="with the chat template",
    ),
    Task("bbh", "BBH", "leaderboard_bbh", 3, "acc_norm"),
    Task("gpqa", "GPQA", "leaderboard_gpqa", 0, "acc_norm"),
    Task("musr", "MUSR", "leaderboard_musr", 0, "acc_norm"),
    Task("math", "MATH", "leaderboard_math_hard", 4, "exact_match_original"),
    Task(
        "gsm8k",
        "GSM8K",
        "gsm8k",
        5,
        "exact_match",
        filter="strict-match",
        version="v1",
        until=(":", "Question:", "Question"),
        note="with the stop strings of the paper's harness",
    ),
    Task(
        "gsm8k_today",
        "GSM8K",
        "gsm8k",
        5,
        "exact_match",
        filter="strict-match",
        version="v1",
        note="with today's stop strings",
    ),
    Task("arc", "ARC", "arc_challenge", 25, "acc_norm", version="v1"),
    Task("truthfulqa", "TruthfulQA", "truthfulqa_mc2", 0, "acc", version="v1"),
    Task("winogrande", "Winogrande", "winogrande", 5, "acc", version="v1"),
)
"""In the order of the paper's columns. Of two rows with one column the first is taken for the paper's."""
COLUMNS = tuple(dict.fromkeys(task.column for task in TASKS))
