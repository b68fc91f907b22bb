"""`finetune validate`: all checks of `finetune run`, and nothing started."""

from __future__ import annotations

import argparse
import sys

from finetune_operator.cli import preflight
from finetune_operator.cli.errors import Exit, UsageError
from finetune_operator.cli.manifest import load_manifest
from finetune_operator.cluster.local.home import Home


def validate(arguments: argparse.Namespace) -> Exit:
    """Carry out `finetune validate`."""
    job = load_manifest(arguments.file, arguments.set)
    sentences = preflight.check(job, Home(arguments.home), preflight.this_machine())
    if sentences:
        raise UsageError("\n".join(f"{arguments.file}: {sentence}" for sentence in sentences))
    for sentence in preflight.remarks(job.spec):
        sys.stderr.write(f"finetune: warning: {sentence}\n")
    sys.stdout.write(f"finetunejob {job.metadata.name!r} is valid and can be run on this machine\n")
    return Exit.SUCCEEDED
