"""Ends a run that a guard stopped (guard.action: stop): exports the best checkpoint before it, and says how to go on.

The weights that the guard rejects are saved as a checkpoint, but they are never the best. `guard/stopped` in the last
line of metrics.jsonl says that a guard stopped the run; a run that goes on drops that line.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlcm_fast import parallel
from rlcm_fast.run_folder.agreement import from_main
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.checkpoint import checkpoint_name, complete
from rlcm_fast.run_folder.export import Exporter


def end_at_guard(export: Exporter, run_dir: Path, iteration: int, say: Callable[[str], None]) -> bool:
    """Exports the best checkpoint of fewer iterations and says how to go on; every rank must call.

    iteration: how many are finished; their weights are saved. Returns whether there was one to export.
    """
    best, earlier = from_main(_before(run_dir, iteration, export.config.checkpoint.best))
    if best is None:
        kept = "checkpoint.best had kept none before, so nothing is exported and the start model is the best there is"
    else:
        kept = export.write(run_dir, iteration, best)
    back = f"with --resume {earlier}" if earlier else "from the start, in another --run_dir,"
    say(
        f"guard: the run stops, guard.action=stop, after {iteration} iterations: {kept}; with the same settings it "
        f"would stop here again: go on with --resume latest --guard.action warn, or go back, {back} and with a lower "
        "--optimizer.lr"
    )
    return best is not None


def _before(run_dir: Path, iteration: int, metric: str) -> tuple[Best | None, Path | None]:
    """Returns the best checkpoint by a metric, and where to go back to: that one, or the last of fewer iterations."""
    if not parallel.is_main():
        return None, None
    best = Best.find(run_dir)
    if best is not None and best.metric == metric and best.iteration < iteration:
        return best, best.folder(run_dir)
    earlier = [folder for folder in complete(run_dir) if folder.name < checkpoint_name(iteration)]
    return None, earlier[-1] if earlier else None
