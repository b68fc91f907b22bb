"""The command `finetune`: runs FineTuneJobs on this machine and manages them as kubectl does on a cluster."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.output.streams import write_flushed
from finetune_operator.cluster.local.home import HOME_VARIABLE, default_home

DESCRIPTION = "Run FineTuneJobs on this machine and manage them as kubectl does on a cluster."
DNS_LABEL = r"[a-z0-9]([a-z0-9-]*[a-z0-9])?"
WRITTEN_FORMATS = ("comfyui", "compiled", "diffusers", "kohya", "merged", "openvino", "single-file", "webui")
"""Formats that at least one method writes. Not read from the contract: its import would slow down every command."""
FAULT = "rank=R,at-step=S or rank=R,at-state=STATE"
ROOM = "nodes=N,at-step=S"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, carry it out, and exit with its exit code."""
    arguments = parser().parse_args(argv)
    try:
        code = _carry_out(arguments)
    except UsageError as error:
        for message in str(error).splitlines():
            sys.stderr.write(f"finetune: {message}\n")
        code = Exit.USAGE
    except BrokenPipeError:
        write_flushed(sys.stdout, "")
        code = Exit.SUCCEEDED
    except OSError as error:
        sys.stderr.write(f"finetune: {error}\n")
        code = Exit.USAGE
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    sys.exit(int(code))


def _carry_out(arguments: argparse.Namespace) -> Exit:
    """Import only the module of the requested command: `get` needs no HTTP server."""
    module = importlib.import_module(f"finetune_operator.cli.commands.{arguments.command}")
    code: Exit = getattr(module, arguments.command)(arguments)
    return code


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    top = argparse.ArgumentParser(prog="finetune", description=DESCRIPTION)
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
    _add_run(commands.add_parser("run", parents=[common], help="run a job on this machine, or resume it"))
    _add_get(commands.add_parser("get", parents=[common, named], help="list jobs, or show one"))
    one = commands.add_parser("describe", parents=[common, named], help="show all details of a job")
    one.add_argument("name", type=_name, help="name of the job")
    one.set_defaults(command="describe")
    _add_logs(commands.add_parser("logs", parents=[common, named], help="show the output of a job's ranks"))
    delete = commands.add_parser("delete", parents=[common, named], help="stop a job and delete it and its checkpoints")
    delete.add_argument("name", type=_name, help="name of the job")
    delete.set_defaults(command="delete")
    checkpoints = commands.add_parser(
        "checkpoints", parents=[common, named], help="list, verify or compare checkpoints"
    )
    _add_checkpoints(checkpoints)
    _add_export(
        commands.add_parser("export", parents=[common, named], help="write an output from any checkpoint of a job")
    )
    _add_generate(
        commands.add_parser("generate", parents=[common, named], help="draw pictures with an output or a checkpoint")
    )
    _add_validate(commands.add_parser("validate", parents=[common], help="check a manifest without starting anything"))
    _add_explain_topology(
        commands.add_parser("explain-topology", help="show the cores and memory that each rank of a job gets")
    )
    _add_convert(
        commands.add_parser("convert", help="write a manifest for a command such as accelerate launch train.py --flag")
    )
    return top


def _name(text: str) -> str:
    """Return a name that is valid for an object, and so for a folder."""
    if not re.fullmatch(DNS_LABEL, text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a valid name: use lower-case letters, digits and dashes")
    return text


def _add_manifest(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", type=Path, help="manifest: YAML or JSON with one FineTuneJob")
    _add_set(command)


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="override a field of spec, e.g. training.steps=50 (repeatable)",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_manifest(command)
    command.add_argument(
        "--preempt",
        action="append",
        default=[],
        metavar="FAULT",
        help=f"preempt the pod of a rank, with a preemption notice: {FAULT}",
    )
    command.add_argument(
        "--kill",
        action="append",
        default=[],
        metavar="FAULT",
        help=f"kill the pod of a rank, without a preemption notice: {FAULT}",
    )
    command.add_argument(
        "--room",
        action="append",
        default=[],
        metavar="ROOM",
        help=f"limit the capacity to N pods from a step on: {ROOM}",
    )
    command.add_argument("--plain", action="store_true", help="print plain lines even in a terminal")
    command.set_defaults(command="run")


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", help="name of a job on this machine or on a cluster, or its manifest")
    _add_set(command)
    command.add_argument("--cluster", action="store_true", help="let the operator of a cluster write it, in a pod")
    command.add_argument("--kubeconfig", type=Path, help="kubeconfig of --cluster (default: as kubectl)")
    command.add_argument("--context", help="context of the kubeconfig (default: the current one)")
    command.add_argument("--secret", help="with --cluster and --to: Secret with the credentials of the target")
    command.add_argument(
        "--folder", help="the job's folder, or its checkpoints folder, on a disk or in a bucket (s3://...)"
    )
    command.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    command.add_argument(
        "--format", choices=WRITTEN_FORMATS, help="file format (default: that of the job's first output)"
    )
    command.add_argument(
        "--to",
        action="append",
        default=[],
        help="folder, s3://, gs:// or az:// URL, or hub://owner/name to write to (repeatable; default: the targets of "
        "the job's outputs)",
    )
    command.add_argument("--dry-run", action="store_true", help="check everything and write nothing")
    command.add_argument("--list", action="store_true", help="list the checkpoints, the outputs and the formats")
    command.set_defaults(command="export")


def _add_generate(command: argparse.ArgumentParser) -> None:
    model = command.add_mutually_exclusive_group(required=True)
    model.add_argument("--job", help="name of a job on this machine, or its manifest")
    model.add_argument(
        "--model",
        metavar="PATH",
        help="folder, file or s3:// URL: a pipeline, a single file, a LoRA, an embedding or a ControlNet",
    )
    _add_set(command)
    command.add_argument("--folder", help="with --job: the job's folder, on a disk or in a bucket (s3://...)")
    command.add_argument("--step", type=int, help="with --job: draw with the checkpoint of this step")
    command.add_argument("--format", help="with --job: draw with its output of this format (default: the first one)")
    command.add_argument("--base", help="base of the model (default: what the job or the model itself names)")
    command.add_argument("--prompt", action="append", default=[], help="what to draw (repeatable: one row each)")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="text file with one prompt per line")
    command.add_argument("--negative-prompt", help="what the pictures shall not show")
    command.add_argument(
        "--seed", type=int, action="append", default=[], help="seed of the noise (repeatable; default: 0)"
    )
    command.add_argument("--grid", required=True, metavar="FILE", help="image file to write")
    command.add_argument("--condition", metavar="FILE", help="conditioning image of a ControlNet")
    command.add_argument("--compare", choices=("base",), help="add a column with the base")
    command.add_argument(
        "--strength", metavar="LIST", help="strengths of a LoRA or ControlNet, one column each, e.g. 0,0.5,1"
    )
    command.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    command.add_argument("--guidance", type=float, default=7.5, help="scale of the guidance (default: 7.5)")
    command.add_argument("--size", help="size in pixels, e.g. 512 or 768x512 (default: that of the training)")
    command.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="device (default: auto)")
    command.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="number format (default: fp32 on CPUs, fp16 on GPUs)"
    )
    command.set_defaults(command="generate")


def _add_validate(command: argparse.ArgumentParser) -> None:
    _add_manifest(command)
    command.add_argument("--here", action="store_true", help="also check whether the job can run on this machine")
    command.add_argument("--cluster", action="store_true", help="also check the cluster of the kubeconfig")
    command.add_argument("--kubeconfig", type=Path, help="kubeconfig of --cluster (default: as kubectl)")
    command.add_argument("--context", help="context of the kubeconfig (default: the current one)")
    command.set_defaults(command="validate")


def _add_explain_topology(command: argparse.ArgumentParser) -> None:
    _add_manifest(command)
    command.add_argument(
        "--lscpu",
        type=Path,
        metavar="FILE",
        help="output of `lscpu -J -e` or `lscpu -J` of another machine (default: this machine)",
    )
    command.set_defaults(command="explain_topology")


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("line", nargs="+", metavar="COMMAND", help="the command line, best as one quoted argument")
    command.add_argument("--recipe", action="store_true", help="write a manifest for the operator's own method")
    command.add_argument("--name", type=_name, help="name of the job (default: from the name of the script)")
    command.add_argument("--to", type=Path, metavar="FILE", help="file to write (default: standard output)")
    command.set_defaults(command="convert")


def _add_get(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", type=_name, nargs="?", help="name of a job (default: all jobs of the namespace)")
    command.add_argument("-o", "--output", choices=("wide", "json", "yaml"), help="output format")
    command.set_defaults(command="get")


def _add_checkpoints(command: argparse.ArgumentParser) -> None:
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    of = argparse.ArgumentParser(add_help=False)
    of.add_argument("name", type=_name, nargs="?", help="name of a job on this machine")
    of.add_argument(
        "--folder",
        help="instead of a name: a job's folder, or its checkpoints folder, on a disk or in a bucket (s3://...)",
    )
    actions.add_parser("list", parents=[of], help="list all checkpoints, including corrupt ones").set_defaults(names=[])
    check = actions.add_parser("verify", parents=[of], help="read every file and compare it with the manifest")
    check.add_argument(
        "--checkpoint", dest="names", action="append", default=[], help="verify only this checkpoint: name or step"
    )
    compare = actions.add_parser("diff", parents=[of], help="show the differences of two checkpoints")
    compare.add_argument(
        "--checkpoints", dest="names", nargs=2, required=True, metavar=("OLD", "NEW"), help="name or step"
    )
    command.set_defaults(command="checkpoints")


def _add_logs(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", type=_name, help="name of the job")
    command.add_argument("--rank", type=int, help="show only this rank's lines (default: all ranks)")
    command.add_argument("--attempt", type=int, help="show this attempt (default: the newest)")
    command.add_argument("-f", "--follow", action="store_true", help="print new lines until the job stops running")
    command.set_defaults(command="logs")
