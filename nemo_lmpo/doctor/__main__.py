"""`python -m nemo_lmpo.doctor`: the same as `nemo-lmpo doctor`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("doctor")

if __name__ == "__main__":
    sys.exit(main())
