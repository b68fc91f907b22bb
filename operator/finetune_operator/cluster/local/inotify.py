"""Waits for changes of a folder through inotify, without polling."""

from __future__ import annotations

import asyncio
import ctypes
import os
from contextlib import suppress
from pathlib import Path

IN_MODIFY = 0x2
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
_libc = ctypes.CDLL(None, use_errno=True)


class FolderWatch:
    """Watches the files of a folder. Used as a context manager, inside a running event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor = -1
        self._changed = asyncio.Event()

    def __enter__(self) -> FolderWatch:
        self._descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        mask = IN_MODIFY | IN_CREATE | IN_MOVED_TO
        if self._descriptor < 0 or _libc.inotify_add_watch(self._descriptor, os.fsencode(self._folder), mask) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(self._folder))
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_change)
        return self

    def __exit__(self, *raised: object) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)

    async def wait_for_change(self, timeout_seconds: float) -> None:
        """Wait for a change since the last call, or until the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._changed.wait()
        self._changed.clear()

    def _on_change(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._descriptor, 65536)
        self._changed.set()
