"""Background tasks whose errors always surface."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class TaskScope:
    """Runs tasks for the duration of an `async with` block. A failed task ends the block with its error."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> TaskScope:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *raised: Any) -> None:
        for task in self._tasks:
            task.cancel()
        await self._group.__aexit__(*raised)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Start a task."""
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
