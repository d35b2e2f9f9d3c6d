"""One SSH connection: the boundary at which asyncssh's errors become ours.

There are two kinds of failure. `Lost` says that the connection is gone, and the same may be tried
again over another; a `RemoteError` says that trying again would not help. Host keys are always
checked, and nothing ever asks for a password.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnet_opt.errors import ConfigError, RemoteError, require
from gnet_opt.remote.address import Device

if TYPE_CHECKING:
    import asyncssh

CONNECT_SECONDS = 20.0
"""How long a device may take to answer, and how long logging in may take."""

_KEEPALIVE_SECONDS = 5.0
_KEEPALIVE_COUNT = 3
"""A connection that answered none of so many questions in a row is lost."""


class Lost(Exception):  # noqa: N818 - it is no failure: whoever catches it connects again
    """The connection is gone, or could not be made this time."""


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command on the device gave.

    Attributes:
        code: Its exit status; -N where signal N killed it, as far as is known.
        out: Its output.
        err: Its error output.
    """

    code: int
    out: str
    err: str


class Connection:
    """A connection to a device, with file transfer; made by `connect`."""

    def __init__(
        self, device: Device, ssh: asyncssh.SSHClientConnection, sftp: asyncssh.SFTPClient
    ) -> None:
        self._device = device
        self._ssh = ssh
        self._sftp = sftp

    def close(self) -> None:
        """End the connection at once."""
        self._ssh.abort()

    async def run(self, *words: str, given: str = "") -> Ran:
        """Run a command.

        Args:
            words: The command and its arguments; the device's shell sees each as one word.
            given: Its input.

        Raises:
            Lost: The connection broke before the command ended.
        """
        with _boundary(self._device):
            done = await self._ssh.run(
                shlex.join(words),
                input=given,
                encoding="utf-8",
                errors="replace",
                request_pty=False,
            )
        if done.exit_status is None and done.exit_signal is None:
            raise Lost("it was cut while a command ran")
        code = -1 if done.exit_status is None else done.exit_status
        return Ran(code=code, out=str(done.stdout or ""), err=str(done.stderr or ""))

    async def ask(self, command: str, *arguments: str) -> Any:
        """Run a command of `gnet_opt.remote.device` there; nothing is written for it.

        Raises:
            Lost: The connection broke.
            RemoteError: It failed.
        """
        done = await self.run(*self._python(), "-", command, *arguments, given=device_program())
        if done.code == 0:
            try:
                return json.loads(done.out.splitlines()[-1])
            except (IndexError, ValueError):
                pass  # told below, with what was printed instead
        where = self._device.address.place
        if done.code in (126, 127):
            raise RemoteError(
                f"{where}: there is no Python to run as {self._device.python!r}. Name one with "
                "--python PATH, or install it there, on Debian and Ubuntu: sudo apt install python3"
            )
        words = (done.err.strip() or done.out.strip() or "nothing").splitlines()
        raise RemoteError(
            f"{where}: the step {command!r} failed with exit code {done.code}; the last it printed "
            f"is: {words[-1]}. Python 3.10 or later is needed there; --python PATH names one."
        )

    def _python(self) -> tuple[str, ...]:
        return ("env", "PYTHONDONTWRITEBYTECODE=1", self._device.python, "-B")

    async def make_folder(self, path: str) -> None:
        """Make a folder that only its owner may enter; one of ours may be there already.

        Raises:
            Lost: The connection broke.
            RemoteError: It cannot be made.
        """
        made = await self.run("mkdir", "-m", "700", "--", path)
        if made.code == 0 or (await self.run("test", "-O", path)).code == 0:
            return
        raise RemoteError(
            f"{self._device.address.place}: the folder {path} cannot be made "
            f"({made.err.strip()}). Choose another place with --workdir."
        )

    async def write(self, path: str, content: bytes) -> None:
        """Write a file on the device.

        Raises:
            Lost: The connection broke.
            RemoteError: The device refused.
        """
        with _boundary(self._device, path):
            async with self._sftp.open(path, "wb") as stream:
                await stream.write(content)

    async def read(self, path: str, offset: int = 0, most: int = -1) -> bytes | None:
        """The bytes of a file from an offset on, or None where there is no such file.

        Args:
            path: The file.
            offset: The first byte.
            most: How many bytes are read at most; all by default.

        Raises:
            Lost: The connection broke.
            RemoteError: The device refused.
        """
        import asyncssh

        with _boundary(self._device, path):
            try:
                async with self._sftp.open(path, "rb") as stream:
                    found = await stream.read(most, offset)
            except asyncssh.SFTPNoSuchFile:
                return None
        return found.encode() if isinstance(found, str) else found

    async def exists(self, path: str) -> bool:
        """Whether there is such a file or folder.

        Raises:
            Lost: The connection broke.
        """
        with _boundary(self._device, path):
            return bool(await self._sftp.exists(path))


def device_program() -> str:
    """The text of `gnet_opt.remote.device`."""
    return files("gnet_opt.remote").joinpath("device.py").read_text(encoding="utf-8")


async def connect(device: Device) -> Connection:
    """Connect to a device; its host key is checked, and only keys are used to log in.

    Raises:
        MissingDependencyError: asyncssh is not installed.
        ConfigError: The key file or the SSH configuration cannot be used.
        RemoteError: Its host key is unknown or another one, the account is refused, or it has no
            file transfer.
        Lost: It does not answer, or not this time.
    """
    require("asyncssh", "remote", "reach a device")
    import asyncssh

    address = device.address
    options = _options(device)
    with _boundary(device):
        # The host keys are said once more: nothing that is read later can switch their check off.
        connecting = asyncssh.connect(
            address.host, options=options, known_hosts=options.known_hosts
        )
        ssh = await asyncio.wait_for(connecting, CONNECT_SECONDS)
    try:
        with _boundary(device):
            sftp = await asyncio.wait_for(ssh.start_sftp_client(), CONNECT_SECONDS)
    except BaseException as error:
        ssh.abort()
        if isinstance(error.__cause__, asyncssh.ChannelOpenError):
            raise RemoteError(
                f"{address.place}: the SSH server there has no file transfer (SFTP). Install it, "
                "on Debian and Ubuntu: sudo apt install openssh-sftp-server"
            ) from error
        raise
    return Connection(device, ssh, sftp)


def _options(device: Device) -> asyncssh.SSHClientConnectionOptions:
    """asyncssh's options; what is not said here comes from ~/.ssh/config."""
    import asyncssh

    address = device.address
    given: dict[str, Any] = {}
    if address.user:
        given["username"] = address.user
    if address.port is not None:
        given["port"] = address.port
    if device.identity is not None:
        # One with a passphrase is the agent's to use.
        given.update(client_keys=[str(device.identity)], ignore_encrypted=True)
    if device.known_hosts is not None:
        if not device.known_hosts.is_file():
            raise ConfigError(f"--known-hosts {device.known_hosts} is not a file.")
        given["known_hosts"] = str(device.known_hosts)
    try:
        options = asyncssh.SSHClientConnectionOptions(
            host=address.host,
            config=(),  # ~/.ssh/config; without this word none is read
            connect_timeout=CONNECT_SECONDS,
            login_timeout=CONNECT_SECONDS,
            keepalive_interval=_KEEPALIVE_SECONDS,
            keepalive_count_max=_KEEPALIVE_COUNT,
            preferred_auth="gssapi-with-mic,publickey",
            **given,
        )
    except (OSError, ValueError, asyncssh.Error) as error:
        what = device.identity or "~/.ssh/config"
        raise ConfigError(
            f"{address.place}: {what} cannot be used ({error}). Is it readable and whole?"
        ) from error
    if options.known_hosts is None:
        raise ConfigError(
            f"{address.place}: the SSH configuration switches the check of host keys off "
            "(UserKnownHostsFile none). Name a file with --known-hosts."
        )
    return options


@contextlib.contextmanager
def _boundary(device: Device, path: str = "") -> Iterator[None]:
    """Turn asyncssh's errors into `Lost` or a `RemoteError`.

    No file of this machine is touched inside: an OSError here is the network's.
    """
    import asyncssh

    address = device.address
    try:
        yield
    except asyncssh.HostKeyNotVerifiable as error:
        raise RemoteError(_about_host_key(device)) from error
    except asyncssh.PermissionDenied as error:
        user = f"the account {address.user!r}" if address.user else "this account"
        raise RemoteError(
            f"{address.place} does not let {user} in with any key that was offered. Put one there "
            f"with: ssh-copy-id {address.arguments}; or name one with --identity FILE. One with a "
            "passphrase has to be in the agent: ssh-add FILE."
        ) from error
    except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection) as error:
        raise Lost(str(error)) from error
    except asyncssh.SFTPError as error:
        raise RemoteError(
            f"{address.place}: {path} cannot be read or written ({error.reason or error}). Is the "
            "disk full? Choose another place with --workdir."
        ) from error
    except (asyncssh.Error, OSError, EOFError, asyncio.TimeoutError) as error:
        raise Lost(str(error) or type(error).__name__) from error


def _about_host_key(device: Device) -> str:
    import asyncssh

    address = device.address
    options = _options(device)
    known = options.known_hosts
    if isinstance(known, (list, tuple)):
        known = known[0] if known else None
    known = str(known or Path("~/.ssh/known_hosts").expanduser())
    host, port = options.host or address.host, options.port
    try:
        known_before = any(asyncssh.match_known_hosts(known, host, "", port))
    except (OSError, ValueError):
        known_before = False
    if known_before:
        return (
            f"{address.place} shows another host key than the one in {known}. Either the device "
            "was installed anew, or this is another machine. Nothing was sent to it. If you know "
            f"why: ssh-keygen -f {known} -R '[{host}]:{port}', and then "
            f"ssh {address.arguments} once by hand."
        )
    return (
        f"The host key of {address.place} is not in {known}, so nobody can tell whether this is "
        f"the device. Run ssh {address.arguments} once by hand and compare the fingerprint, or: "
        f"ssh-keyscan -p {port} {host} >> {known}"
    )
