"""Which layout, how fast: arithmetic on sizes and a card's figures; imports neither torch nor numpy."""
