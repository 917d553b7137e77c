"""Tasks that are generated here and need no files."""
