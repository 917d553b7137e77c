#!/usr/bin/env python
"""Convert a NeMo model or a training checkpoint to Hugging Face; see `--help` and docs/conversion.md."""

import sys

from nemo_lmpo.convert.command import nemo_to_hf

if __name__ == "__main__":
    sys.exit(nemo_to_hf())
