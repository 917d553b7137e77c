"""A row as people have it, in one of the forms of :mod:`nemo_lmpo.data.schema`."""
