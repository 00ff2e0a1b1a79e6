"""Bridges to model libraries: the attention call of each, served by cpattn."""
