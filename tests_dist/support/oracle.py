"""Names of `cpattn.testing.dense`, from where tests have long imported them."""

from cpattn.testing.dense import (
    Inputs,
    Results,
    assert_as_exact_as_sdpa,
    assert_exact,
    dense_attention,
    make_inputs,
    oracle,
    torch_sdpa,
)

__all__ = [
    "Inputs",
    "Results",
    "assert_as_exact_as_sdpa",
    "assert_exact",
    "dense_attention",
    "make_inputs",
    "oracle",
    "torch_sdpa",
]
