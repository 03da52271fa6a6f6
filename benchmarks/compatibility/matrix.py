"""Which settings of the engine go together: every combination is refused with its reason, or trained and judged.

    python benchmarks/compatibility/matrix.py                                       # all of it; on a CPU
    python benchmarks/compatibility/matrix.py --only dtype=bf16 zero_stage=3 --out runs/matrix.csv   # a part

engine.dtype x engine.zero_stage x optimizer.name x engine.offload_optimizer x engine.optimizer_in_backward x processes
x all weights or adapters. `config.checks.validate` is asked first, since it is what a user meets; what it accepts is
trained by trial.py, which says how it is judged. Many cells share a process, or a pair, as starting one takes
longer than a cell. A cell that breaks, or is not done within --limit seconds, takes its processes with it, and the next
one gets new ones. Offloading compiles DeepSpeedCPUAdam at its first use, which needs g++ and ninja.

Writes OUT (a row a cell: works, refused or FAILS, and why) and prints the table of docs/memory.md; the exit code is 1
where a cell FAILS.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compatibility.cells import AXES, Cell, all_cells, config_of, refusal
from benchmarks.shared.reporting import ROOT, print_summary, write_csv
from rlcm_fast.config import Config

if TYPE_CHECKING:
    from benchmarks.compatibility.trial import Verdict


RESULTS = ROOT / "benchmarks" / "results" / "support_matrix.csv"


def main() -> int:
    arguments = _parser().parse_args()
    try:
        chosen = [cell for cell in all_cells() if matches(cell, arguments.only)]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = run(chosen, arguments.limit)
    write_csv(arguments.out, rows)
    print(markdown(read_rows(arguments.out)))
    outcomes = Counter(row["outcome"] for row in rows)
    failed = [row for row in rows if row["outcome"] == "FAILS"]
    print_summary({"cells": len(rows), **outcomes, "failed": failed})
    return 1 if failed else 0


def run(cells: Sequence[Cell], limit: float) -> list[dict[str, Any]]:
    """A row for each cell, in order; those of one process and those of two are trained side by side."""
    from benchmarks.shared import tiny_pipelines

    # Cells of as many processes, one after another.
    def run_on(num_processes: int) -> dict[Cell, dict[str, Any]]:
        chosen = [cell for cell in cells if cell.processes == num_processes]
        part = folder / str(num_processes)
        part.mkdir()
        crew = Crew(num_processes, part)
        try:
            return {cell: _row(cell, crew, model, part / "run", limit) for cell in chosen}
        finally:
            crew.dismiss()

    # Both kinds side by side.
    rows: dict[Cell, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor() as pool:
        folder = Path(name)
        model = tiny_pipelines.save_lcm(folder / "model")
        for of_part in pool.map(run_on, AXES["processes"]):
            rows |= of_part
    return [rows[cell] for cell in cells]


def _row(cell: Cell, crew: Crew, model: str, run_dir: Path, limit: float) -> dict[str, Any]:
    reason = refusal(cell)
    if reason:
        return {**asdict(cell), "outcome": "refused", "reason": reason}
    row = {**asdict(cell), **crew.train(config_of(cell, model, str(run_dir)), limit)}
    shutil.rmtree(run_dir, ignore_errors=True)  # a cell that failed may have left none
    print(*row.values(), file=sys.stderr, flush=True)
    return row


class Crew:
    """The processes of a run, started anew where one of them is gone."""

    def __init__(self, num_processes: int, folder: Path) -> None:
        self._num_processes, self._folder = num_processes, folder
        self._members: dict[Connection, Any] = {}

    def train(self, config: Config, limit: float) -> dict[str, Any]:
        """The columns that say how it went."""
        if not self._members:
            self._start()
        for connection in self._members:
            connection.send(config)
        verdicts, broken = self._answers(limit)
        if broken:
            self.stop()
        wrong = [verdict.wrong for verdict in verdicts if verdict.wrong]
        if broken or wrong:
            return {"outcome": "FAILS", "reason": broken or wrong[0]}
        off = max(verdict.off_reference for verdict in verdicts)
        return {"outcome": "works", "off_reference": f"{off:.0e}"}

    def _answers(self, limit: float) -> tuple[list[Verdict], str]:
        """What the processes found, and what keeps one of them from answering."""
        until, waiting, verdicts = time.monotonic() + limit, set(self._members), []
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                return verdicts, f"not done after {limit:g} seconds"
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    verdicts.append(connection.recv())
                except EOFError:
                    return verdicts, self._last_words(connection)
                waiting.discard(connection)
        return verdicts, ""

    def _start(self) -> None:
        from benchmarks.compatibility import trial
        from benchmarks.shared import run_processes

        group = (self._num_processes, run_processes.free_port())
        for rank in range(self._num_processes):
            ours, theirs = Pipe()
            log = self._folder / f"{rank}.log"
            log.unlink(missing_ok=True)
            self._members[ours] = run_processes.start(trial.serve, theirs, log=log, rank=rank, group=group)
            theirs.close()

    def _last_words(self, connection: Connection) -> str:
        """The error that ended the process."""
        rank = list(self._members).index(connection)
        lines = (self._folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
        return f"rank {rank}: {lines[-1] if lines else 'gone without a word'}"

    def dismiss(self) -> None:
        """When there is nothing more to do; who does not go is stopped."""
        for connection, process in self._members.items():
            connection.send(None)
            process.join(timeout=30)
        self.stop()

    def stop(self) -> None:
        for connection, process in self._members.items():
            process.kill()
            process.join()
            connection.close()
        self._members.clear()


def read_rows(path: Path = RESULTS) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """The two tables of docs/memory.md: what works, and why the rest is refused."""
    # A text for each stage; optimizers with the same texts share a line.
    optimizers: dict[tuple[str, ...], list[str]] = {}  # by what is trained, and the texts
    for trained, name in itertools.product(AXES["trained"], AXES["optimizer"]):
        texts = []
        for stage in AXES["zero_stage"]:
            wanted = (trained, name, str(stage))
            texts.append(_working([row for row in rows if _place(row) == wanted]))
        optimizers.setdefault((trained, *texts), []).append(f"`{name}`")
    heads = "".join(f" ZeRO {stage} |" for stage in AXES["zero_stage"])
    lines = [f"| trained | `optimizer.name` |{heads}", "|---" * 6 + "|"]
    for (trained, *texts), names in optimizers.items():
        lines.append(" | ".join([f"| {trained}", ", ".join(names), *texts]) + " |")

    # How often each reason is given.
    lines += ["", "| refused | combinations |", "|---|---|"]
    reasons = Counter(_reason(row["reason"]) for row in rows if row["outcome"] == "refused")
    for reason, count in reasons.most_common():
        lines.append(f"| {reason} | {count} |")
    return "\n".join(lines)


def _place(row: Mapping[str, str]) -> tuple[str, str, str]:
    """Where a row belongs in the table: line, and column."""
    return row["trained"], row["optimizer"], row["zero_stage"]


def _working(rows: Sequence[Mapping[str, str]]) -> str:
    """The dtypes that work, e.g. "fp32 o, bf16 o": o offloaded, b in the backward pass, ob both at once."""
    texts = []
    for dtype in AXES["dtype"]:
        outcomes: dict[str, set[str]] = {}  # by mark, over the numbers of processes
        for row in rows:
            if row["dtype"] == dtype:
                mark = "o" * (row["offload"] == "True") + "b" * (row["in_backward"] == "True")
                outcomes.setdefault(mark, set()).add(row["outcome"])
        accepted = {mark: found for mark, found in outcomes.items() if found != {"refused"}}
        if any(found != {"works"} for found in accepted.values()):
            texts.append(f"{dtype} FAILS")
        elif accepted:
            assert "" in accepted, "an addition works where nothing is added"
            texts.append(" ".join([dtype, *filter(None, sorted(accepted))]))
    return ", ".join(texts) or "-"


def _reason(text: str) -> str:
    """Without the way out, and one for all optimizers and stages that it is said of."""
    return re.sub(r"(optimizer\.name|(?:leaves|for) engine\.zero_stage)=\w+", r"\1=...", text.partition(";")[0])


def matches(cell: Cell, conditions: Sequence[str]) -> bool:
    """Each condition is field=value; values of one field are alternatives."""
    wanted: dict[str, set[str]] = {}
    for condition in conditions:
        field, _, value = condition.partition("=")
        if value not in map(str, AXES.get(field, ())):
            raise ValueError(f"only={condition} names no cell; the axes are {AXES}")
        wanted.setdefault(field, set()).add(value)
    return all(str(getattr(cell, field)) in values for field, values in wanted.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="AXIS=VALUE", help="cells with these values alone")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for a cell")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
