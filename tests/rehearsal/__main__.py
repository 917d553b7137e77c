"""`python -m tests.rehearsal MODULE_OR_FILE ARGUMENT...`: run a program as `python -m` does, on that GPU."""

from __future__ import annotations

import runpy
import sys

from tests.rehearsal.install import install


def main() -> None:
    """Run the program; its exit status is this one's."""
    program, *arguments = sys.argv[1:]
    install()
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
