"""Write what runs have come to as one HTML file: a verdict, curves, pictures, settings; it opens from the disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlcm_fast.cli.output import check_out, write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run_dir of a run; several are compared")
    out = "the HTML file; default: report.html in the run's folder, or here if there are several runs"
    parser.add_argument("--out", metavar="FILE", help=out)


def run(arguments: argparse.Namespace) -> None:
    from rlcm_fast.report import read_runs, verdict, write_report

    folders = [Path(folder) for folder in arguments.runs]
    runs = read_runs(folders)
    default = folders[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = check_out(arguments.out or str(default), (".html", ".htm"))
    write(out, lambda path: write_report(runs, path))
    for found in runs:
        name = f"{found.name}: " if len(runs) > 1 else ""
        print(f"{name}{verdict(found).text}")
    print(f"{out}, {out.stat().st_size / 1e6:.1f} MB, is the report; open it in a browser")
