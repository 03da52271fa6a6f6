"""The console script `rlcm-fast`. Light at import: --help and wrong arguments answer without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlcm_fast import quiet
from rlcm_fast.cli import evaluate, plan, sample


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand. Returns the exit code: 0 done, 2 a user's mistake (one line on stderr), 130 interrupted."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.takes_overrides:
        arguments.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet.hush_libraries(debug=quiet.is_debug())
    try:
        arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlcm-fast", description="Look at a model, measure it, plan its training, which is rlcm_fast/train.py."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module, name in ((sample, "sample"), (evaluate, "evaluate"), (plan, "plan")):
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run, takes_overrides=module is plan)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required or action.default is None else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """One line for a wrong argument instead of the whole usage."""

    def __init__(self, **settings) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help lists the arguments\n")


if __name__ == "__main__":
    sys.exit(main())
