"""Several devices at once: the file that lists them, and running on all of them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from gnet_opt.errors import ConfigError, GnetOptError
from gnet_opt.remote import job
from gnet_opt.remote.address import Address, Device
from gnet_opt.remote.job import Outcome
from gnet_opt.remote.parcel import Work
from gnet_opt.remote.preflight import Report

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

# It becomes the name of a folder.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_KEYS: Mapping[str, type] = {
    "backend": str,
    "identity": str,
    "known_hosts": str,
    "name": str,
    "python": str,
    "threads": int,
    "url": str,
    "workdir": str,
}


@dataclass(frozen=True, kw_only=True)
class Result(Generic[T]):
    """What one device of several gave.

    Attributes:
        device: The device.
        value: What it gave, None where it failed.
        error: Why it failed, None where it did not.
    """

    device: Device
    value: T | None
    error: GnetOptError | None


Tell = Callable[[Device, str], None]


def read_fleet(path: Path, defaults: Device) -> list[Device]:
    """Read a file of devices: one `[[device]]` each, with `name`, `url` and other keys.

    Args:
        path: The TOML file; `identity` and `known_hosts` in it are relative to its folder.
        defaults: What holds where a device says nothing else.

    Raises:
        ConfigError: It cannot be read, or a value in it cannot be used.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}).") from error
    entries = table.pop("device", None)
    if table or not isinstance(entries, list) or not entries:
        wrong = f"has {next(iter(table))!r}" if table else "has no [[device]]"
        raise ConfigError(
            f"{path} {wrong}. Write one [[device]] with name and url for each device."
        )
    devices = [
        _device(entry, f"{path}: device[{index}]", path.parent, defaults)
        for index, entry in enumerate(entries)
    ]
    names = [device.name.lower() for device in devices]  # folders, on any file system
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ConfigError(f"{path}: device[{index}].name {name!r} is there already.")
    return devices


def _device(entry: Any, where: str, folder: Path, defaults: Device) -> Device:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not a table.")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ConfigError(f"{where}.{key} is not known. Known are {', '.join(_KEYS)}.")
        if isinstance(value, bool) or not isinstance(value, _KEYS[key]):
            raise ConfigError(f"{where}.{key} is not a {_NOUNS[_KEYS[key]]}.")
    for key in ("name", "url"):
        if key not in entry:
            raise ConfigError(f"{where}.{key} is missing.")
    if not _NAME.fullmatch(entry["name"]):
        raise ConfigError(
            f"{where}.name {entry['name']!r} cannot name a folder: letters, digits, dots, hyphens "
            "and underscores."
        )
    if entry.get("threads", 1) < 1:
        raise ConfigError(f"{where}.threads is less than 1.")
    try:
        address = Address.parse(entry["url"])
    except ConfigError as error:
        raise ConfigError(f"{where}.url: {error}") from error
    changes = {key: value for key, value in entry.items() if key not in ("name", "url")}
    for key in ("identity", "known_hosts"):
        if key in changes:
            changes[key] = folder / Path(changes[key]).expanduser()
    return dataclasses.replace(defaults, name=entry["name"], address=address, **changes)


_NOUNS = {int: "whole number", str: "text"}


def run(
    devices: Sequence[Device], work: Work, out: Path | None, tell: Tell, *, apart: bool = True
) -> list[Result[Outcome]]:
    """Do a work on all devices at once; what fails on one stops no other.

    Args:
        devices: The devices. What one says of its own, backend and threads, becomes options at the
            end of its command.
        work: What to run, as for `gnet_opt.remote.job.run`.
        out: The folder for the results, None to only return them. Older results of a device that
            fails this time stay there.
        tell: Called with a device and a few words whenever there is something new.
        apart: Each device gets a folder of its name in `out`; otherwise `out` is that of the one
            device there is.

    Raises:
        KeyboardInterrupt: Ctrl-C; the devices have been tidied up.
    """

    def start(device: Device) -> Awaitable[Outcome]:
        folder = out / device.name if out is not None and apart else out
        return job.run(device, own(device, work), folder, lambda text: tell(device, text))

    return _all(devices, start)


def check(devices: Sequence[Device], work: Work, tell: Tell) -> list[Result[Report]]:
    """Look whether all devices can do a work, without changing anything there.

    Raises:
        KeyboardInterrupt: Ctrl-C.
    """
    return _all(
        devices,
        lambda device: job.check(device, own(device, work), lambda text: tell(device, text)),
    )


def own(device: Device, work: Work) -> Work:
    """A work with what a device says of its own."""
    command, backends = work.command, work.backends
    if device.backend:
        command, backends = (*command, "--backend", device.backend), (device.backend,)
    if device.threads is not None:
        command = (*command, "--threads", str(device.threads))
    return dataclasses.replace(work, command=command, backends=backends)


def _all(devices: Sequence[Device], start: Callable[[Device], Awaitable[T]]) -> list[Result[T]]:
    async def one(device: Device) -> Result[T]:
        try:
            return Result(device=device, value=await start(device), error=None)
        except GnetOptError as error:
            return Result(device=device, value=None, error=error)

    async def together() -> list[Result[T]]:
        with _cancelled_by_signals():
            return list(await asyncio.gather(*map(one, devices)))

    try:
        return asyncio.run(together())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _cancelled_by_signals() -> Iterator[None]:
    """Ctrl-C and the like cancel this task, so that it can tidy up while its loop still runs.

    What the caller lets this process ignore, as `nohup` does, it goes on to ignore.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is None:
            continue
        handler = signal.getsignal(number)
        if handler == signal.SIG_IGN:
            continue
        # RuntimeError and ValueError: not the main thread; there signals are somebody else's.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, task.cancel)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
