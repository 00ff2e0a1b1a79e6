"""Generation: a paged cache of keys and values spread over ranks, and the loop over it."""
