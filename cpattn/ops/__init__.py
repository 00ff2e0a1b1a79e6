"""The operations that users call with a key: attention, layout, checkpointing."""
