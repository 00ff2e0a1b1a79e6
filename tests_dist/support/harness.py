"""Names of `cpattn.testing.harness`, from where tests have long imported them."""

from cpattn.testing.harness import RankError, fresh_group, run_on_ranks, shutdown_pools

__all__ = ["RankError", "fresh_group", "run_on_ranks", "shutdown_pools"]
