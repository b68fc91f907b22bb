"""What ends the command before it begins: a sentence and an exit code of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from finetune_operator.server.main import EXIT_SETUP
from testing.controlplane.process import free_ports


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "for want of --kubeconfig"),
        (("--kubeconfig=/nonexistent",), "the kubeconfig /nonexistent"),
        (("--coordinator-tls-cert=/nonexistent", "--coordinator-tls-key=/nonexistent"), "coordinator's certificate"),
    ],
)
def test_surroundings_that_are_not_there(flags: tuple[str, ...], words: str) -> None:
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "finetune_operator.server.main", "run", f"--probe-port={port}", *flags]
    ended = subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_SETUP
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr
