"""The cluster's settings and the templates, as the login node sees them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from nemo_lmpo.errors import ConfigError

_PREFIXES = ("SBATCH_", "NEMO_LMPO_")
_OWN_FILES = ("cluster.env",)
"""Which a checkout may hold beside the templates: the user's settings, not for others."""


def templates_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Where the templates are: NEMO_LMPO_SLURM_DIR, inside an installed wheel, or beside the package in a checkout.

    Raises:
        ConfigError: they are in none of these.
    """
    environ = os.environ if environ is None else environ
    package = Path(__file__).resolve().parent
    places = [package / "templates", package.parent.parent / "slurm"]
    if "NEMO_LMPO_SLURM_DIR" in environ:
        places = [Path(environ["NEMO_LMPO_SLURM_DIR"])]
    for place in places:
        if (place / "common.sh").is_file():
            return place
    raise ConfigError(
        f"the templates are not in {places[-1]}; set NEMO_LMPO_SLURM_DIR to the folder slurm of a checkout"
    )


def copy_templates(folder: Path, *, overwrite: bool = False) -> Path:
    """Copy the templates and `cluster.env.example` into a folder; returns its absolute path.

    Raises:
        ConfigError: the folder is a file, or has a file that differs from the template of its name.
    """
    source = templates_dir({})
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the templates")
    files = sorted(path for path in source.iterdir() if path.is_file() and path.name not in _OWN_FILES)
    changed = [path.name for path in files if _differs(path, folder / path.name)]
    if changed and not overwrite:
        raise ConfigError(f"{folder} has other files of the name {', '.join(changed)}; --overwrite replaces them")
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        if path.resolve() != (folder / path.name).resolve():
            shutil.copy(path, folder / path.name)
    return folder.absolute()


def _differs(template: Path, other: Path) -> bool:
    return other.exists() and other.read_bytes() != template.read_bytes()


def settings_file(templates: Path, environ: Mapping[str, str] | None = None) -> Path | None:
    """The user's copy of `cluster.env.example`; None if there is none.

    Raises:
        ConfigError: NEMO_LMPO_CLUSTER_ENV names a file that does not exist.
    """
    environ = os.environ if environ is None else environ
    named = environ.get("NEMO_LMPO_CLUSTER_ENV")
    path = Path(named) if named else templates / "cluster.env"
    if path.is_file():
        return path
    if named:
        raise ConfigError(f"NEMO_LMPO_CLUSTER_ENV={named} does not exist; copy slurm/cluster.env.example there")
    return None


def read_settings(path: Path) -> dict[str, str]:
    """The variables that a settings file exports for sbatch and the templates, as bash understands it.

    Raises:
        ConfigError: bash cannot read it.
    """
    done = subprocess.run(
        ["bash", "-c", '. "$1" >&2 && env -0', "settings", str(path.resolve())], capture_output=True, check=False
    )
    if done.returncode:
        # Bash's errors quote the line, which may hold a key.
        place = re.search(r": (line \d+): ", done.stderr.decode(errors="replace"))
        where = f"error in {place[1]}" if place is not None else "it ends with an error"
        raise ConfigError(f"{path} cannot be read ({where}); it is a bash file, see cluster.env.example")
    pairs = (entry.split("=", 1) for entry in done.stdout.decode(errors="replace").split("\0") if "=" in entry)
    return {name: value for name, value in pairs if name.startswith(_PREFIXES)}
