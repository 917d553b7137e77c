"""`python -m nemo_lmpo.evaluate`: the same as `nemo-lmpo evaluate`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("evaluate")

if __name__ == "__main__":
    sys.exit(main())
