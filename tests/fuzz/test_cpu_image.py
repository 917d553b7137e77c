"""The image for CPUs, step by step in a Debian root. Needs root, debootstrap and a mirror (minutes, 3 GB)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = (ROOT / "containers" / "Dockerfile.cpu").read_text()
BOUND = [Path(one) for one in os.environ.get("NEMO_LMPO_IMAGE_BINDS", "").split(":") if one]
"""Folders of this machine that pip needs inside, such as a local index; `NEMO_LMPO_IMAGE_INDEX` names one for torch."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("debootstrap") is None, reason="needs root and debootstrap"
)


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", RECIPE, flags=re.MULTILINE))
    for line in text.splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            yield name, rest


class DebianRoot:
    """A folder as a root file system, and the environment of its image."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root"}
        self.environment |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        self.working = "/"

    def mount(self) -> None:
        for place in (Path("/proc"), Path("/dev"), *BOUND):
            (self.folder / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
            subprocess.run(["mount", "--rbind", place, self.folder / place.relative_to("/")], check=True)
        for file in ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/root/.config/pip/pip.conf"):
            if Path(file).is_file():
                (self.folder / file[1:]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, self.folder / file[1:])
        if "PIP_CERT" in self.environment:  # not where the package of certificates would write over it
            shutil.copyfile(self.environment["PIP_CERT"], self.folder / "certificates.crt")
            self.environment["PIP_CERT"] = "/certificates.crt"

    def unmount(self) -> None:
        for place in reversed((Path("/proc"), Path("/dev"), *BOUND)):
            subprocess.run(["umount", "--recursive", "--lazy", self.folder / place.relative_to("/")], check=False)

    def run(self, command: str) -> str:
        done = subprocess.run(
            [
                "chroot",
                self.folder,
                "/bin/bash",
                "-o",
                "pipefail",
                "-c",
                f"mkdir -p {self.working} && cd {self.working} && {command}",
            ],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture
def debian(tmp_path: Path) -> Iterator[DebianRoot]:
    root = DebianRoot(tmp_path / "root")
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root.folder], check=True, stdout=subprocess.DEVNULL)
    root.mount()
    try:
        yield root
    finally:
        root.unmount()


@pytest.mark.timeout(1800)
def test_the_image_can_be_built_and_trains(debian: DebianRoot) -> None:
    arguments: dict[str, str] = {}
    steps = dict.fromkeys(("FROM", "COPY", "RUN", "ENV", "WORKDIR"), 0)
    for name, rest in instructions():
        steps[name] = steps.get(name, 0) + 1
        if name == "FROM":
            assert rest == "debian:12-slim"  # bookworm
        elif name == "COPY":
            source, target = rest.split()
            archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
            place = debian.folder / target[1:]
            place.mkdir(parents=True)
            subprocess.run(
                ["cp", "--parents", "-t", place, *archive.decode().split("\0")[:-1]], cwd=ROOT / source, check=True
            )
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = os.environ.get("NEMO_LMPO_IMAGE_INDEX", value)
        elif name == "ENV":
            key, _, value = rest.partition("=")
            debian.environment[key] = value.replace("$PATH", debian.environment["PATH"])
        elif name == "WORKDIR":
            debian.working = rest
        elif name == "RUN":
            debian.run("".join(f"{key}={value!r}; " for key, value in arguments.items()) + rest)
        else:
            assert name == "SHELL", f"this test does not know {name}"
    assert all(steps.values()), steps
    said = debian.run("OMP_NUM_THREADS=1 nemo-lmpo train lmpo_tiny trainer.max_steps=2 2>&1")
    assert "step 2/2" in said
