"""Preference pairs: reading, templating, tokenizing, ordering and packing into sequences."""
