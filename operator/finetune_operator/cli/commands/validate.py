"""`finetune validate`: makes all checks of `finetune run` without starting anything."""

from __future__ import annotations

import argparse
import sys

from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cli.preflight.check import find_problems, find_warnings, measure_machine
from finetune_operator.cluster.local.home import Home


def validate(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune validate`."""
    job = load_manifest(arguments.file, arguments.set)
    if problems := find_problems(job, Home(arguments.home), measure_machine()):
        raise UsageError("\n".join(f"{arguments.file}: {problem}" for problem in problems))
    for warning in find_warnings(job.spec):
        sys.stderr.write(f"finetune: warning: {warning}\n")
    sys.stdout.write(f"finetunejob {job.metadata.name!r} is valid and can run on this machine\n")
    return Exit.SUCCEEDED
