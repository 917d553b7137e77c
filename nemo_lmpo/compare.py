"""`python -m nemo_lmpo.compare`: the comparisons of the paper."""

from __future__ import annotations

import sys

from nemo_lmpo.paper.comparison.command import main

if __name__ == "__main__":
    sys.exit(main())
