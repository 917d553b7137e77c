"""`python -m nemo_lmpo.report`: the same as `nemo-lmpo report`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("report")

if __name__ == "__main__":
    sys.exit(main())
