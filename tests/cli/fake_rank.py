"""A minimal rank: it implements the contract, runs in lockstep with its peers, and trains nothing.

It connects to its peers at MASTER_ADDR:MASTER_PORT, reports on FINETUNE_REPORT_FD, saves the step to a file, agrees
with its peers on the last step after a preemption notice, and exits with the trainer's exit codes. It uses only the
standard library.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from finetune_contract import environment
from finetune_contract.exit_codes import ExitCode

RANK = int(os.environ["RANK"])
WORLD_SIZE = int(os.environ["WORLD_SIZE"])
ATTEMPT = int(os.environ[environment.ATTEMPT])
FOLDER = Path(os.environ[environment.CHECKPOINT_DIR])
STATE = FOLDER / "step"
KEY = b"fake"
notice = False
training = False


def on_notice(*_: object) -> None:
    """Handle a preemption notice. Before training there is nothing to save: exit at once, as the trainer does."""
    global notice  # noqa: PLW0603
    notice = True
    if not training:
        os._exit(ExitCode.SAVED)


class Peers:
    """Lockstep: before each step the ranks report to rank 0 whether they have a notice, and all get the same answer."""

    def __init__(self) -> None:
        address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        self.links: list[Connection] = []
        if RANK == 0 and WORLD_SIZE > 1:
            with Listener(address, authkey=KEY) as listener:
                self.links = [listener.accept() for _ in range(WORLD_SIZE - 1)]
        elif RANK > 0:
            self.links = [connect(address)]

    def agree_to_stop(self) -> bool:
        try:
            if RANK > 0:
                self.links[0].send(notice)
                answer: bool = self.links[0].recv()
                return answer
            notices = [link.recv() for link in self.links]
            stop = notice or any(notices)
            for link in self.links:
                link.send(stop)
            return stop
        except (EOFError, OSError):
            print("lost a peer", file=sys.stderr)
            sys.exit(ExitCode.FABRIC)


def connect(address: tuple[str, int]) -> Connection:
    deadline = time.monotonic() + 30
    while True:
        try:
            return Client(address, authkey=KEY)
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(ExitCode.FABRIC)
            time.sleep(0.01)


def report(state: str, **values: Any) -> None:
    line = json.dumps({"rank": RANK, "state": state, **values}) + "\n"
    os.write(int(os.environ[environment.REPORT_FD]), line.encode())


def save(step: int) -> None:
    if RANK == 0:
        temporary = STATE.with_suffix(".new")
        temporary.write_text(str(step))
        temporary.replace(STATE)
        checkpoint = {"step": step, "time": time.time(), "sizeBytes": 1234, "attempt": ATTEMPT}
        report("Training", step=step, checkpoint=checkpoint)


def train(args: argparse.Namespace) -> None:
    begin = int(STATE.read_text()) if STATE.exists() else 0
    report("Restoring", restoredStep=begin)
    peers = Peers()
    global training  # noqa: PLW0603
    training = True
    for step in range(begin + 1, args.steps + 1):
        if peers.agree_to_stop():
            save(step - 1)
            report("Saved", step=step - 1)
            sys.exit(ExitCode.SAVED)
        time.sleep(args.step_seconds)  # simulates the work of a step
        if args.hang_at == step and ATTEMPT == 1 and args.rank in (None, RANK):
            hang(args.hang)
        report("Training", step=step, totalSteps=args.steps, loss=round(1 / step, 3), imagesPerSecond=8.0)
        if args.fail_at == step:
            print(f"step {step} failed on purpose", file=sys.stderr)
            sys.exit(args.fail_with)
        if step % args.save_every == 0:
            save(step)


def hang(how: str) -> None:
    """Hang forever."""
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    lock = threading.Lock()
    with lock, lock:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--fail-with", type=int, default=ExitCode.SOFTWARE)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--hang", choices=("stop", "deadlock"), default="deadlock")
    parser.add_argument("--rank", type=int, help="the rank that hangs (default: all)")
    parser.add_argument("--ignore-sigterm", action="store_true", help="ignore SIGTERM, the preemption notice")
    args = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.ignore_sigterm else on_notice)
    FOLDER.mkdir(parents=True, exist_ok=True)
    report("Loading")
    print(f"rank {RANK} of attempt {ATTEMPT} is up", flush=True)
    train(args)
    report("Exporting", step=args.steps)
    save(args.steps)
    if RANK == 0:
        output = {"format": "diffusers", "to": str(FOLDER / "outputs"), "sizeBytes": 4321}
        report("Done", step=args.steps, outputs=[output])


if __name__ == "__main__":
    main()
