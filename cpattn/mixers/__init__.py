"""Token mixers without softmax on any placement: short causal convolutions and linear recurrences.

A placement cuts every document into fragments: runs of consecutive tokens on one rank. That is all such a layer needs:
a convolution fetches the few rows before each fragment, and a recurrence reduces each fragment to one affine map of its
state, whose size does not depend on the fragment's length.
"""

from cpattn.solver import Convolution, Recurrence

from .convolution import causal_conv1d
from .recurrence import linear_attention, mamba2
from .traffic import MixerTraffic, convolution_traffic, map_bytes, recurrence_traffic

__all__ = [
    "Convolution",
    "MixerTraffic",
    "Recurrence",
    "causal_conv1d",
    "convolution_traffic",
    "linear_attention",
    "mamba2",
    "map_bytes",
    "recurrence_traffic",
]
