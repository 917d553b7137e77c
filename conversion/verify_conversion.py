#!/usr/bin/env python
"""Compare a Hugging Face model with its conversion; see `--help` and docs/conversion.md."""

import sys

from nemo_lmpo.convert.command import verify

if __name__ == "__main__":
    sys.exit(verify())
