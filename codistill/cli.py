"""The command `codistill`: small things a user of the plug-ins needs beside a training.

Every subcommand is one function from parsed arguments to an exit status. Failures print one line to standard error and
exit with 1 (bad arguments, as argparse has it, with 2). No host framework is imported.
"""

import argparse
import dataclasses
import importlib.util
import os
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
        The exit status: 0 for success, else 1, or 2 for arguments that cannot work.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read us, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor can Python flush at its end
        return 1
    return status


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
        "defaults. (fairseq-train --help shows no plug-in's options.) fairseq also has --codistill-label-smoothing, "
        "and takes data-fraction, data-seed and data-shard with --task codistill_translation only.",
    )
    options.set_defaults(run=_options)

    status = commands.add_parser(
        "status",
        help="say what the peers of a run are doing",
        description="Says of every peer of a run whether it is alive, late, finished, missing or refused, and why, and "
        "what its newest snapshot is; from the store alone. It waits for a heartbeat of each, some 5 seconds.",
        epilog="Exit status: 0 when every peer is alive or finished, 1 when not or when nothing can be said, 2 for bad "
        "arguments. With a key in CODISTILL_KEY or CODISTILL_KEY_FILE signatures are checked. JSON: place, run, ok, "
        "error (null, or why nothing can be said), terms (what all peers agreed on), verified (whether signatures were "
        "checked), peers: a list of peer, state, why, cause (of a refusal), incarnation, heartbeat, update, epoch, "
        "final, behind (updates behind the most advanced peer), staleness, bytes, dtype, architecture, metrics; "
        "unknown values are null.",
    )
    status.add_argument("url", metavar="URL", help="what the peers were given as --codistill-dir")
    status.add_argument("--run-id", default="default", help="which run there (default: %(default)s)")
    status.add_argument("--watch", action="store_true", help="refresh until interrupted")
    status.add_argument("--json", action="store_true", help="print one line of JSON, with --watch one a refresh")
    status.add_argument(
        "--patience",
        type=float,
        default=15.0,
        metavar="SECONDS",
        help="a peer without a new heartbeat for so long is late (default: %(default)g, three heartbeats)",
    )
    status.add_argument(
        "--interval",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="with --watch, between two refreshes (default: %(default)g)",
    )
    status.set_defaults(run=_status)

    plot = commands.add_parser(
        "plot",
        help="draw runs: losses, metrics, distance, staleness, ...",
        description="Draws what training runs have logged, a panel for each key and a line for each name: the mean "
        "of the runs of that name, with a 95 % interval (Student's t) where there are several. codistill plot "
        "'plain=runs/plain-*' 'codistill=runs/co-*/peer-0' --show valid_loss,distance --out curves.png",
        epilog="Keys: alpha, loss (the penalty), agreement, peers, staleness, gap, distance, sent, received, seconds, "
        "skipped, incidents, wall, from metrics.jsonl; train_... and valid_... (or the name of another validation set) "
        "with the host's own names behind, from a fairseq log (--log-format json, simple or tqdm) or timm's "
        "summary.csv. A wrong key gets the list of those that a run has. Exit status: 0 when the files were written, 1 "
        "when there is nothing to draw of a key or a file cannot be written, 2 for bad arguments. CSV columns: line, "
        "key, x, mean, low, high, n.",
    )
    plot.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a save dir, or the file of a fairseq log, or a quoted pattern of them; runs of one name are one line, a "
        "run without a name is a line of its own",
    )
    plot.add_argument(
        "--show", metavar="KEYS", default="valid_loss,train_loss", help="keys, a panel each (default: %(default)s)"
    )
    plot.add_argument(
        "--against",
        choices=("updates", "epochs", "time"),
        default="updates",
        help="what x is; time: seconds that the run's processes ran (default: %(default)s)",
    )
    plot.add_argument("--out", type=Path, metavar="FILE", help="the picture to write: .png, .pdf or .svg")
    plot.add_argument("--csv", type=Path, metavar="FILE", help="write the numbers drawn, too, or alone")
    plot.add_argument("--title", default="", help="above the picture")
    plot.add_argument("--log-y", action="store_true", help="y in logarithmic steps")
    plot.set_defaults(run=_plot)
    return parser


def _user_dir(arguments: argparse.Namespace) -> int:
    package = USER_DIRS[arguments.framework]
    spec = importlib.util.find_spec(package)  # finds a top-level package without running any of its code
    if spec is None or spec.origin is None:
        print(
            f"codistill: the package {package} is not installed; in codistill's own folder: "
            f"pip install '.[{arguments.framework}]'",
            file=sys.stderr,
        )
        return 1
    print(Path(spec.origin).resolve().parent)
    return 0


def _options(_: argparse.Namespace) -> int:
    from codistill.config import CodistillConfig, DataConfig, flag

    for item in (*dataclasses.fields(CodistillConfig), *dataclasses.fields(DataConfig)):
        choices = item.metadata["choices"]
        values = f" {{{','.join(choices)}}}" if choices else ""
        print(f"{flag(item.name)}{values} (default: {item.default})")
        print(textwrap.fill(item.metadata["help"], 100, initial_indent="    ", subsequent_indent="    "))
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from codistill import status  # loads what reads stores, and rich; the other commands do without
    from codistill.config import ConfigError

    try:
        return status.run(
            arguments.url,
            run_id=arguments.run_id,
            watch=arguments.watch,
            as_json=arguments.json,
            patience=arguments.patience,
            interval=arguments.interval,
        )
    except ConfigError as error:
        print(f"codistill: {error}", file=sys.stderr)
        return 2


def _plot(arguments: argparse.Namespace) -> int:
    from codistill import plots
    from codistill.config import ConfigError

    try:
        return plots.run(
            arguments.runs,
            show=arguments.show,
            against=arguments.against,
            out=arguments.out,
            table=arguments.csv,
            title=arguments.title,
            log_y=arguments.log_y,
        )
    except ConfigError as error:
        print(f"codistill: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
