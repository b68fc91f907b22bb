"""SIGTERM, the notice that this machine is about to be taken away.

During training it only sets a flag, and the loop stops when all ranks agree. Before that there is nothing to save (what
the map phase has written stays), so the rank leaves at once, even from the middle of an import or a rendezvous.

SIGUSR2 says that a peer is gone for good and the collective that this rank may hang in will never end: what can be
saved is saved, beside the thread that hangs, and the rank leaves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from finetune_contract.exit_codes import ExitCode

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ORPHANED = signal.SIGUSR2


class PreemptionNotice:
    """Whether this rank has been told to stop, and what that means at the moment."""

    def __init__(self, on_leave: Callable[[], None] = lambda: None) -> None:
        self._on_leave = on_leave
        self._lock = threading.Lock()
        self._given = False
        self._held = False
        self._on_orphaned: Callable[[], None] = lambda: None

    @property
    def given(self) -> bool:
        """Whether the notice has come."""
        return self._given

    def listen(self) -> None:
        """Take the signals from now on. Main thread only."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in (*SIGNALS, ORPHANED):
            signal.signal(number, lambda *_: None)
        # Python runs handlers between bytecodes, and a rank may sit in a C call for minutes (a rendezvous). The
        # descriptor is written by the C-level handler, so a thread hears of it in any case.
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reader, writer), daemon=True, name="notice").start()

    def hold(self) -> None:
        """From now on the notice only sets the flag: there is state to save, or the rank ends by a code of its own.

        It is not let go again: a save that failed must not look like one that was committed.
        """
        self._set_held(True)

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """In this block of a rank that holds it nothing is unsaved: the notice ends the rank at once."""
        self._set_held(False)
        try:
            yield
        finally:
            self._set_held(True)

    def when_orphaned(self, save: Callable[[], None]) -> None:
        """Call this when a peer is gone for good, in a thread of its own."""
        self._on_orphaned = save

    def give(self) -> None:
        """Take note of it; ends the process unless it is held."""
        with self._lock:
            self._given = True
            self._leave_unless_held()

    def _set_held(self, held: bool) -> None:
        with self._lock:
            self._held = held
            if self._given:
                self._leave_unless_held()

    def _leave_unless_held(self) -> None:
        if not self._held:
            self._on_leave()
            # No unwinding: other threads and C calls need not agree, and every file is written aside.
            os._exit(ExitCode.SAVED)

    def _watch(self, reader: socket.socket, writer: socket.socket) -> None:
        # The writer is held here, for the descriptor that signals write to must stay open.
        while data := reader.recv(16):
            if ORPHANED in data:
                self._on_orphaned()
                os._exit(ExitCode.FABRIC)
            if any(number in SIGNALS for number in data):
                self.give()
        writer.close()
