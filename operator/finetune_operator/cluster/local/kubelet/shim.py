"""The parent of one pod's processes. It outlives `finetune run`, so that a pod's exit code is never lost.

The kubelet runs it as `python -I -S shim.py CONTAINER.json`. It uses only the standard library, because it occupies
memory for the lifetime of the pod. It starts the container in its own session and on its own cores, prints a line of
JSON when the container runs or fails to start, waits until it exits, kills its remaining processes, and writes the exit
code. A "child subreaper" replaces the container's PID namespace: orphaned processes become children of the shim.
"""

# pathlib and contextlib would use memory for the lifetime of the pod.
# ruff: noqa: PTH104, PTH123, PTH208, SIM105, S606

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing would use memory too
    from typing import Any, TypeAlias

    Json: TypeAlias = dict[str, Any]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Start the container and wait for its end."""
    with open(sys.argv[1], encoding="utf-8") as file:
        container = json.load(file)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start_pipe = os.dup(1)
    log = os.open(container["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    pid, failure = start(container)
    if failure:
        os.waitpid(pid, 0)
        os.write(start_pipe, json.dumps({"exitCode": failure[0], "message": failure[1]}).encode())
        return
    processes = {"container": identity(pid), "shim": identity(os.getpid())}
    write_json(container["process_file"], processes)
    report_start(start_pipe, processes)
    _, status = os.waitpid(pid, 0)
    kill_orphans()
    code = os.waitstatus_to_exitcode(status)
    write_json(container["exit_file"], {"exitCode": code if code >= 0 else 128 - code})


def report_start(start_pipe: int, processes: Json) -> None:
    """Report that the container runs. The kubelet may have exited already; then the report is not needed."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(start_pipe, json.dumps(processes).encode())
    except BrokenPipeError:
        pass
    os.close(start_pipe)


def start(container: Json) -> tuple[int, tuple[int, str] | None]:
    """Fork and exec. Return the pid and, if exec failed, an exit code and a reason."""
    read_end, write_end = os.pipe()
    shim = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            # If the shim is killed, kill the container too: no other process would detect its exit.
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != shim:
                os._exit(EXIT_NOT_EXECUTABLE)
            if container["cores"]:
                os.sched_setaffinity(0, container["cores"])
            os.chdir(container["working_folder"])
            for number in (signal.SIGPIPE, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.execvpe(container["argv"][0], container["argv"], container["environment"])
        except FileNotFoundError as error:
            os.write(write_end, f"{EXIT_NOT_FOUND} {error}".encode())
        except OSError as error:
            os.write(write_end, f"{EXIT_NOT_EXECUTABLE} {error}".encode())
        finally:
            os._exit(EXIT_NOT_EXECUTABLE)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        code, _, reason = pipe.read().decode(errors="replace").partition(" ")
    return pid, (int(code), reason) if code else None


def kill_orphans() -> None:
    """SIGKILL all descendants of the container, generation by generation, until none is left."""
    while True:
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Return the pids of this process's children. Not every kernel has /proc/<pid>/task/<pid>/children."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if int(stat_fields(int(name))[1]) == os.getpid():
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                pass
    return found


def stat_fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/<pid>/stat after the command's name, which may contain spaces and parentheses."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    return stat[stat.rindex(b")") + 2 :].split()


def identity(pid: int) -> Json:
    """Return the identity of a process in the format that `processes.ProcessId` reads."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return {"pid": pid, "startTicks": int(stat_fields(pid)[19]), "bootId": boot_id}


def write_json(path: str, value: Json) -> None:
    """Write a JSON file atomically."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)


if __name__ == "__main__":
    main()
