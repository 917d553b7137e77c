"""Preference pairs: reading, templating, tokenising, ordering and packing into rows."""
