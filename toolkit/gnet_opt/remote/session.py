"""A connection that is made again when it is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from gnet_opt.errors import RemoteError
from gnet_opt.remote.address import Device
from gnet_opt.remote.connection import Connection, Lost, connect

T = TypeVar("T")

FIRST_PAUSE = 1.0
"""Seconds before the first new attempt; each further pause is twice as long."""

LONGEST_PAUSE = 30.0
"""Seconds between attempts at most."""

PATIENCE = 600.0
"""Seconds from the loss of a connection until it is given up."""


class UnreachableError(RemoteError):
    """The device could be reached before, and cannot be now; what it does goes on."""


class Session:
    """Steps on a device, each repeated over a new connection when the old one breaks.

    So every step has to be one that may be done twice.
    """

    def __init__(self, device: Device, tell: Callable[[str], None]) -> None:
        self._device = device
        self._tell = tell
        self._connection: Connection | None = None
        self._met = False
        self.losses = 0
        """How often a connection was lost."""

    async def do(self, step: Callable[[Connection], Awaitable[T]]) -> T:
        """Do a step over the connection.

        Raises:
            UnreachableError: The device was lost for longer than PATIENCE.
            RemoteError: It was never reached, or the step failed there.
        """
        pause = FIRST_PAUSE
        lost_at: float | None = None
        while True:
            try:
                if self._connection is None:
                    self._connection = await connect(self._device)
                    if lost_at is not None:
                        self._tell("connected again")
                    self._met = True
                return await step(self._connection)
            except Lost as lost:
                place = self._device.address.place
                if not self._met:
                    raise RemoteError(
                        f"{place} cannot be reached: {lost}. Is it switched on, and does "
                        f"ssh {self._device.address.arguments} get through?"
                    ) from lost
                if self._connection is not None:
                    self.losses += 1
                self.close()
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at > PATIENCE:
                    raise UnreachableError(
                        f"{place} has not been reached for {PATIENCE:.0f} s: {lost}. What it does "
                        "goes on. Run the same command again to bring the results home."
                    ) from lost
                self._tell(f"connection lost ({lost}); trying again in {pause:.0f} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
