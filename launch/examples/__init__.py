"""Short programs that each show one use."""
