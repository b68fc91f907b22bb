"""Entry point of `finetune-operator`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import sys
from collections.abc import Sequence
from typing import NoReturn

import kopf

from finetune_operator.cluster.kube.client.client import RequestHook, SetupError
from finetune_operator.cluster.kube.operator import Operator
from finetune_operator.cluster.kube.tls import buffers
from finetune_operator.handlers import register
from finetune_operator.metrics import Metrics
from finetune_operator.server import logs, probes
from finetune_operator.server.garbage_collection import GarbageCollector
from finetune_operator.server.kill_switch import VARIABLE, KillSwitch
from finetune_operator.server.options import RunOptions, add_flags, read_options

log = logging.getLogger(__name__)

EXIT_SETUP = 2
"""Exit code of an invalid setup: a restart without a change does not help."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the command line, run until a signal, and exit with an exit code."""
    parser = argparse.ArgumentParser(
        prog="finetune-operator", description="Reconciles FineTuneJobs on a Kubernetes cluster."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="run the operator",
        description="Run until SIGTERM or SIGINT. Every flag is also an environment variable; a flag wins.",
    )
    add_flags(run)
    options = read_options(parser, arguments)
    logs.configure(options.log_format, options.log_level)
    # Each supervisor keeps a connection open.
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    sys.exit(asyncio.run(run_operator(options)))


async def run_operator(options: RunOptions) -> int:
    """Run until a signal or a failure; return the exit code."""
    buffers.share_receive_buffer()
    metrics = Metrics()
    hooks: list[RequestHook] = [metrics]
    if where := os.environ.get(VARIABLE):
        hooks.append(KillSwitch(where))
    operator = Operator(options.operator, options.settings, metrics, tuple(hooks))
    metrics.register_operator(operator)
    try:
        await operator.prepare()
    except SetupError as error:
        log.critical("%s", error)
        return EXIT_SETUP
    checks = {"/livez": operator.is_alive, "/readyz": operator.is_ready}
    try:
        server = await probes.serve(options.probe_host, options.probe_port, checks, metrics.registry)
    except OSError as error:
        log.critical("cannot serve the probes on port %d: %s; set another --probe-port", options.probe_port, error)
        return EXIT_SETUP
    try:
        # A failed operator ends the same way as a stopped one; the exit code distinguishes them.
        with GarbageCollector(asyncio.get_running_loop()):
            await kopf.operator(
                registry=register(operator, watch_nodes=options.watch_nodes),
                clusterwide=True,
                standalone=True,
                stop_flag=operator.ended,
            )
    except Exception:
        log.exception("unexpected error in the operator")
        return 1
    finally:
        await server.stop()
    if operator.setup_failed:
        return EXIT_SETUP
    return 1 if operator.failed else 0


if __name__ == "__main__":
    main()
