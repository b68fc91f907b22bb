"""Starts and removes the processes and folders of a pod. Blocking: the kubelet calls it in threads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from finetune_operator.cluster.local.files import BrokenFileError, read_json, write_json
from finetune_operator.cluster.local.home import Home, JobFolder
from finetune_operator.cluster.local.kubelet import shim
from finetune_operator.cluster.local.kubelet.container import Container
from finetune_operator.cluster.local.kubelet.pod import Pod, PodFiles
from finetune_operator.cluster.local.kubelet.processes import MARKER, kill_marked

SUPERVISOR = "finetune-supervisor"
SUPERVISOR_MODULE = "finetune_trainer.supervisor"
MAX_MESSAGE_BYTES = 4096
"""Kubernetes' limit for a termination message."""
MAX_FALLBACK_BYTES = 2048
"""Kubernetes' limit for the end of the log that replaces it (terminationMessagePolicy: FallbackToLogsOnError)."""
SHIM_COMMAND = (sys.executable, "-I", "-S", str(Path(shim.__file__)))


def resolve_command(command: str) -> tuple[str, ...]:
    """Return the program and arguments that start a command. Programs of this installation precede those of PATH."""
    installed = Path(sys.executable).parent / command
    if "/" not in command and os.access(installed, os.X_OK):
        return (str(installed),)
    if command == SUPERVISOR:
        return (sys.executable, "-m", SUPERVISOR_MODULE)
    return (command,)


def machine_environment() -> dict[str, str]:
    """Return this process's environment with this installation first in PATH. It replaces the container's image."""
    installation = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([installation, os.environ.get("PATH", os.defpath)])}


def temporary_folder(pod_folder: Path) -> Path:
    """Return a pod's folder for temporary files. It is short, because a socket's path has at most 107 characters."""
    digest = hashlib.sha256(str(pod_folder).encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"finetune-{digest[:12]}"


def launch(files: PodFiles, container: Container, cores: frozenset[int], log: Path) -> Mapping[str, Any]:
    """Start a pod's shim and return its answer: the processes, or an exit code and a message.

    Raises:
        OSError: a file cannot be written, or a process cannot be started.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    request = {
        "argv": container.argv,
        "environment": {**container.environment, MARKER: str(files.folder)},
        "working_folder": str(container.working_folder or temporary_folder(files.folder)),
        "cores": sorted(cores),
        "log": str(log),
        "process_file": str(files.process),
        "exit_file": str(files.exit),
    }
    write_json(files.container, request)
    read_end, write_end = os.pipe()
    try:
        pid = os.posix_spawn(
            SHIM_COMMAND[0],
            [*SHIM_COMMAND, str(files.container)],
            {MARKER: str(files.folder)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, write_end, 1),
                (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            ],
            # The terminal's Ctrl-C must reach only the command; the core decides what happens to the pods.
            setsid=True,
        )
    finally:
        os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        content = pipe.read()
    if not content:
        reap(pid, block=True)
        raise OSError(f"the pod's processes exited during their start; see {log}")
    answer: Mapping[str, Any] = json.loads(content)
    return answer


def reap(pid: int, *, block: bool = False) -> None:
    """Wait for an ended child, so that it does not remain a zombie. For adopted pods, init does this."""
    with suppress(ChildProcessError):
        os.waitpid(pid, 0 if block else os.WNOHANG)


def kill_and_remove(pod_folder: Path) -> bool:
    """Kill the remaining processes of a pod and remove its folders. Return whether all processes have exited."""
    all_exited = kill_marked(pod_folder)
    for folder in (pod_folder, temporary_folder(pod_folder)):
        shutil.rmtree(folder, ignore_errors=True)
    return all_exited


def find_pods(pods: Path) -> list[PodFiles]:
    """Return the pods in a job's folder of pods."""
    try:
        return [PodFiles(folder) for folder in sorted(pods.iterdir()) if folder.is_dir()]
    except FileNotFoundError:
        return []


def cores_of_other_jobs(home: Home, own: JobFolder) -> list[frozenset[int]]:
    """Return the cores that running pods of other jobs are pinned to."""
    cores = []
    for folder in (home.job(key) for key in home.jobs()):
        for files in find_pods(folder.pods) if folder != own else ():
            with suppress(BrokenFileError, OSError, ValueError):
                pod = read_json(files.pod, partial(Pod.from_json, files=files))
                if pod is not None and not pod.ended:
                    cores.append(pod.cores)
    return cores


def read_termination_message(files: PodFiles, log: Path) -> str:
    """Return the pod's termination message, truncated as in Kubernetes; if there is none, the end of its log."""
    try:
        if message := files.termination_log.read_bytes()[:MAX_MESSAGE_BYTES]:
            return message.decode(errors="replace")
    except OSError:
        pass
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_FALLBACK_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
