"""`python -m nemo_lmpo.fetch`: the same as `nemo-lmpo fetch`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("fetch")

if __name__ == "__main__":
    sys.exit(main())
