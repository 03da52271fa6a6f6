"""What can go wrong while a run trains and is no mistake in its config: each fault ends the run with one line.

The trainer saves the finished iterations first, if the weights are good. The exit code is 1. A mistake in the config
is a ValueError instead, and its exit code is 2.
"""

from __future__ import annotations


class Fault(RuntimeError):
    """A fault of data, a reward, the machine or the numbers; its message is one line that names the way out."""

    weights_are_good = True  # the trainer may save the weights of the finished iterations


class Diverged(Fault):
    """The weights, or what they draw, are unusable: the run stops, and its last good checkpoint stays the newest."""

    weights_are_good = False
