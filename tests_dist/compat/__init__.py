"""Compatibility layers: NeMo Automodel, MagiAttention and TransformerEngine, against their contracts."""
