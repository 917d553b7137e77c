"""`python -m nemo_lmpo.slurm`: the same as `nemo-lmpo slurm`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("slurm")

if __name__ == "__main__":
    sys.exit(main())
