"""The command `finetune`: runs FineTuneJobs on this machine and looks after them as kubectl does on a cluster."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output.stdout import tell
from finetune_operator.cluster.local.home import HOME_VARIABLE, default_home

DNS_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
FAULT = "rank=R,at-step=S or rank=R,at-state=STATE"
ROOM = "nodes=N,at-step=S"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, carry it out, and end with its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = _carry_out(arguments)
    except UsageError as error:
        for sentence in str(error).splitlines():
            sys.stderr.write(f"finetune: {sentence}\n")
        code = Exit.USAGE
    except BrokenPipeError:
        tell(sys.stdout, "")
        code = Exit.SUCCEEDED
    except OSError as error:
        sys.stderr.write(f"finetune: {error}\n")
        code = Exit.USAGE
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    sys.exit(int(code))


def _carry_out(arguments: argparse.Namespace) -> Exit:
    """Import only the module of the command that is asked for: `get` needs no HTTP server."""
    module = importlib.import_module(f"finetune_operator.cli.{arguments.command}")
    code: Exit = getattr(module, arguments.command)(arguments)
    return code


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="finetune", description=(__doc__ or "").partition(": ")[2])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--home",
        type=lambda text: Path(text).expanduser().absolute(),
        default=default_home(),
        help=f"state folder (default: ${HOME_VARIABLE}, else %(default)s)",
    )
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument(
        "-n", "--namespace", type=_name, default="default", help="namespace of the job (default: default)"
    )
    _add_run(commands.add_parser("run", parents=[common], help="run a job here, or go on with it"))
    _add_get(commands.add_parser("get", parents=[common, named], help="list jobs, or show one"))
    one = commands.add_parser("describe", parents=[common, named], help="show all that is known of a job")
    one.add_argument("name", type=_name, help="name of the job")
    one.set_defaults(command="describe")
    _add_logs(commands.add_parser("logs", parents=[common, named], help="show what a job's ranks wrote"))
    gone = commands.add_parser("delete", parents=[common, named], help="stop a job and remove it and its checkpoints")
    gone.add_argument("name", type=_name, help="name of the job")
    gone.set_defaults(command="delete")
    kept = commands.add_parser("checkpoints", parents=[common, named], help="list, verify or compare checkpoints")
    _add_checkpoints(kept)
    check = commands.add_parser("validate", parents=[common], help="check a manifest and this machine; start nothing")
    _add_manifest(check)
    check.set_defaults(command="validate")
    return top


def _name(text: str) -> str:
    """A name that can be one of an object, and so of a folder."""
    if not re.fullmatch(DNS_LABEL, text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name: it has lower-case letters, digits and dashes")
    return text


def _add_manifest(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="manifest: YAML or JSON with one FineTuneJob")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="another value for a field of spec, e.g. training.steps=50 (repeatable)",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_manifest(command)
    command.add_argument(
        "--preempt", action="append", default=[], metavar="FAULT", help=f"take a rank's pod away with notice: {FAULT}"
    )
    command.add_argument(
        "--kill", action="append", default=[], metavar="FAULT", help=f"let a rank's pod vanish without notice: {FAULT}"
    )
    command.add_argument(
        "--room", action="append", default=[], metavar="ROOM", help=f"let there be room for so many pods: {ROOM}"
    )
    command.add_argument("--plain", action="store_true", help="plain lines also in a terminal")
    command.set_defaults(command="run")


def _add_get(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", type=_name, nargs="?", help="name of a job; default: all of the namespace")
    command.add_argument("-o", "--output", choices=("wide", "json", "yaml"), help="form of the output")
    command.set_defaults(command="get")


def _add_checkpoints(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    of = argparse.ArgumentParser(add_help=False)
    of.add_argument("name", type=_name, nargs="?", help="name of a job of this machine")
    of.add_argument(
        "--folder",
        help="in place of a job: the folder of a job, on some storage or in a bucket (s3://...), or the one below it",
    )
    actions.add_parser("list", parents=[of], help="all checkpoints, those that were set aside, too").set_defaults(
        names=[]
    )
    check = actions.add_parser("verify", parents=[of], help="read every file, and compare it with its manifest")
    check.add_argument("--checkpoint", dest="names", action="append", default=[], help="only this one: name or step")
    compare = actions.add_parser("diff", parents=[of], help="how one checkpoint differs from another")
    compare.add_argument(
        "--checkpoints", dest="names", nargs=2, required=True, metavar=("OLD", "NEW"), help="name or step"
    )
    command.set_defaults(command="checkpoints")


def _add_logs(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", type=_name, help="name of the job")
    command.add_argument("--rank", type=int, help="only this rank's lines (default: all ranks)")
    command.add_argument("--attempt", type=int, help="an earlier attempt (default: the newest)")
    command.add_argument("-f", "--follow", action="store_true", help="go on until the job is no longer run")
    command.set_defaults(command="logs")
