"""`python -m nemo_lmpo.generate`: the same as `nemo-lmpo generate`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("generate")

if __name__ == "__main__":
    sys.exit(main())
