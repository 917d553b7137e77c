"""`python -m nemo_lmpo.compare`: the same as `nemo-lmpo compare`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("compare")

if __name__ == "__main__":
    sys.exit(main())
