"""Recipes of the paper's settings train with the values that docs/losses.md names, each with its source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nemo_lmpo
from tests.unit.composed import recipe

SETTINGS = ("mistral_7b_base", "mistral_7b_instruct", "llama3_8b_base", "llama3_8b")
DOCS = Path(nemo_lmpo.__file__).parent.parent / "docs" / "losses.md"

# SimPO's README, "For DPO, the best hyperparameters for each setting are as follows".
DPO_RATES = (5e-7, 5e-7, 5e-7, 7e-7)
# SimPO's appendix: what it searched, and what it fixed.
SEARCHED: dict[str, dict[str, tuple[float, ...]]] = {
    "cpo": {"beta": (0.01, 0.05, 0.1), "lam": (1.0,)},
    "slic": {"delta": (0.5, 1.0, 2.0, 10.0), "lam": (0.1, 0.5, 1.0, 10.0)},
    "ipo": {"tau": (0.01, 0.1, 0.5, 1.0)},
    "kto": {"beta": (0.01, 0.05, 0.1), "desirable_weight": (1.0,), "undesirable_weight": (1.0,)},
}
SEARCHED_RATES = (3e-7, 5e-7, 6e-7, 1e-6)


@pytest.mark.parametrize(("setting", "rate"), zip(SETTINGS, DPO_RATES, strict=True))
def test_dpo_as_published(setting: str, rate: float) -> None:
    config = recipe(f"dpo_{setting}")
    assert (config.loss.beta, config.optim.lr) == (0.01, rate)
    assert not config.loss.average_log_probs
    assert config.loss.ld_alpha is None


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", SEARCHED)
def test_other_baselines_lie_in_the_published_ranges(method: str, setting: str) -> None:
    config = recipe(f"{method}_{setting}")
    for option, values in SEARCHED[method].items():
        assert getattr(config.loss, option) in values, option
    assert config.optim.lr in SEARCHED_RATES


@pytest.mark.parametrize("setting", SETTINGS)
def test_terms_that_the_values_belong_to(setting: str) -> None:
    # beta 0.01 and lambda 1 are published for a mean per token; SLiC's hinge compares sums.
    assert recipe(f"cpo_{setting}").loss.nll == "mean"
    assert recipe(f"slic_{setting}").loss.nll == "sum"
    for method in ("lmpo", "dpo", "slic", "ipo", "cpo", "kto", "simpo"):
        assert recipe(f"{method}_{setting}").loss.sft_weight == 0


@pytest.mark.skipif(not DOCS.is_file(), reason="an installed package has no docs folder")
def test_the_table_of_the_documentation_holds_what_recipes_have() -> None:
    section = DOCS.read_text().split("## Published values")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    options = {"`dpo` beta": ("dpo", ("beta",)), "`cpo` beta / lam": ("cpo", ("beta", "lam"))}
    options |= {"`slic` delta / lam": ("slic", ("delta", "lam")), "`ipo` tau": ("ipo", ("tau",))}
    options |= {
        "`lmpo` beta / log_h / lam": ("lmpo", ("beta", "log_h", "lam")),
        "`simpo` beta / gamma": ("simpo", ("beta", "gamma")),
        "`kto` beta, weights": ("kto", ("beta", "desirable_weight")),
    }
    rates = {"`dpo` learning rate": ("dpo",), "`lmpo`, `simpo` learning rate": ("lmpo", "simpo")}
    rates |= {"learning rate of `cpo`, `slic`, `ipo`, `kto`, `sft`": ("cpo", "slic", "ipo", "kto", "sft")}
    checked = 0
    for title, *cells in rows[2:]:
        for setting, cell in zip(SETTINGS, cells, strict=False):
            numbers = [float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", cell)]
            if title in options:
                method, names = options[title]
                config = recipe(f"{method}_{setting}")
                assert numbers == [getattr(config.loss, name) for name in names], (title, setting)
            else:
                for method in rates[title]:
                    assert numbers == [recipe(f"{method}_{setting}").optim.lr], (method, setting)
            checked += 1
    assert checked == 4 * (len(options) + len(rates))
