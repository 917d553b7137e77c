"""`python -m nemo_lmpo.export`: the same as `nemo-lmpo export`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("export")

if __name__ == "__main__":
    sys.exit(main())
