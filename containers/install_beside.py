"""Install nemo_lmpo beside packages that must stay as they are: `python install_beside.py FOLDER_OR_WHEEL`.

NVIDIA's images bring torch, Transformer Engine and Megatron in builds of their own. pip would replace them where their
versions (such as 2.11.0a0+nv26.3) do not satisfy a requirement. This program installs nemo_lmpo without dependencies,
then what is missing of them, with every package that is there as a constraint. It names those whose version was not
tried.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # pip is always there
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]
    from pip._vendor.packaging.utils import canonicalize_name  # type: ignore[assignment]

PACKAGE = "nemo-lmpo"


def pip(*arguments: str) -> None:
    """Run pip in this interpreter's environment; end with its status if it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", "install", "--no-cache-dir", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def found() -> dict[str, Distribution]:
    """What is installed, by its normalised name."""
    return {canonicalize_name(one.metadata["Name"]): one for one in distributions() if one.metadata["Name"]}


def wanted(distribution: Distribution) -> Iterator[Requirement]:
    """Its requirements on this machine, without those of extras."""
    for line in distribution.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement


def constraints(installed: Iterable[Distribution]) -> str:
    """Every installed package as it is, as a file of constraints."""
    return "".join(sorted(f"{one.metadata['Name']}==={one.version}\n" for one in installed if one.metadata["Name"]))


def main(target: str) -> None:
    """Install `target`, the folder of a checkout or a wheel."""
    kept = found()
    pip("--no-deps", target)
    requirements = list(wanted(found()[PACKAGE]))
    missing = [one for one in requirements if canonicalize_name(one.name) not in kept]
    for one in requirements:
        there = kept.get(canonicalize_name(one.name))
        if there is not None and not one.specifier.contains(there.version, prereleases=True):
            print(f"kept {one.name} {there.version}, which was not tried (tried: {one.specifier})", flush=True)
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kept.txt"
            file.write_text(constraints(kept.values()))
            pip("-c", str(file), *map(str, missing))
    changed = [
        f"{name} {one.version} -> {now.version if now else 'none'}"
        for name, one in kept.items()
        if name != PACKAGE and ((now := found().get(name)) is None or now.version != one.version)
    ]
    if changed:
        sys.exit(f"error: pip changed packages of the image: {', '.join(changed)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python install_beside.py FOLDER_OR_WHEEL")
    main(sys.argv[1])
