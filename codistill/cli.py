"""The command `codistill`: small things a user of the plug-ins needs beside a training.

Every subcommand is one function from parsed arguments to an exit status. Failures print one line to standard error and
exit with 1 (bad arguments, as argparse has it, with 2). No host framework is imported.
"""

import argparse
import dataclasses
import importlib.util
import sys
import textwrap
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Optional

USER_DIRS = {"fairseq": "fairseq_codistill"}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name; those of the process if None.

    Returns:
        The exit status: 0, or 1 after one line on standard error.
    """
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="codistill",
        description="Helpers around codistillation. Training itself stays with the host framework: "
        "its own command plus our flags.",
    )
    parser.add_argument("--version", action="version", version=f"codistill {metadata.version('codistill')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    user_dir = commands.add_parser(
        "user-dir",
        help="print the folder to give to a host framework's --user-dir",
        description="Prints the real path of an installed plug-in, the only spelling that fairseq accepts from every "
        'process: fairseq-train DATA --user-dir "$(codistill user-dir fairseq)" --criterion codistill ...',
    )
    user_dir.add_argument("framework", choices=sorted(USER_DIRS), help="the host framework")
    user_dir.set_defaults(run=_user_dir)

    options = commands.add_parser(
        "options",
        help="list every --codistill option with its default",
        description="Lists the options that the plug-ins add to a host framework's training command, with their "
        "defaults. (fairseq-train --help shows no plug-in's options.)",
    )
    options.set_defaults(run=_options)
    return parser


def _user_dir(arguments: argparse.Namespace) -> int:
    package = USER_DIRS[arguments.framework]
    spec = importlib.util.find_spec(package)  # finds a top-level package without running any of its code
    if spec is None or spec.origin is None:
        print(
            f"codistill: the package {package} is not installed; try: pip install 'codistill[{arguments.framework}]'",
            file=sys.stderr,
        )
        return 1
    print(Path(spec.origin).resolve().parent)
    return 0


def _options(_: argparse.Namespace) -> int:
    from codistill.config import CodistillConfig, DataConfig, flag  # loads torch, which the other commands do without

    for item in (*dataclasses.fields(CodistillConfig), *dataclasses.fields(DataConfig)):
        choices = item.metadata["choices"]
        values = f" {{{','.join(choices)}}}" if choices else ""
        print(f"{flag(item.name)}{values} (default: {item.default})")
        print(textwrap.fill(item.metadata["help"], 100, initial_indent="    ", subsequent_indent="    "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
