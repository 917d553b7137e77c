"""Every rule that needs neither data nor a GPU; nothing outside of this folder refuses such a setting.

Training, the dry run, `slurm submit` and `compare` all apply the same ones. A rule names the field, its value, why it
cannot be, and what to do instead. What a single number or text may be stands at its field (see
:mod:`nemo_lmpo.config.schema`) and is applied by :mod:`nemo_lmpo.config.rules.bounds`.
"""

from nemo_lmpo.config.rules.check import LAYOUT_RULES, SETTING_RULES, check_settings, validate
from nemo_lmpo.config.rules.layout import ParallelLayout

__all__ = ["LAYOUT_RULES", "SETTING_RULES", "ParallelLayout", "check_settings", "validate"]
