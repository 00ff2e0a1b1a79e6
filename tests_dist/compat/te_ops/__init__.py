"""TransformerEngine's operations: one process, against references written from the contract."""
