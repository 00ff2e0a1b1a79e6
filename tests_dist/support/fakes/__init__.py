"""Stand-ins for fused kernels that run on the CPU and enforce the contract of the real ones.

Each computes in fp32, rounds to the kernel's dtype, fills what the kernel leaves unwritten with NaN,
and raises `ContractError` where the real one would crash, race or compute something else. `broken`
names one rule that a fake breaks on purpose, to see the conformance suite fail.
"""
