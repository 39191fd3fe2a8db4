"""One thing at a time, for callers in turn: a caller that asks for much holds another one up by one of its own at most.

Not here: rows that are denoised together (`scheduler`).
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from .scheduler import QueueFull, may_wait


class Turns:
    """Who may go on; used in one event loop."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Of each caller; whose turn is next is first."""

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @contextlib.asynccontextmanager
    async def turn(self, caller: str, limit: int) -> AsyncIterator[None]:
        """Wait for a turn, and have it.

        Args:
            caller: whose it is.
            limit: how many may wait, as `scheduler` has it.

        Raises:
            QueueFull: too many wait.
        """
        if self._is_taken:
            await self._wait(caller, limit)
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, caller: str, limit: int) -> None:
        own = len(self._waiting.get(caller, ()))
        if not may_wait(1, own, len(self), len(self._waiting) + (not own), limit):
            raise QueueFull
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(future)
        try:
            await future
        except asyncio.CancelledError:
            if not future.cancelled():  # its turn had come
                self._pass_on()
            raise
        finally:
            self._forget(caller, future)

    def _pass_on(self) -> None:
        """Give the turn to the next who still waits for it."""
        while self._waiting:
            caller, futures = next(iter(self._waiting.items()))
            future = futures[0]
            self._forget(caller, future)
            if futures:
                self._waiting[caller] = self._waiting.pop(caller)
            if not future.done():
                future.set_result(None)
                return
        self._is_taken = False

    def _forget(self, caller: str, future: asyncio.Future[None]) -> None:
        futures = self._waiting.get(caller, deque())
        if future in futures:
            futures.remove(future)
            if not futures:
                del self._waiting[caller]
