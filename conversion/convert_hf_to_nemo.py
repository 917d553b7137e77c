#!/usr/bin/env python
"""Convert a Hugging Face model to NeMo; see `--help` and docs/conversion.md."""

import sys

from nemo_lmpo.convert.command import hf_to_nemo

if __name__ == "__main__":
    sys.exit(hf_to_nemo())
