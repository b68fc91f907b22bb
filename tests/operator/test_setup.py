"""An invalid setup ends the command with a message and its own exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune_operator.server.main import EXIT_SETUP
from testing.controlplane.process import free_ports


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "set --kubeconfig to run outside a pod"),
        (("--kubeconfig=/nonexistent",), "the kubeconfig /nonexistent"),
        (("--coordinator-tls-cert=/nonexistent", "--coordinator-tls-key=/nonexistent"), "coordinator's certificate"),
    ],
)
def test_missing_credentials_end_the_command(flags: tuple[str, ...], expected: str) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "finetune_operator.server.main", "run", f"--probe-port={port}", *flags]
    ended = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_SETUP
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr
