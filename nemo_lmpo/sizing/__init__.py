"""Memory, FLOPs, speed and layouts by arithmetic on sizes and a card's figures; imports no torch."""
