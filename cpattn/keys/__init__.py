"""Keys: a mask planned for a group of ranks, with this rank's share bound to it."""
