"""List the configs that ship with rlcm_fast, a line each: the name that --config takes, and what it is for."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds none: it lists all."""


def run(arguments: argparse.Namespace) -> None:
    from rlcm_fast.config.files import shipped_configs, summary_of

    configs = shipped_configs()
    width = max(len(name) for name in configs)
    for name, file in configs.items():
        print(f"{name:<{width}}  {summary_of(file)}")
