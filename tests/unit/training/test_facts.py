"""What a run says of itself at its start."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.model.kernels import Kernels
from nemo_lmpo.monitor.banner import render_banner
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training import policy
from nemo_lmpo.training.facts import banner_facts
from nemo_lmpo.training.session import open_session
from tests.system.processes import SMALL


def test_the_banner_says_why_kernels_were_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "attention without flash: this build of torch has no flash kernels"
    monkeypatch.setattr(policy, "choose_kernels", lambda *_, **__: Kernels(False, "sdpa", reasons=(reason,)))
    run_dir = tmp_path / "run"
    with open_session(load_recipe("simpo_tiny", [*SMALL, f"run_dir={run_dir}"]), LaunchInfo()) as session:
        facts = banner_facts(session.policy, run_dir, total_steps=3, start_step=0, examples="pairs")
    assert f"  why            {reason}\n" in render_banner(facts, width=100)
