"""Attention modules with the module names that automodel-style training recipes load."""
