"""Names of `cpattn.testing.masks`, from where tests have long imported them."""

from cpattn.testing.masks import MASKS, Window, within_window

__all__ = ["MASKS", "Window", "within_window"]
