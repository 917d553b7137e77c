"""From a recipe's ``loss`` section to a configured loss, and what is said when it is wrong."""

from __future__ import annotations

import ast
import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import nemo_lmpo.loss
from nemo_lmpo.config.loss_section import parse_loss
from nemo_lmpo.errors import ConfigError
from nemo_lmpo.loss.interface import LossInputs
from nemo_lmpo.loss.options import OPTIONS, LMPOConfig, SimPOConfig
from nemo_lmpo.loss.registry import LOSSES, build_loss


def test_lmpo_is_the_default() -> None:
    assert parse_loss(None) == parse_loss({}) == parse_loss({"name": None}) == LMPOConfig()


@pytest.mark.parametrize("name", LOSSES)
def test_every_entry_parses_builds_and_survives_a_round_trip(name: str) -> None:
    config = parse_loss({"name": name})
    assert config.name == name
    assert parse_loss(dataclasses.asdict(config)) == config
    loss = build_loss(config)
    assert loss.name == name
    assert loss.needs_reference == (name in {"dpo", "rdpo", "ipo", "kto"})
    assert (loss.statistics is not None) == (name in {"lmpo", "kto"})


def test_numbers_come_as_ints_and_as_strings() -> None:
    config = parse_loss({"beta": 2, "lam": "1e-1", "h": "4", "momentum": "0.5"})
    assert (config.beta, config.lam, config.h, config.momentum) == (2.0, 0.1, 4.0, 0.5)
    assert all(isinstance(value, float) for value in (config.beta, config.lam, config.h))
    assert parse_loss({"name": "simpo", "gamma": 1.6}) == SimPOConfig(gamma=1.6)


@pytest.mark.parametrize(("given", "meant"), [(True, True), ("false", False), ("off", False), ("On", True)])
def test_booleans(given: bool | str, meant: bool) -> None:
    assert parse_loss({"z_score": given}).z_score is meant


def test_an_omegaconf_section_is_a_mapping() -> None:
    section: Any = OmegaConf.create("name: lmpo\nbeta: 2\nh: null\nlog_h: 1e-1\nz_score: false\n")
    assert parse_loss(section) == LMPOConfig(beta=2.0, log_h=0.1, z_score=False)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("lmpo", r"loss='lmpo' is not a group of settings"),
        ({"name": "sipmo"}, r"loss\.name='sipmo' is unknown; did you mean loss\.name=simpo\? Known: lmpo, .*simpo"),
        ({"name": ["lmpo"]}, r"loss\.name=\['lmpo'\]"),
        ({"gamma": 1.6}, r"loss\.gamma=1\.6: loss\.name=lmpo does not use it \(simpo would\)"),
        (
            {"name": "simpo", "lam": 1},
            r"loss\.lam=1: loss\.name=simpo does not use it \(lmpo, rrhf, slic, cpo, orpo would",
        ),
        ({"name": "sft", "beta": 1}, r"loss\.beta=1: .*Options of sft: nll"),
        ({"name": "sft", "sft_weight": 1}, r"loss\.sft_weight=1: loss\.name=sft does not use it"),
        ({"betta": 2}, r"unknown key loss\.betta; did you mean loss\.beta\? Options of lmpo: .*beta, h,"),
        ({"lambda": 0.2}, r"unknown key loss\.lambda; did you mean loss\.lam\?"),
        ({"name": "simpo", "gamma_beta_ratio": 0.5}, r"unknown key loss\.gamma_beta_ratio; did you mean loss\.gamma\?"),
        ({"beta": "big"}, r"loss\.beta='big' is not a number"),
        ({"beta": None}, r"loss\.beta must not be empty; give a number"),
        ({"beta": True}, r"loss\.beta=True is not a number"),
        ({"beta": [1]}, r"loss\.beta=\[1\] is not a number"),
        ({"z_score": 1}, r"loss\.z_score=1 is not true or false"),
        ({"z_score": "maybe"}, r"loss\.z_score='maybe' is not true or false"),
        ({"margin": 5}, r"loss\.margin=5 is unknown; choose power5"),
        ({"beta": 0}, r"loss\.beta=0\.0 must be greater than 0"),
        ({"beta": "nan"}, r"loss\.beta=nan must be a finite number"),
        ({"beta": math.inf}, r"loss\.beta=inf must be a finite number"),
        ({"lam": -1}, r"loss\.lam=-1\.0 must be at least 0"),
        ({"h": 0}, r"loss\.h=0\.0 must be greater than 0"),
        ({"log_h": "inf"}, r"loss\.log_h=inf"),
        ({"h": 4.0, "log_h": 1.4}, r"loss\.h=4\.0 and loss\.log_h=1\.4 disagree, as ln h is 1\.38629"),
        ({"compat": "code"}, r"loss\.compat='code' is unknown; choose paper, released_code"),
        ({"margin": "power3"}, r"loss\.margin='power3' is unknown; choose power5, log, cube, sigmoid"),
        ({"statistics": "batch"}, r"loss\.statistics='batch' is unknown; choose ema, cumulative"),
        ({"alpha": 5}, r"loss\.alpha=5\.0 has an effect only with loss\.margin=log; leave it out"),
        ({"margin": "log", "beta_s": 0.1}, r"loss\.beta_s=0\.1 has an effect only with loss\.margin=sigmoid"),
        ({"margin": "log", "alpha": 0}, r"loss\.alpha=0\.0 must be greater than 0"),
        ({"momentum": 1}, r"loss\.momentum=1\.0 must be at least 0 and less than 1"),
        ({"z_score": False, "momentum": 0.9}, r"loss\.momentum=0\.9 has an effect only with loss\.z_score=true"),
        ({"z_score": False, "statistics": "cumulative"}, r"loss\.statistics=cumulative has .* with loss\.z_score=true"),
        ({"statistics": "cumulative", "momentum": 0.9}, r"loss\.momentum=0\.9 has .* with loss\.statistics=ema"),
        (
            {"statistics": "cumulative", "compat": "released_code"},
            r"loss\.statistics=cumulative does not go with loss\.",
        ),
        ({"group_size": 8}, r"loss\.group_size=8 has an effect only with loss\.compat=released_code"),
        ({"compat": "released_code", "group_size": 1}, r"loss\.group_size=1 must be at least 2; one pair"),
        ({"compat": "released_code", "group_size": 2.5}, r"loss\.group_size=2\.5 is not a whole number"),
        ({"compat": "released_code", "group_size": "x"}, r"loss\.group_size='x' is not a whole number"),
        ({"z_score": False, "std_floor": 0.1}, r"loss\.std_floor=0\.1 has an effect only with loss\.z_score=true"),
        ({"std_floor": 0}, r"loss\.std_floor=0\.0 must be greater than 0"),
        ({"name": "dpo", "ld_alpha": 1.5}, r"loss\.ld_alpha=1\.5 must be at least 0 and at most 1; unset it"),
        ({"name": "dpo", "ld_alpha": "nan"}, r"loss\.ld_alpha=nan must be a finite number"),
        ({"name": "cpo", "nll": "average"}, r"loss\.nll='average' is unknown; choose mean, token_mean, sum"),
        ({"name": "kto", "desirable_weight": 0}, r"loss\.desirable_weight=0\.0 must be greater than 0"),
        ({"name": "ipo", "tau": 0}, r"loss\.tau=0\.0"),
    ],
)
def test_what_is_wrong_is_named(raw: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_loss(raw)


def test_all_that_is_wrong_is_named_at_once() -> None:
    wrong = {"beta": 0, "lam": "much", "gama": 1, "momentum": 0.5, "statistics": "cumulative", "group_size": 4}
    with pytest.raises(ConfigError) as caught:
        parse_loss(wrong)
    told = [line.removeprefix("unknown key ") for line in str(caught.value).splitlines()]
    wanted = ["loss.beta=0.0", "loss.lam='much'", "loss.gama", "loss.group_size=4", "loss.momentum=0.5"]
    assert len(told) == len(wanted)
    assert all(line.startswith(beginning) for line, beginning in zip(told, wanted, strict=True)), told


def test_the_options_are_those_of_the_losses() -> None:
    assert {name: entry.config for name, entry in LOSSES.items()} == OPTIONS
    assert list(LOSSES) == list(OPTIONS)


def test_h_and_log_h_may_agree() -> None:
    assert parse_loss({"h": math.exp(1.4), "log_h": 1.4}).resolved_log_h == 1.4


def test_build_loss_takes_only_known_dataclasses() -> None:
    with pytest.raises(ConfigError, match="not the options of a known loss"):
        build_loss({"name": "lmpo"})
    with pytest.raises(ConfigError, match=r"loss\.name='simpo'|not the options of a known loss"):
        build_loss(LMPOConfig(name="simpo"))
    with pytest.raises(ConfigError, match=r"loss\.beta=-1"):
        build_loss(LMPOConfig(beta=-1))


def test_statistics_follow_the_options(make_inputs: Callable[..., LossInputs]) -> None:
    inputs = make_inputs([-6.0], [-20.0], [4.0], [10.0])
    paper = build_loss(parse_loss({}))
    assert (paper.statistics.kind, paper.statistics.update, paper.statistics.momentum) == ("ema", "after_step", 0.9)
    assert paper.statistics.bias_correction
    assert paper.statistics.eps == 0.01
    assert paper.statistics.log_as == "lmpo"
    assert build_loss(parse_loss({"compat": "released_code"})).statistics.eps == 1e-6
    assert not paper.statistics.in_evaluation
    assert paper.observe(inputs).shape == (1,)
    assert build_loss(parse_loss({"momentum": 0.5})).statistics.momentum == 0.5
    assert build_loss(parse_loss({"statistics": "cumulative"})).statistics.kind == "cumulative"
    without = build_loss(parse_loss({"z_score": False}))
    assert without.statistics is None
    assert without.observe(inputs) is None
    assert build_loss(parse_loss({"name": "simpo"})).observe(inputs) is None


def test_every_default_and_option_has_a_docstring_with_its_source() -> None:
    for entry in LOSSES.values():
        tree = ast.parse(Path(sys.modules[entry.config.__module__].__file__).read_text())
        (body,) = [n.body for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == entry.config.__name__]
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) != "name":
                assert isinstance(following, ast.Expr), (
                    f"{entry.config.__name__}.{ast.unparse(node.target)} has no docstring"
                )


def test_options_do_without_torch() -> None:
    tree = ast.parse(Path(sys.modules[LMPOConfig.__module__].__file__).read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names} == {
        "nemo_lmpo.errors",
        "nemo_lmpo.settings",
    }


def test_losses_import_only_torch() -> None:
    """Pure math: no engine, no processes, no other room of the package."""
    folder = Path(nemo_lmpo.loss.__file__).parent
    files = sorted(folder.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file.name}: relative import"
                modules = [node.module or ""]
            for module in modules:
                allowed = (
                    module == "torch"
                    or (module.startswith("torch.") and not module.startswith("torch.distributed"))
                    or module in ("nemo_lmpo.errors", "nemo_lmpo.settings")
                    or module == "nemo_lmpo.loss"
                    or module.startswith("nemo_lmpo.loss.")
                    or module.split(".")[0] in sys.stdlib_module_names
                )
                assert allowed, f"{file.name} imports {module}"
