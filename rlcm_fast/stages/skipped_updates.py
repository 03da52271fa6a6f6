"""What happens to a run whose updates are skipped, because their gradient is not finite: a line each, then the end.

    taken   -> the count of skipped updates in a row starts anew
    skipped -> one line; Diverged once there are update.max_skipped_updates in a row, over iterations and resumes

An optimizer in the backward pass cannot skip an update whole: other weights have moved, so the first one ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlcm_fast import parallel
from rlcm_fast.faults import Diverged
from rlcm_fast.parallel import Turn

_REMEDY = "lower optimizer.lr, or find the image, reward or setting that does it"


class SkippedUpdates:
    """Counts skipped updates in a row, the same number on every process."""

    def __init__(self, most: int, can_skip: bool, say: Callable[[str], None]) -> None:
        """most: how many in a row end the run; can_skip: False if a single one does. `say` prints on one process."""
        self.in_a_row = 0
        self._most, self._can_skip, self._say = most, can_skip, say
        self._turn, self._num_updates = Turn(0), 0

    def begin(self, turn: Turn) -> None:
        """Says where the run is: before the updates on a rollout."""
        self._turn, self._num_updates = turn, 0

    def taken(self) -> None:
        """Notes that an update moved the weights."""
        self.in_a_row, self._num_updates = 0, self._num_updates + 1

    def skipped(self, causes: Sequence[str]) -> None:
        """Notes that an update had a gradient that is not finite; every process must call this.

        causes: what was not finite on this process besides the gradient, as keys of metrics.

        Raises:
            Diverged: the run must stop; every process raises it.
        """
        # Name the place and the causes on all processes.
        self.in_a_row, self._num_updates = self.in_a_row + 1, self._num_updates + 1
        everywhere = parallel.all_gather_list(list(causes))
        round_ = f", round {self._turn.round}" if self._turn.num_rounds > 1 else ""
        place = f"iteration {self._turn.iteration}{round_}, update {self._num_updates}"
        of = ", ".join(dict.fromkeys(everywhere)) or "the losses are finite"
        found = f"{place}: the gradient is not finite ({of})"

        # Stop, or go on and say so.
        if not self._can_skip:
            raise Diverged(
                f"{found}, and engine.optimizer_in_backward has moved other weights by then: go on from the last "
                f"checkpoint; {_REMEDY}; engine.optimizer_in_backward=false would skip such an update whole"
            ).of_all()
        if self.in_a_row >= self._most:
            raise Diverged(
                f"{found}, for {self.in_a_row} updates in a row (update.max_skipped_updates={self._most}): {_REMEDY}"
            ).of_all()
        self._say(f"warning: {found}; it moved nothing. {self.in_a_row} in a row, the run stops at {self._most}")
