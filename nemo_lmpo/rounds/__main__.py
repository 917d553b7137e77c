"""`python -m nemo_lmpo.rounds`: the same as `nemo-lmpo rounds`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("rounds")

if __name__ == "__main__":
    sys.exit(main())
