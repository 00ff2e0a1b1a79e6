"""The demo job: a small transformer trained with its sequence spread over ranks."""

# Sizes of the demo, said here so that asking for help loads no torch.
NUM_TOKENS = 16384
NUM_STEPS = 30
