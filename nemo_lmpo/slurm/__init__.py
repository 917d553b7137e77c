"""Submit runs to Slurm and look at them: ``python -m nemo_lmpo.slurm submit RECIPE --nodes N``, ``... status``."""
