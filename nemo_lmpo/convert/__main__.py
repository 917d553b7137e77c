"""`python -m nemo_lmpo.convert`: the same as `nemo-lmpo convert`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import ModuleMain

main = ModuleMain("convert")

if __name__ == "__main__":
    sys.exit(main())
