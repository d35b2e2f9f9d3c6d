"""A work on one device: look at it, copy, start, follow, bring the results home, tidy up.

The job on the device does not depend on the connection: it runs in a session of its own, and every
step here may be repeated. So a lost connection costs nothing but time, and when this process is
killed the same command goes on where it was. Ctrl-C, in contrast, ends the job and removes all.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnet_opt.errors import GnetOptError, IntegrityError, RemoteError
from gnet_opt.files import (
    dump_json,
    publish,
    sha256_text,
    staging_directory,
    write_text,
)
from gnet_opt.paths import remote_runs
from gnet_opt.remote import preflight
from gnet_opt.remote.address import Device
from gnet_opt.remote.connection import Connection
from gnet_opt.remote.parcel import OUT, PARCEL, Parcel, Work
from gnet_opt.remote.preflight import Facts, Needs, Report
from gnet_opt.remote.record import Record
from gnet_opt.remote.session import Session, UnreachableError

Tell = Callable[[str], None]

RESULTS = "results.json"
"""The file that a job has to leave in its results."""

POLL_SECONDS = 1.0
"""How often the job is looked after. One look reads two names and the end of a file, over the
connection that is there: no program is started on the device, which is measuring."""

LARGEST = 256 * 2**20
"""The largest result file that is taken from a device, in bytes, and all together: hours of samples
are tens of megabytes, and what is read is held in memory."""

_LOG_BYTES = 2**20
"""How much of a log is read in one look."""

_TIDY_SECONDS = 60.0
"""How long to try to tidy up after Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a device gave.

    Attributes:
        document: Its results.json, with `environment.remote`.
        files: Names of the files that came home.
    """

    document: dict[str, Any]
    files: tuple[str, ...]


async def check(device: Device, work: Work, tell: Tell) -> Report:
    """Look whether a device can do a work, without changing anything there.

    Raises:
        GnetOptError: The device cannot be reached or asked, or an input cannot be read.
    """
    parcel = await asyncio.to_thread(Parcel.pack, work)
    session = Session(device, tell)
    try:
        return await _look(session, device, work, parcel)
    finally:
        session.close()


async def run(device: Device, work: Work, out: Path | None, tell: Tell) -> Outcome:
    """Do a work on a device.

    Args:
        device: The device.
        work: What to run; it has to leave `RESULTS` in `OUT`.
        out: The folder that gets the results, replaced if it exists; None to only return them.
        tell: Called with a few words whenever there is something new.

    Raises:
        RemoteError: The device is unfit or cannot be reached.
        IntegrityError: What came home is not what the device wrote.
        GnetOptError: What the job itself failed with, in the device's words.
        ConfigError: The same work is under way already, or an input cannot be read.
    """
    parcel = await asyncio.to_thread(Parcel.pack, work)
    record = Record(path=remote_runs() / f"{_key(device, parcel)}.json")
    with record.alone(device.address.place):
        job = _Job(device=device, work=work, parcel=parcel, record=record, tell=tell)
        try:
            return await job.run(out)
        except UnreachableError:
            raise
        except (asyncio.CancelledError, GnetOptError):
            tell("tidying up")
            await job.tidy()
            raise
        finally:
            job.session.close()


def _key(device: Device, parcel: Parcel) -> str:
    address = device.address
    return sha256_text(
        dump_json(
            [address.host, address.user, address.port, device.python, device.workdir, parcel.key]
        )
    )


async def _look(session: Session, device: Device, work: Work, parcel: Parcel) -> Report:
    async def probe(connection: Connection) -> Any:
        return await connection.ask("probe", device.workdir, *preflight.MODULES)

    facts = Facts.from_dict(await session.do(probe))
    return preflight.judge(facts, _needs(device, work, parcel))


def _needs(device: Device, work: Work, parcel: Parcel) -> Needs:
    return Needs(
        python=device.python, workdir=device.workdir, bytes=parcel.size, backends=work.backends
    )


class _Job:
    """One run of a work on a device."""

    def __init__(
        self, *, device: Device, work: Work, parcel: Parcel, record: Record, tell: Tell
    ) -> None:
        self.device = device
        self.work = work
        self.parcel = parcel
        self.record = record
        self.tell = tell
        self.session = Session(device, tell)

    async def run(self, out: Path | None) -> Outcome:
        folder, report, phase = await self._resume() or await self._begin()
        if phase == "waiting":
            await self._copy(folder)
            started = await self._ask("start", folder)
            phase = started["phase"]
        if phase == "running":
            phase = await self._follow(folder)
        collected = await self._ask("collect", folder)
        self._raise_if_failed(phase, collected)
        outcome = await self._bring_home(folder, report, collected, out)
        await self.tidy()
        return outcome

    async def tidy(self) -> None:
        """End what runs on the device and remove what we left there."""
        known = self.record.load()
        if known is None:
            return
        try:
            await asyncio.wait_for(self._ask("remove", known["folder"]), _TIDY_SECONDS)
        except (GnetOptError, asyncio.TimeoutError, asyncio.CancelledError) as error:
            self.tell(
                f"{known['folder']} could not be removed from the device "
                f"({str(error) or 'no answer'}). Run the same command again to go on with it, or "
                "remove it by hand."
            )
            if isinstance(error, asyncio.CancelledError):  # Ctrl-C once more
                raise
            # The results, or the first failure, are worth more than this one.
            return
        self.record.delete()

    async def _ask(self, command: str, folder: str) -> Any:
        async def ask(connection: Connection) -> Any:
            return await connection.ask(command, folder)

        return await self.session.do(ask)

    async def _resume(self) -> tuple[str, Report, str] | None:
        """The folder of an earlier command that was killed, and how far it came."""
        known = self.record.load()
        if known is None:
            return None
        folder = str(known["folder"])
        phase = str((await self._ask("status", folder))["phase"])
        if phase == "absent":
            self.record.delete()
            return None
        self.tell(f"going on with an earlier run ({phase})")
        needs = _needs(self.device, self.work, self.parcel)
        # As it was before the run: now it is busy with it.
        return folder, preflight.judge(Facts.from_dict(known["facts"]), needs), phase

    async def _begin(self) -> tuple[str, Report, str]:
        self.tell("looking at the device")
        report = await _look(self.session, self.device, self.work, self.parcel)
        if (error := report.why_unfit(self.device.address.place)) is not None:
            raise error
        folder = f"{report.facts.workdir}/gnet-opt-{secrets.token_hex(16)}"
        # First the record: whatever happens from now on, the folder is known.
        self.record.save(folder, report.facts.to_dict())

        async def make(connection: Connection) -> None:
            await connection.make_folder(folder)

        await self.session.do(make)
        return folder, report, "waiting"

    async def _copy(self, folder: str) -> None:
        """Copy what is not there yet; what arrives is read back and compared by the device."""

        async def describe(connection: Connection) -> None:
            await connection.write(f"{folder}/{PARCEL}", self.parcel.description.encode())

        await self.session.do(describe)
        absent = await self._ask("missing", folder)
        for index, path in enumerate(absent):
            self.tell(f"copying {index + 1}/{len(absent)}")

            content = await asyncio.to_thread(self.parcel.content, path)

            async def write(
                connection: Connection, path: str = path, content: bytes = content
            ) -> None:
                await connection.write(f"{folder}/{path}", content)

            await self.session.do(write)
        if absent and (wrong := await self._ask("missing", folder)):
            raise IntegrityError(
                f"{self.device.address.place}: {wrong[0]} is not there as it was sent, or was "
                "changed here meanwhile. Run the command again."
            )

    async def _follow(self, folder: str) -> str:
        """Wait for the end of the job, and tell what it says."""
        pid = (await self._ask("status", folder))["pid"]
        seen = 0
        self.tell("running")
        while True:

            async def look(connection: Connection, seen: int = seen) -> tuple[bool, bytes, bool]:
                ended = await connection.exists(f"{folder}/ended.json")
                log = await connection.read(f"{folder}/log", seen, _LOG_BYTES) or b""
                alive = ended or await connection.exists(f"/proc/{pid}")
                return ended, log, alive

            ended, log, alive = await self.session.do(look)
            if ended:
                return "ended"
            if not alive:
                return str((await self._ask("status", folder))["phase"])
            seen += len(log)
            if text := log.decode("utf-8", "replace").strip():
                self.tell(text.splitlines()[-1])
            await asyncio.sleep(POLL_SECONDS)

    def _raise_if_failed(self, phase: str, collected: Mapping[str, Any]) -> None:
        place = self.device.address.place
        log = self.parcel.as_typed(str(collected["log"])).strip()
        ended = collected["ended"]
        if ended is None:
            raise RemoteError(
                f"{place}: the run is gone without a result ({phase}). Was the device started "
                "anew, or does its system end a user's programs when the connection closes "
                f"(KillUserProcesses in logind.conf)? The last it said is: {_tail(log)}"
            )
        if ended["error"]:
            raise RemoteError(f"{place}: the job could not be started: {ended['error']}")
        code = int(ended["code"])
        if code < 0:
            raise RemoteError(
                f"{place}: the run was killed there by signal {-code}. Signal 9 mostly means that "
                f"memory ran out (sudo dmesg tells). The last it said is: {_tail(log)}"
            )
        if code:
            kinds = {kind.exit_code: kind for kind in GnetOptError.__subclasses__()}
            # What it says at last; before that the log tells of progress.
            message = log.rpartition("gnet-opt: ")[2] if "gnet-opt: " in log else _tail(log)
            raise kinds.get(code, RemoteError)(f"On {place} (exit code {code}): {message}")
        if RESULTS not in collected["files"]:
            raise RemoteError(f"{place}: the job ended well and left no {RESULTS}.")

    async def _bring_home(
        self, folder: str, report: Report, collected: Mapping[str, Any], out: Path | None
    ) -> Outcome:
        self.tell("bringing the results home")
        files: Mapping[str, Mapping[str, Any]] = collected["files"]
        left = LARGEST
        with staging_directory(out or self.record.path) as staging:
            for path, known in files.items():
                local = _inside(staging, path)

                # One byte more than it may have shows that there are more; what the device says of
                # the size is not relied on.
                async def read(
                    connection: Connection, path: str = path, most: int = left + 1
                ) -> bytes | None:
                    return await connection.read(f"{folder}/{OUT}/{path}", most=most)

                content = await self.session.do(read)
                left -= len(content or b"")
                if left < 0:
                    raise RemoteError(
                        f"{self.device.address.place}: the result files, {path} among them, have "
                        f"more than {LARGEST // 2**20} MiB. Measure less in one run, or look at "
                        "the device: this is not what the command writes."
                    )
                if content is None or hashlib.sha256(content).hexdigest() != known["sha256"]:
                    raise IntegrityError(
                        f"{self.device.address.place}: {path} did not arrive as it was written "
                        "(its SHA-256 differs). Run the command again."
                    )
                try:
                    local.parent.mkdir(parents=True, exist_ok=True)
                    local.write_bytes(content)
                except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
                    raise IntegrityError(
                        f"{self.device.address.place} names {path!r} as a file and as a folder. "
                        "Look at the device, and run the command again."
                    ) from error
            document = self._annotated(staging / RESULTS, report, str(files[RESULTS]["sha256"]))
            write_text(staging / RESULTS, dump_json(document))
            for name, text in self.work.shown(document).items():
                write_text(staging / name, text)
            if out is not None:
                publish(staging, out)
        return Outcome(document=document, files=tuple(sorted(files)))

    def _annotated(self, path: Path, report: Report, digest: str) -> dict[str, Any]:
        facts = report.facts
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            environment = document.setdefault("environment", {})
            environment["remote"] = {
                "board": facts.board,
                "host": self.device.address.place,
                "name": self.device.name,
                "notes": list(report.notes),
                "power_mode": facts.power_mode,
                "python": ".".join(map(str, facts.python)),
                "reconnections": self.session.losses,
                "results_sha256": digest,
            }
        except (ValueError, AttributeError, TypeError) as error:
            raise IntegrityError(
                f"{self.device.address.place}: its {RESULTS} is not a result file ({error})."
            ) from error
        return dict(document)


def _inside(root: Path, path: str) -> Path:
    """A path that the device named, which must not lead out of our folder."""
    parts = path.split("/")
    if {"", ".", ".."} & set(parts) or "\\" in path or "\0" in path:
        raise IntegrityError(
            f"The device names a result file {path!r}, which is no name of a file in the folder of "
            "the results. Look at the device, and run the command again."
        )
    return root / path


def _tail(log: str) -> str:
    return " | ".join(log.splitlines()[-5:])[-800:] or "nothing"
