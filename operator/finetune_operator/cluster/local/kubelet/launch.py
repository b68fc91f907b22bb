"""Processes and folders of a pod on disk: what the kubelet does in threads. Blocking."""

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
"""Kubernetes keeps so much of a termination message."""
MAX_FALLBACK_BYTES = 2048
"""And so much of the log in its place (terminationMessagePolicy: FallbackToLogsOnError)."""
SHIM_COMMAND = (sys.executable, "-I", "-S", str(Path(shim.__file__)))


def resolve_command(command: str) -> tuple[str, ...]:
    """What starts a command here: the programs of this very installation first, whatever PATH says."""
    beside = Path(sys.executable).parent / command
    if "/" not in command and os.access(beside, os.X_OK):
        return (str(beside),)
    if command == SUPERVISOR:
        return (sys.executable, "-m", SUPERVISOR_MODULE)
    return (command,)


def machine_environment() -> dict[str, str]:
    """Our own environment, with the programs of this installation first: it stands in for the container's image."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)])}


def temporary_folder(pod_folder: Path) -> Path:
    """A pod's folder for temporary files. Short, for sockets below it may have no more than 107 characters."""
    digest = hashlib.sha256(str(pod_folder).encode()).hexdigest()
    return Path(tempfile.gettempdir()) / f"finetune-{digest[:12]}"


def launch(files: PodFiles, container: Container, cores: frozenset[int], log: Path) -> Mapping[str, Any]:
    """Start a pod's shim and return its first words: the processes, or an exit code and a message.

    Raises:
        OSError: a file cannot be written, or there are no more processes to be had.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    order = {
        "argv": container.argv,
        "environment": {**container.environment, MARKER: str(files.folder)},
        "working_folder": str(container.working_folder or temporary_folder(files.folder)),
        "cores": sorted(cores),
        "log": str(log),
        "process_file": str(files.process),
        "exit_file": str(files.exit),
    }
    write_json(files.container, order)
    answer, question = os.pipe()
    try:
        pid = os.posix_spawn(
            SHIM_COMMAND[0],
            [*SHIM_COMMAND, str(files.container)],
            {MARKER: str(files.folder)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, question, 1),
                (os.POSIX_SPAWN_OPEN, 2, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            ],
            # The terminal's Ctrl-C is for the command; what becomes of the pods is the core's to decide.
            setsid=True,
        )
    finally:
        os.close(question)
    with os.fdopen(answer, "rb") as pipe:
        words = pipe.read()
    if not words:
        reap(pid, block=True)
        raise OSError(f"the pod's processes died while they started; see {log}")
    news: Mapping[str, Any] = json.loads(words)
    return news


def reap(pid: int, *, block: bool = False) -> None:
    """Collect an ended child, so that it does not stay a zombie; an adopted one is init's to collect."""
    with suppress(ChildProcessError):
        os.waitpid(pid, 0 if block else os.WNOHANG)


def clear_away(pod_folder: Path) -> bool:
    """Kill what is left of a pod and remove its folders; say whether all its processes are gone."""
    gone = kill_marked(pod_folder)
    for folder in (pod_folder, temporary_folder(pod_folder)):
        shutil.rmtree(folder, ignore_errors=True)
    return gone


def pod_folders(pods: Path) -> list[PodFiles]:
    """Pods that an earlier runner left."""
    try:
        return [PodFiles(folder) for folder in sorted(pods.iterdir()) if folder.is_dir()]
    except FileNotFoundError:
        return []


def cores_of_others(home: Home, own: JobFolder) -> list[frozenset[int]]:
    """Cores that living pods of other jobs are pinned to."""
    cores = []
    for folder in (home.job(key) for key in home.jobs()):
        for files in pod_folders(folder.pods) if folder != own else ():
            with suppress(BrokenFileError, OSError, ValueError):
                pod = read_json(files.pod, partial(Pod.from_json, files=files))
                if pod is not None and not pod.ended:
                    cores.append(pod.cores)
    return cores


def read_last_words(files: PodFiles, log: Path) -> str:
    """The pod's termination message, cut as Kubernetes cuts it; where it left none, the end of its log."""
    try:
        if words := files.termination_log.read_bytes()[:MAX_MESSAGE_BYTES]:
            return words.decode(errors="replace")
    except OSError:
        pass
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MAX_FALLBACK_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""
