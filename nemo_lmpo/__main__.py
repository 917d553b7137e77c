"""`python -m nemo_lmpo COMMAND ...`: the same as `nemo-lmpo COMMAND ...`."""

from __future__ import annotations

import sys

from nemo_lmpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
