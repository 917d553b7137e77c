"""`python -m nemo_lmpo.pairs`: the same as `nemo-lmpo pairs`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("pairs")

if __name__ == "__main__":
    sys.exit(main())
