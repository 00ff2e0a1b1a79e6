"""Tests of cpattn: solver/ (one process), ranks/ (several gloo ranks), gpu/ (CUDA)."""
