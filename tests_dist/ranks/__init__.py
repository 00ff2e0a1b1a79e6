"""Tests that run on several gloo ranks of this machine."""
