"""Start a control plane in the foreground for interactive use: `python -m testing.controlplane`, until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from testing.controlplane.build import BuildError, versions
from testing.controlplane.process import ControlPlaneError
from testing.controlplane.server import ControlPlane

CHECK_SECONDS = 1.0


def main() -> int:
    """Run until Ctrl-C, SIGTERM or the exit of one of the programs; return the exit code."""
    options = _parse()
    # SIGTERM stops all programs, like Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    control_plane = ControlPlane(folder=options.folder, audit=options.audit)
    try:
        with control_plane:
            if options.nodes:
                control_plane.add_nodes(options.nodes, gpus=options.gpus)
            _show(control_plane, time.monotonic() - started)
            return _watch(control_plane)
    except (BuildError, ControlPlaneError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped")
        return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m testing.controlplane", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, metavar="N", help="number of kwok nodes (default: 4)")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of each node (default: 8)")
    parser.add_argument("--audit", action="store_true", help="write one line of JSON per request to audit.log")
    parser.add_argument("--folder", type=Path, help="folder for logs and keys (default: a temporary one)")
    return parser.parse_args()


def _show(control_plane: ControlPlane, seconds: float) -> None:
    """Print the running programs and the settings for a shell."""
    number = versions()
    print(f"\nstarted in {seconds:.1f} s at {control_plane.url}\n")
    print(f"  {'program':24} {'version':9} {'pid':>8} {'MiB':>5}  log")
    for program in control_plane.programs:
        mib = program.resident_bytes >> 20
        print(f"  {program.name:24} {number[program.name]:9} {program.pid or '-':>8} {mib:>5}  {program.log}")
    print(f"\nexport KUBECONFIG={control_plane.kubeconfig}")
    print(f"alias kubectl={control_plane.kubectl_path}")
    print("\nPress Ctrl-C to stop.", flush=True)


def _watch(control_plane: ControlPlane) -> int:
    """Return when one of the programs has exited."""
    while not any(program.has_exited for program in control_plane.programs):
        time.sleep(CHECK_SECONDS)
    print(control_plane.tails(), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
