"""What tests share: the rank harness, the oracle, random masks, cases and fakes of GPU packages."""
