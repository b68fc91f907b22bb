"""The parent of one pod's processes: it outlives `finetune run`, so that a pod's exit code is never lost.

Run by the kubelet as `python -I -S shim.py CONTAINER.json`, standard library only, for it stays as long as the pod.
It starts the container in a session and on cores of its own, prints a line of JSON as soon as the container runs or
cannot, waits for its end, ends what the container left behind, and writes the exit code. What a container's PID
namespace does, a "child subreaper" does here: orphans come to it.
"""

# pathlib and contextlib would cost memory for as long as the pod lives.
# ruff: noqa: PTH104, PTH123, PTH208, SIM105, S606

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # so would typing
    from typing import Any, TypeAlias

    Json: TypeAlias = dict[str, Any]

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
EXIT_NOT_FOUND = 127
EXIT_NOT_EXECUTABLE = 126

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Be the parent of the container from its start to its end."""
    with open(sys.argv[1], encoding="utf-8") as file:
        container = json.load(file)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    news = os.dup(1)
    log = os.open(container["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    pid, failure = start(container)
    if failure:
        os.waitpid(pid, 0)
        os.write(news, json.dumps({"exitCode": failure[0], "message": failure[1]}).encode())
        return
    processes = {"container": identity(pid), "shim": identity(os.getpid())}
    write_json(container["process_file"], processes)
    tell(news, processes)
    _, status = os.waitpid(pid, 0)
    end_orphans()
    code = os.waitstatus_to_exitcode(status)
    write_json(container["exit_file"], {"exitCode": code if code >= 0 else 128 - code})


def tell(news: int, processes: Json) -> None:
    """Say that the container runs; who asked may be dead by now, and is not needed any more."""
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        os.write(news, json.dumps(processes).encode())
    except BrokenPipeError:
        pass
    os.close(news)


def start(container: Json) -> tuple[int, tuple[int, str] | None]:
    """Fork and exec; return the pid and, where the exec failed, its exit code and reason."""
    read_end, write_end = os.pipe()
    shim = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            # When the shim is killed, its container goes with it: nobody else would hear of its end.
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


def end_orphans() -> None:
    """SIGKILL whatever descends from the container, generation by generation, until nobody is left."""
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
    """Pids of our children. Not every kernel lists them in /proc/<pid>/task/<pid>/children."""
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
    """The fields of /proc/<pid>/stat behind the command's name, which may hold spaces and parentheses."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        stat = file.read()
    return stat[stat.rindex(b")") + 2 :].split()


def identity(pid: int) -> Json:
    """The same identity that `processes.ProcessId` reads."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot_id = file.read().strip()
    return {"pid": pid, "startTicks": int(stat_fields(pid)[19]), "bootId": boot_id}


def write_json(path: str, value: Json) -> None:
    """Whole or not there."""
    with open(path + ".new", "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".new", path)


if __name__ == "__main__":
    main()
