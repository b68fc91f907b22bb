"""The preemption notice (SIGTERM): this machine will be reclaimed soon.

During training the notice only sets a flag, and the loop stops when all ranks agree. Before training there is nothing
to save (the results of the map phase are already stored), so the rank exits immediately, even during an import or a
rendezvous.

SIGUSR2 means that a peer is lost, so that a collective that this rank may be waiting in never ends. The emergency save
then runs in a separate thread, and the rank exits.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from finetune_contract.exit_codes import ExitCode
from finetune_trainer.pauses import AFTER_NOTICE_SECONDS

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PEER_LOST = signal.SIGUSR2


class PreemptionNotice:
    """Records the preemption notice of this rank, and decides whether it ends the rank immediately.

    Args:
        on_leave: called before the notice ends the process.
    """

    def __init__(self, on_leave: Callable[[], None] = lambda: None) -> None:
        self._on_leave = on_leave
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._held = False
        self._on_peer_lost: Callable[[], None] = lambda: None

    @property
    def given(self) -> bool:
        """Return whether the preemption notice has arrived."""
        return self._arrived.is_set()

    def listen(self) -> None:
        """Handle the signals from now on. Call it in the main thread only."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in (*SIGNALS, PEER_LOST):
            signal.signal(number, lambda *_: None)
        # Python runs signal handlers between bytecodes, and a rank may be in a C call for minutes (a rendezvous). The
        # C-level handler writes to the descriptor, so the watching thread is notified in any case.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader, writer), daemon=True, name="notice").start()

    def hold(self) -> None:
        """From now on, the notice only sets the flag: there is state to save, or the rank exits with its own code.

        This cannot be undone, because a failed save must not exit with the code of a committed one.
        """
        self._set_held(True)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Within this block, the notice ends the rank at once, because nothing is unsaved. Call `hold` before."""
        self._set_held(False)
        try:
            yield
        finally:
            self._set_held(True)

    def pause(self, seconds: float) -> bool:
        """Wait before another try of what failed. The notice ends the wait; later waits are short.

        Returns:
            Whether the notice has arrived.
        """
        if self._arrived.is_set():
            time.sleep(min(seconds, AFTER_NOTICE_SECONDS))
            return True
        return self._arrived.wait(seconds)

    def on_peer_lost(self, save: Callable[[], None]) -> None:
        """Set the function to call when a peer is lost. It runs in a separate thread."""
        self._on_peer_lost = save

    def give(self) -> None:
        """Record the notice. End the process unless `hold` was called."""
        with self._lock:
            self._arrived.set()
            self._leave_unless_held()

    def _set_held(self, held: bool) -> None:
        with self._lock:
            self._held = held
            if self._arrived.is_set():
                self._leave_unless_held()

    def _leave_unless_held(self) -> None:
        if not self._held:
            self._on_leave()
            # No unwinding: other threads and C calls cannot delay the exit, and every file is written to a temporary
            # name first.
            os._exit(ExitCode.SAVED)

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        # This reference to `writer` keeps open the descriptor that signals write to.
        while data := reader.recv(16):
            if PEER_LOST in data:
                self._on_peer_lost()
                os._exit(ExitCode.FABRIC)
            if any(number in SIGNALS for number in data):
                self.give()
        writer.close()
