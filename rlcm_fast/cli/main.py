"""The console script `rlcm-fast`. Importing it is cheap: --help and messages about arguments need no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlcm_fast import quiet
from rlcm_fast.cli import (
    check_reward,
    configs,
    doctor,
    evaluate,
    export,
    plan,
    rate,
    report,
    reward_server,
    sample,
    score,
)
from rlcm_fast.cli.arguments import check_overrides
from rlcm_fast.door import Door, take_debug
from rlcm_fast.faults import in_one_line
from rlcm_fast.leaving import leave_at_once_if_computing

COMMANDS = {
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "score": score,
    "check-reward": check_reward,
    "report": report,
    "reward-server": reward_server,
    "configs": configs,
    "rate": rate,
    "plan": plan,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns the exit code.

    0: done; 1: a check failed, or a reward or the machine did (one line on stderr); 2: a mistake (one line on stderr);
    130: interrupted. With --debug, the line stands below the traceback.
    """
    debug, rest = take_debug(sys.argv[1:] if argv is None else argv)
    code = Door(debug=debug).lead(lambda: _run(rest, debug))
    if code == 130:
        leave_at_once_if_computing(code)
    return code


def _run(argv: Sequence[str], debug: bool) -> int:
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.takes_overrides:
        check_overrides(rest, arguments.own_options)
        arguments.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    quiet.hush_libraries(debug=debug or quiet.is_debug())
    return arguments.run(arguments) or 0


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="rlcm-fast",
        description="Draw images, score a model or pictures, check a reward, a config, a machine. Train with train.py.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter)
        module.add_arguments(command)
        shows = "show what libraries print, and the traceback of an error above its line"
        command.add_argument("--debug", action="store_true", help=shows)  # `take_debug` takes it from anywhere
        options = [name for action in command._actions for name in action.option_strings if name.startswith("--")]
        command.set_defaults(run=module.run, takes_overrides=module in (plan, doctor, rate), own_options=options)
    return parser


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each argument that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_none = action.required or action.default is None or action.default is False
        return action.help if has_none else super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Prints one line for a wrong argument instead of the whole usage."""

    def __init__(self, **settings) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {in_one_line(message)}; {self.prog} --help lists the arguments\n")


if __name__ == "__main__":
    sys.exit(main())
