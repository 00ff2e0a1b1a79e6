"""Tests of cpattn, one folder for each part of it; support/ holds what they share."""
