"""The paper's own numbers (Tables 1 to 4), judged by gpt-4-1106-preview, and what is wrong with them.

The errata come from comparing the paper with SimPO's README and with the released configurations, and from adding up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_lmpo.evaluate.suites import COLUMNS, METHODS, SETTINGS

PUBLISHED_JUDGE = "gpt-4-1106-preview"
TABLE3_COLUMNS = ("lc", "wr", "length")
TABLE1_COLUMNS = (*TABLE3_COLUMNS, "arena_wr", "arena_length")

_TABLE1 = {
    "mistral_7b_base": """
        6.2 4.6 1082 3.3 437
        15.1 12.5 1477 10.4 628
        10.9 8.9 1525 7.3 683
        11.8 9.4 1380 7.5 674
        9.8 8.9 1827 5.8 823
        13.1 9.1 1144 5.6 475
        17.7 16.5 1803 14.3 709
        20.9 14.9 1351 13.8 458
    """,
    "mistral_7b_instruct": """
        17.1 14.7 1676 12.6 486
        26.8 24.9 1808 16.3 518
        24.1 24.6 2088 18.1 517
        20.3 20.3 2024 16.2 740
        23.8 28.8 3245 22.6 812
        24.5 23.6 1901 17.9 496
        29.7 31.7 2350 22.3 572
        29.8 28.0 1881 23.5 485
    """,
    "llama3_8b_base": """
        8.4 6.2 914 1.3 521
        18.2 15.5 1585 15.9 563
        12.1 10.1 1540 10.3 676
        14.4 14.2 1856 17.8 608
        12.3 13.7 2495 11.6 800
        14.2 12.4 1646 12.5 519
        21.6 20.0 1818 26.9 877
        21.3 17.7 1601 30.1 1114
    """,
    "llama3_8b_instruct": """
        26.0 25.3 1920 22.3 596
        40.3 37.9 1883 32.6 528
        31.3 28.4 1805 26.5 502
        35.6 35.6 1983 30.5 554
        28.9 32.2 2166 28.8 624
        33.1 31.8 1909 26.4 536
        43.9 39.0 1788 33.8 502
        43.7 39.0 1791 34.3 477
    """,
}
"""LC, WR and characters in AlpacaEval 2, WR and tokens in Arena-Hard: a line a method, in the order of METHODS."""

_TABLE4_METHODS = ("DPO", "SLiC", "IPO", "KTO", "CPO", "SimPO", "LMPO")
_TABLE4 = {
    "mistral_7b_base": """
        26.73 10.49 43.27 28.44 43.65 1.36 21.76 61.26 53.06 76.80 4.5 4.5
        26.52 12.45 42.33 27.93 33.74 1.38 33.74 55.38 48.36 77.35 4.8 4.8
        25.87 11.52 40.59 28.15 42.15 1.25 27.14 60.84 45.44 77.58 5.2 5.2
        27.51 12.03 43.66 29.45 43.17 2.34 38.51 62.37 56.60 77.27 2.2 2.2
        27.04 13.32 42.05 28.45 42.15 2.15 33.06 57.00 47.07 76.48 4.3 4.3
        27.13 10.63 42.94 29.03 39.68 2.49 20.92 61.86 46.48 77.19 4.5 4.5
        28.05 12.15 43.72 30.37 40.61 2.87 22.06 61.95 50.67 77.43 2.4 2.4
    """,
    "mistral_7b_instruct": """
        26.81 22.89 45.46 28.19 46.43 1.89 35.25 66.89 68.40 76.32 3.6 3.6
        25.69 29.53 45.24 27.04 43.90 1.95 39.65 59.90 65.30 76.32 5.2 5.2
        25.75 27.85 43.81 26.61 43.55 2.02 39.42 63.31 67.36 75.85 5.7 5.7
        27.46 35.42 45.34 28.19 45.77 2.35 38.80 65.72 68.43 75.91 2.8 2.8
        26.85 36.81 45.01 28.15 43.28 2.28 38.74 63.23 67.38 76.80 4.1 4.1
        27.10 37.52 45.70 28.04 44.71 2.19 34.87 65.53 68.40 76.01 3.6 3.6
        26.16 35.94 45.84 28.36 44.84 2.49 34.04 65.57 70.56 76.72 2.7 2.7
    """,
    "llama3_8b_base": """
        31.58 33.61 47.80 32.23 40.48 4.53 38.67 64.42 53.48 76.80 5.4 4.1
        31.11 32.37 46.53 33.29 40.55 3.92 48.82 61.43 54.95 77.27 5.2 4.4
        30.18 31.52 46.78 32.61 39.58 4.02 22.67 62.88 54.20 72.22 6.8 6.3
        31.16 37.10 47.98 33.72 40.21 4.14 38.97 63.14 55.76 76.09 4.0 3.7
        30.95 38.57 47.17 33.15 41.59 4.25 46.93 61.69 54.29 76.16 4.2 3.8
        31.61 37.55 48.38 33.22 40.08 4.23 31.54 65.02 59.42 77.42 3.5 3.0
        31.83 36.58 48.51 31.96 40.32 4.98 36.47 65.13 58.04 77.90 3.0 2.7
    """,
    "llama3_8b_instruct": """
        35.86 44.57 48.31 31.04 39.02 8.23 49.81 63.99 59.01 74.66 3.0 2.8
        33.25 44.01 47.55 30.52 38.10 8.29 66.57 61.26 53.23 76.16 4.0 4.3
        32.97 43.27 46.31 30.95 38.58 8.02 58.23 61.95 54.64 73.09 5.8 5.0
        35.00 40.12 47.15 29.70 38.10 7.63 57.01 63.57 58.15 73.40 5.6 5.1
        34.56 44.08 48.51 30.08 38.81 7.75 67.40 62.29 54.01 73.72 4.7 4.0
        35.09 43.05 48.95 31.29 39.15 8.16 50.19 62.88 60.74 73.01 3.7 3.3
        36.13 45.33 49.64 29.92 39.29 8.26 43.37 61.77 60.06 72.85 4.4 3.4
    """,
}
"""The columns of COLUMNS, the average rank as printed, and as it follows from the rows shown."""


def _table(
    settings: Mapping[str, str], methods: Sequence[str], columns: Sequence[str]
) -> Mapping[tuple[str, str], Mapping[str, float]]:
    """Numbers by setting and method, then by column."""
    return {
        (setting, method): dict(zip(columns, map(float, line.split()), strict=True))
        for setting, text in settings.items()
        for method, line in zip(methods, text.strip().splitlines(), strict=True)
    }


TABLE1 = _table(_TABLE1, METHODS, TABLE1_COLUMNS)
TABLE4 = _table(_TABLE4, _TABLE4_METHODS, (*COLUMNS, "rank", "rank recomputed"))
TABLE2_SETTING, TABLE3_SETTING = "llama3_8b_base", "mistral_7b_base"


@dataclass(frozen=True)
class Ablation:
    """A row of Table 2: Arena-Hard, Llama-3-Base."""

    label: str
    method: str
    variant: str | None
    wr: float
    low: float
    high: float
    length: float


TABLE2 = (
    Ablation("SimPO", "SimPO", None, 26.9, 25.1, 28.7, 877),
    Ablation("LMPO", "LMPO", None, 30.1, 27.7, 32.4, 1114),
    Ablation("without Z-score normalization", "LMPO", "no_z_score", 22.5, 20.0, 25.0, 630),
    Ablation("without average-length normalization", "LMPO", "no_average_length", 27.9, 26.2, 29.6, 843),
    Ablation("log function", "LMPO", "log", 27.9, 25.9, 30.1, 770),
    Ablation("cube function", "LMPO", "cube", 29.3, 27.4, 31.7, 903),
    Ablation("sigmoid function", "LMPO", "sigmoid", 25.2, 22.5, 27.3, 649),
)


@dataclass(frozen=True)
class Lambda:
    """A row of Table 3: AlpacaEval 2, Mistral-Base."""

    value: float
    lc: float
    wr: float
    error: float
    length: float


TABLE3 = (
    Lambda(0.05, 16.1, 14.6, 1.1, 1751),
    Lambda(0.2, 16.6, 15.0, 1.0, 1726),
    Lambda(1.0, 20.9, 14.9, 1.1, 1351),
)


@dataclass(frozen=True)
class Erratum:
    """Something that does not hold in a table; it stands at the cells that it is about."""

    table: int
    text: str
    setting: str | None = None
    """None: all."""
    methods: tuple[str, ...] = ()
    """Empty: no cell in particular."""
    columns: tuple[str, ...] = ()


ERRATA = (
    *(
        Erratum(
            1,
            "The SFT rows of Mistral-Base and Llama-3-Base are swapped against SimPO's README (Mistral-Base 8.4 / "
            "6.2 / Arena-Hard 1.3, Llama-3-Base 6.2 / 4.6 / 3.3).",
            setting,
            ("SFT",),
            TABLE1_COLUMNS,
        )
        for setting in ("mistral_7b_base", "llama3_8b_base")
    ),
    Erratum(
        1,
        "This is SimPO's RRHF row; its SLiC-HF row reads LC 26.9, WR 27.5, Arena-Hard 26.2.",
        "llama3_8b_instruct",
        ("SLiC",),
        TABLE1_COLUMNS,
    ),
    Erratum(
        1,
        "SimPO's README has LC 33.1, WR 31.8, Arena-Hard 26.4 for CPO, which the paper prints for KTO.",
        "llama3_8b_instruct",
        ("CPO",),
        ("lc", "wr", "arena_wr"),
    ),
    Erratum(
        1,
        "SimPO's README has LC 10.8, WR 8.1, Arena-Hard 5.8 for CPO.",
        "llama3_8b_base",
        ("CPO",),
        ("lc", "wr", "arena_wr"),
    ),
    Erratum(1, "SimPO's README has Arena-Hard 6.9 for CPO.", "mistral_7b_base", ("CPO",), ("arena_wr",)),
    Erratum(1, "SimPO's README has Arena-Hard 18.9 for SLiC.", "mistral_7b_instruct", ("SLiC",), ("arena_wr",)),
    Erratum(
        1,
        "Appendix B names GPT-4 (0613) as Arena-Hard's baseline; the released judge configuration says gpt-4-0314, "
        "which is the baseline here.",
    ),
    Erratum(
        2,
        "The intervals resample battles, two of which belong to one question, so they are too narrow: by question they "
        "are about 1.6 times wider, and those of LMPO and SimPO then overlap.",
    ),
    *(
        Erratum(
            4,
            f"The average ranks of {SETTINGS[setting]} do not follow from the seven rows shown: they add up to "
            f"{total} instead of 28. Recomputed ones stand beside them; LMPO's is {rank}.",
            setting,
            _TABLE4_METHODS,
            ("rank",),
        )
        for setting, total, rank in (("llama3_8b_base", "32.1", "2.7"), ("llama3_8b_instruct", "31.2", "3.4"))
    ),
    Erratum(
        4,
        "The paper's harness stops GSM8K at ':', so a model that writes 'Step 1:' scores nothing: the column measures "
        "form, too. Both stop strings are run here.",
    ),
    Erratum(4, "IFEval was most likely run without a chat template. Both are run here."),
)
