"""Tests of cpattn.automodel: one process, except where a name says ranks."""
