"""Real images and their captions, for the loss on real images.

Call `check_source` and `check_rows` before weights load, and make the `PairStream` after.
"""

from __future__ import annotations

from rlcm_fast.pairs.checks import check_rows, check_source
from rlcm_fast.pairs.faults import PairsFault
from rlcm_fast.pairs.sources import BUILT_IN, Source, parse_source
from rlcm_fast.pairs.stream import PairStream

__all__ = ["BUILT_IN", "PairStream", "PairsFault", "Source", "check_rows", "check_source", "parse_source"]
