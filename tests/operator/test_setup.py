"""An invalid setup ends the command with a message and its own exit code."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_operator.cluster.kube.client.client import SetupError
from finetune_operator.cluster.kube.operator import find_setup_error
from finetune_operator.server.main import EXIT_SETUP
from testing.controlplane.process import LOOPBACK, free_ports

CERTIFICATE = ("--coordinator-tls-cert=/nonexistent", "--coordinator-tls-key=/nonexistent")


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "finetune_operator.server.main", "run", *flags]
    return subprocess.run(command, env={"PATH": ""}, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "set --kubeconfig to run outside a pod"),
        (("--kubeconfig=/nonexistent",), "the kubeconfig /nonexistent"),
        (CERTIFICATE, "coordinator's certificate"),
        ((*CERTIFICATE, "--coordinator-ca=/nonexistent/ca.crt"), "needs a key ca.crt"),
    ],
)
def test_missing_credentials_end_the_command(flags: tuple[str, ...], expected: str) -> None:
    (port,) = free_ports(1)
    ended = run(f"--probe-port={port}", *flags)
    assert ended.returncode == EXIT_SETUP
    assert expected in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_ends_the_command(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    named = [{"name": "here", "cluster": {"server": "http://127.0.0.1:1"}, "user": {}, "context": {"cluster": "here"}}]
    config = {"clusters": named, "users": named, "contexts": named, "current-context": "here"}
    kubeconfig.write_text(json.dumps(config))
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(f"--kubeconfig={kubeconfig}", f"--probe-host={LOOPBACK}", f"--probe-port={port}")
    assert ended.returncode == EXIT_SETUP
    assert f"cannot serve the probes on port {port}" in ended.stderr
    assert "set another --probe-port" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_setup_error_is_found_in_a_group_of_tasks() -> None:
    async def fail() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.Event().wait())
            raise SetupError("the port is in use")

    with pytest.raises(ExceptionGroup) as caught:
        asyncio.run(fail())
    assert str(find_setup_error(caught.value)) == "the port is in use"
    assert find_setup_error(ValueError("a bug")) is None
    assert find_setup_error(None) is None
