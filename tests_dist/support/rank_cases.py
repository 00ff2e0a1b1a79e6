"""Names of `cpattn.testing.rank_cases`, from where tests have long imported them."""

from cpattn.testing.rank_cases import run_attention, run_with_key

__all__ = ["run_attention", "run_with_key"]
