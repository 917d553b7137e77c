"""What is compared with what, and what the paper says comes out. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Variant:
    """One contender: a method of the scale's recipes, and what is different from it."""

    label: str
    method: str
    overrides: tuple[str, ...] = ()


START = Variant("start model", "sft", ("optim.lr=0", "trainer.max_steps=1"))
"""The model before preference optimisation, measured as all others: a run of one step that changes nothing."""
LMPO = Variant("LMPO", "lmpo")
SIMPO = Variant("SimPO", "simpo")
DPO = Variant("DPO", "dpo")


@dataclass(frozen=True)
class Claim:
    """Something the paper says: ``measure`` of ``high`` is above that of ``low``."""

    text: str
    source: str
    measure: str
    high: Variant
    low: Variant


def _claims(source: str, *said: tuple[str, str, Variant, Variant]) -> tuple[Claim, ...]:
    """Several claims of one source: text, measure, high and low of each."""
    return tuple(Claim(text, source, measure, high, low) for text, measure, high, low in said)


@dataclass(frozen=True)
class Suite:
    """One figure or table of the paper."""

    name: str
    title: str
    about: str
    variants: tuple[Variant, ...]
    measures: tuple[str, ...]
    claims: tuple[Claim, ...]
    curves: tuple[str, ...] = field(default=("logps", "margin"))
    """Charts over the steps."""


def with_lambda(value: str, *more: str, label: str = "LMPO") -> Variant:
    """LMPO with another weight of the margin."""
    return Variant(f"{label}, λ = {value}", "lmpo", (f"loss.lam={value}", *more))


LOW, MIDDLE, HIGH = (with_lambda(value) for value in ("0.05", "0.2", "1.0"))
_CODE = "loss.compat=released_code"
CODE_LOW, CODE_HIGH = (with_lambda(value, _CODE, label="released code") for value in ("0.05", "1.0"))
NO_Z_SCORE = Variant("without Z-score", "lmpo", ("loss.z_score=false",))
NO_AVERAGE = Variant("without average length", "lmpo", ("loss.average_length_normalization=false",))
LOG, CUBE, SIGMOID = (
    Variant(f"{name} margin", "lmpo", (f"loss.margin={name}",)) for name in ("log", "cube", "sigmoid")
)
SLIC, IPO, CPO, KTO = (Variant(label, label.lower()) for label in ("SLiC", "IPO", "CPO", "KTO"))
R_DPO = Variant("R-DPO", "rdpo")
# 0.2 is what the Llama 3 report adds to DPO (arXiv:2407.21783, Section 4.1.4).
DPO_SFT = Variant("DPO + SFT", "dpo", ("loss.sft_weight=0.2",))
SIMPO_SFT = Variant("SimPO + SFT", "simpo", ("loss.sft_weight=0.2",))
LD_DPO = Variant("LD-DPO", "dpo", ("loss.ld_alpha=0.5",))
DPO_PER_TOKEN = Variant("DPO per token", "dpo", ("loss.average_log_probs=true", "loss.beta=5"))
DPO_IN_MEMORY = Variant("DPO, reference in memory", "dpo", ("model.reference_in_memory=true",))

QUALITY = ("accuracy", "margin", "chosen", "chosen_change", "rejected", "length", "finished", "right")

_SHORTER = Claim("LMPO answers shorter than SimPO (length controlled)", "Sec. 4.2, Table 1", "length", SIMPO, LMPO)
_KEPT, _REJECTED, _WIDENED = _claims(
    "Sec. 5.1, Figure 2",
    ("LMPO keeps the log-probability of chosen answers higher than SimPO", "chosen", LMPO, SIMPO),
    ("and that of rejected answers, too: it constrains both", "rejected", LMPO, SIMPO),
    ("LMPO widens the margin between chosen and rejected", "margin", LMPO, START),
)

FIGURE2 = Suite(
    "figure2",
    "Figure 2: log-probabilities of chosen and rejected answers, LMPO against SimPO",
    "The paper argues that LMPO's margin term holds back the fall of both log-probabilities that SimPO shows, while "
    "the distance between them still grows.",
    (START, LMPO, SIMPO),
    ("chosen", "chosen_change", "rejected", "margin", "accuracy", "length", "finished", "right"),
    (_KEPT, _REJECTED, _WIDENED, _SHORTER),
)

FIGURE3 = Suite(
    "figure3",
    "Figure 3: log-probability of chosen answers under three values of λ",
    "λ weighs the normalised margin in the loss. The runs differ in nothing else.",
    (START, LOW, MIDDLE, HIGH),
    ("chosen", "chosen_change", "rejected", "margin"),
    _claims(
        "Sec. 5.2, Figure 3",
        ("A larger λ makes the log-probability of chosen answers fall faster", "chosen", LOW, HIGH),
    ),
)

TABLE3 = Suite(
    "table3",
    "Table 3: what λ does to answers",
    "The paper reports AlpacaEval 2 win rates, which need a judge; here are held-out accuracy, margin and the length "
    "of greedy answers.",
    (START, LOW, MIDDLE, HIGH),
    QUALITY,
    (Claim("A larger λ makes answers shorter", "Sec. 5.2, Table 3", "length", LOW, HIGH),),
    (),
)

TABLE2 = Suite(
    "table2",
    "Table 2: LMPO's parts taken away or replaced",
    "Without the Z-score the margin enters as it is; without average-length normalisation probabilities are those of "
    "an average token. The three other margins are the paper's, their constants the authors' (see docs/losses.md).",
    (START, LMPO, NO_Z_SCORE, NO_AVERAGE, LOG, CUBE, SIGMOID),
    QUALITY,
    _claims(
        "Sec. 4.2, Table 2",
        ("Without the Z-score the result is worse", "accuracy", LMPO, NO_Z_SCORE),
        ("Without average-length normalisation it is worse", "accuracy", LMPO, NO_AVERAGE),
        ("Without the Z-score fewer answers are right", "right", LMPO, NO_Z_SCORE),
        ("Without average-length normalisation fewer answers are right", "right", LMPO, NO_AVERAGE),
        ("Without the Z-score answers are shorter", "length", LMPO, NO_Z_SCORE),
        ("Without average-length normalisation answers are shorter", "length", LMPO, NO_AVERAGE),
        *((f"LMPO's margin answers longer than the {one.label}", "length", LMPO, one) for one in (LOG, CUBE, SIGMOID)),
    ),
)

TABLE1 = Suite(
    "table1",
    "Table 1: all methods",
    "The paper reports AlpacaEval 2 and Arena-Hard, which need a judge; here are held-out accuracy, margin, likelihood "
    "and the length of greedy answers. SFT goes on with fine-tuning on the chosen answers; the paper's SFT rows are "
    "the start model.",
    (START, Variant("SFT", "sft"), DPO, SLIC, IPO, CPO, KTO, SIMPO, LMPO),
    QUALITY,
    (
        _SHORTER,
        _KEPT,
        _WIDENED,
        Claim("LMPO separates held-out pairs better than the start", "Sec. 4.2, Table 1", "accuracy", LMPO, START),
    ),
    (),
)

LENGTH = Suite(
    "length",
    "Against length and falling likelihoods: LMPO beside what is used today",
    "DPO with less weight on the longer response's tail (LD-DPO, alpha 0.5), per token (beta 5), or with a length "
    "penalty (R-DPO); SimPO; both with 0.2 times the chosen answer's likelihood.",
    (START, DPO, DPO_SFT, R_DPO, LD_DPO, DPO_PER_TOKEN, SIMPO, SIMPO_SFT, LMPO),
    QUALITY,
    (
        _SHORTER,
        Claim("LD-DPO answers shorter than DPO", "LD-DPO, arXiv:2409.06411", "length", DPO, LD_DPO),
        Claim("R-DPO answers shorter than DPO", "R-DPO, arXiv:2403.19159", "length", DPO, R_DPO),
        Claim("DPO per token answers shorter than DPO", "Tulu 3, arXiv:2411.15124", "length", DPO, DPO_PER_TOKEN),
        Claim(
            "A likelihood keeps up DPO's chosen log-probability", "Llama 3, arXiv:2407.21783", "chosen", DPO_SFT, DPO
        ),
        Claim("and SimPO's", "SimPO's README", "chosen", SIMPO_SFT, SIMPO),
    ),
)

SIMPO_TABLE = Suite(
    "simpo",
    "SimPO's Table 4: its own baselines",
    "The methods that SimPO compares with; the LMPO paper takes some of them over. SimPO reports AlpacaEval 2, "
    "Arena-Hard and MT-Bench, which need a judge.",
    (START, Variant("RRHF", "rrhf"), SLIC, DPO, IPO, CPO, KTO, Variant("ORPO", "orpo"), R_DPO, SIMPO),
    QUALITY,
    (Claim("SimPO separates held-out pairs better than DPO", "SimPO, Table 4", "accuracy", SIMPO, DPO),),
    (),
)

TABLE6 = Suite(
    "table6",
    "Table 6: peak memory",
    "DPO keeps a second, frozen model in memory in the paper. This project computes its log-probabilities before "
    "training by default, shown as plain DPO. A process without any model takes about 0.6 GiB on a CPU, so tiny models "
    "show no difference.",
    (DPO_IN_MEMORY, DPO, SIMPO, LMPO),
    ("memory",),
    (
        Claim("DPO with its reference model takes more memory than SimPO", "Table 6", "memory", DPO_IN_MEMORY, SIMPO),
        Claim("and more than LMPO", "Table 6", "memory", DPO_IN_MEMORY, LMPO),
    ),
    (),
)

COMPAT = Suite(
    "compat",
    "The printed equations against the released code",
    "The released trainer takes the margin as a constant, halves it, and normalises it by statistics that start at "
    "zero without correction and move before each micro-batch. The paper derives the gradient through the margin "
    "(Appendix A).",
    (START, LOW, HIGH, CODE_LOW, CODE_HIGH),
    QUALITY,
    (
        Claim(
            "Printed equations: a larger λ holds the chosen log-probability up, as Sec. 5.1 argues",
            "Sec. 5.1, Appendix A",
            "chosen",
            HIGH,
            LOW,
        ),
        *(
            Claim(f"Released code: a larger λ makes {what}, as {place} shows", place, measure, CODE_LOW, CODE_HIGH)
            for what, place, measure in (
                ("it fall faster", "Figure 3", "chosen"),
                ("answers shorter", "Table 3", "length"),
            )
        ),
    ),
)

SUITES: dict[str, Suite] = {
    suite.name: suite for suite in (FIGURE2, FIGURE3, TABLE1, TABLE2, TABLE3, TABLE6, COMPAT, LENGTH, SIMPO_TABLE)
}


@dataclass(frozen=True)
class Measure:
    """A number that runs are compared by."""

    label: str
    unit: str
    digits: int


MEASURES: dict[str, Measure] = {
    "accuracy": Measure("accuracy", "% of held-out pairs ranked right by the method's own reward", 1),
    "margin": Measure("margin", "nats per token, chosen less rejected, held out", 3),
    "chosen": Measure("chosen log-probability", "nats per token, held out", 3),
    "chosen_change": Measure("chosen: change", "nats per token since the start model", 3),
    "rejected": Measure("rejected log-probability", "nats per token, held out", 3),
    "length": Measure("answer length", "tokens of greedy answers to held-out prompts", 1),
    "finished": Measure("finished", "% of greedy answers that end before the limit", 1),
    "right": Measure("right", "% of greedy answers with the right letters in order", 1),
    "memory": Measure("peak memory", "GiB of one process", 3),
}
