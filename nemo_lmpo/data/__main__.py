"""`python -m nemo_lmpo.data`: the same as `nemo-lmpo data`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("data")

if __name__ == "__main__":
    sys.exit(main())
