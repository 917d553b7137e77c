"""What the launchers start exists: commands, recipes, files; on the image that the Dockerfile names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_lmpo.config.recipe import recipe_names

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "launchers").iterdir() if path.suffix in (".yaml", ".yml"))
IMAGE = re.search(r"ARG BASE=(\S+)", (ROOT / "containers" / "Dockerfile").read_text())


def texts(value: Any) -> list[str]:
    """All texts of a document."""
    if isinstance(value, dict):
        return [text for one in value.values() for text in texts(one)]
    if isinstance(value, list):
        return [text for one in value for text in texts(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_started_exists(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    said = " ".join(texts(document)).replace("\\\n", " ")
    started = re.findall(r"-m nemo_lmpo\.train ([^\n]*)", said)
    assert len(started) == 1, said
    words = shlex.split(started[0].partition(" REGISTRY")[0])
    assert words[0] == "--config-name"
    recipe = document.get("envs", {}).get("RECIPE", words[1]) if words[1].startswith("$") else words[1]
    if recipe.startswith("$"):
        recipe = dict(one.split("=", 1) for one in document["env"] if "=" in one)["RECIPE"]
    assert recipe in recipe_names()
    for file in re.findall(r"python (\S+\.py)", said):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_images_agree(path: Path) -> None:
    assert IMAGE is not None
    named = re.findall(r"nvcr\.io/\S+", path.read_text())
    assert set(named) <= {IMAGE[1]}


def test_processes_agree_with_gpus() -> None:
    jobset = yaml.safe_load((ROOT / "launchers" / "jobset.yaml").read_text())
    [node] = jobset["spec"]["replicatedJobs"]
    [container] = node["template"]["spec"]["template"]["spec"]["containers"]
    [command] = container["args"]
    gpus, nodes = container["resources"]["limits"]["nvidia.com/gpu"], node["template"]["spec"]["completions"]
    assert f"--nproc-per-node {gpus} " in command
    assert f"--nnodes {nodes} " in command
    assert node["template"]["spec"]["parallelism"] == nodes
    # Its first pod's name inside the set's own domain.
    assert f"--master-addr {jobset['metadata']['name']}-{node['name']}-0-0.{jobset['metadata']['name']} " in command
