"""A dry run that executes: the real program of any rank at real sizes, without a GPU and without its memory."""
