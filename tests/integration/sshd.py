"""A real SSH server on the loopback interface, for tests alone: own port, own keys, own home."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
_SECONDS = 20.0

CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {root}/host_key
AuthorizedKeysFile {root}/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
PrintMotd no
Subsystem sftp internal-sftp
SetEnv HOME={root}/home
"""


class Sshd:
    """A server that can be stopped and started, and whose connections can be cut."""

    def __init__(self, root: Path, config: str) -> None:
        self.root = root
        self.home = root / "home"
        self.identity = root / "key"
        self.known_hosts = root / "known_hosts"
        self.work = root / "work"
        self._process: subprocess.Popen[bytes] | None = None
        self.home.mkdir(parents=True)
        self.work.mkdir()
        make_key(self.identity)
        make_key(root / "host_key")
        shutil.copy(root / "key.pub", root / "authorized_keys")
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port = int(found.getsockname()[1])
        (root / "sshd_config").write_text(config.format(port=self.port, root=root))
        kind, key = (root / "host_key.pub").read_text().split()[:2]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}"

    def start(self) -> None:
        if os.getuid() == 0:
            # Where sshd puts its unprivileged part; Debian makes it when the service starts.
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        with (self.root / "sshd.log").open("ab") as log:
            # sshd wants to be called by its full path.
            self._process = subprocess.Popen(
                [program(), "-D", "-e", "-f", str(self.root / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        raise AssertionError((self.root / "sshd.log").read_text())

    def stop(self) -> None:
        """End the server and all its connections."""
        sessions = self.sessions()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        _send(sessions, signal.SIGKILL)

    def cut(self) -> int:
        """Cut all connections; the server goes on. Their number."""
        return _send(self.sessions(), signal.SIGKILL)

    def freeze(self) -> list[int]:
        """Let all connections fall silent, as when a cable is pulled out."""
        sessions = self.sessions()
        _send(sessions, signal.SIGSTOP)
        return sessions

    def sessions(self) -> list[int]:
        """This server's own processes, one or two a connection, but for the one that listens."""
        if self._process is None:
            return []
        return [pid for pid in _below(self._process.pid) if _name(pid).startswith("sshd")]


def _send(processes: list[int], number: int) -> int:
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    return len(processes)


def _below(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            found += [int(child), *_below(int(child))]
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def program() -> str:
    """The full path of sshd; the test is skipped where there is none."""
    pytest.importorskip("asyncssh", reason='asyncssh is missing: pip install "gnet-opt[remote]"')
    found = shutil.which("sshd", path=_PATH)
    if found is None or shutil.which("ssh-keygen") is None:
        pytest.skip("sshd is missing: sudo apt-get install openssh-server")
    return found


def make_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "gnet-opt test", "-f", str(path)],
        check=True,
    )


@contextlib.contextmanager
def running(root: Path, config: str = CONFIG) -> Iterator[Sshd]:
    """A server for one test or several."""
    program()
    server = Sshd(root, config)
    server.start()
    try:
        yield server
    finally:
        server.stop()
