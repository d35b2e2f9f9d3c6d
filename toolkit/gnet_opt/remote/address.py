"""Where a device is: `ssh://user@host:port`, and how to get in."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from gnet_opt.errors import ConfigError

_HOW = "Write ssh://user@host or ssh://user@host:port; an IPv6 address goes in brackets."
# What host names, addresses and the aliases of an SSH configuration are made of. None begins with
# a hyphen, which other programs would take for an option when the user copies a command of ours.
_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]*")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._@\\$-]*")


@dataclass(frozen=True, kw_only=True)
class Address:
    """An SSH address.

    Attributes:
        host: A name, an IP address, or an alias of the SSH configuration.
        user: Whose account; empty for what the SSH configuration says.
        port: The port, or None for what the SSH configuration says.
    """

    host: str
    user: str = ""
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read an address as the user types it.

        Raises:
            ConfigError: It is no SSH URL, or it has a password or a path.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is not an address ({error}). {_HOW}") from error
        if parts.password is not None:
            # The password is not repeated: messages end in log files.
            raise ConfigError(
                "An address must not hold a password: the list of processes and the shell's "
                "history show it. Use a key: ssh-copy-id puts it on the device."
            )
        if parts.scheme != "ssh":
            raise ConfigError(f"{url!r} does not begin with ssh://. {_HOW}")
        if parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} has something after the host. {_HOW}")
        # As it was typed: `hostname` is in lower case, which an alias need not be.
        host = urllib.parse.unquote(re.sub(r":\d*$", "", parts.netloc.rpartition("@")[2]))
        if host.startswith("["):
            host = host[1:-1]
        elif ":" in host:
            raise ConfigError(f"{url!r} is ambiguous. {_HOW}")
        user = urllib.parse.unquote(parts.username or "")
        if not _HOST.fullmatch(host) or (user and not _USER.fullmatch(user)) or port == 0:
            raise ConfigError(f"{url!r} names no host, user or port that can be. {_HOW}")
        return cls(host=host, user=user, port=port)

    @property
    def place(self) -> str:
        """Host and port, for messages and results; the account is nobody else's business."""
        if self.port is None:
            return self.host
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def arguments(self) -> str:
        """The arguments of `ssh` for this address, for a command to copy."""
        port = "" if self.port is None else f"-p {self.port} "
        return f"{port}{self.user}@{self.host}" if self.user else f"{port}{self.host}"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device to run something on.

    Attributes:
        name: What it is called in a fleet; its host otherwise.
        address: Where it is.
        identity: A file with the private key; by default the agent's, those of the SSH
            configuration, and OpenSSH's usual ones.
        known_hosts: A file with host keys; by default OpenSSH's.
        python: The Python to use there, a name or a path.
        workdir: A folder there in which a folder of ours may be made; empty for /var/tmp, or /tmp.
        backend: Who runs the bundles there; empty for the bundles' own backend.
        threads: CPU threads, or None for what is said for all.
    """

    name: str
    address: Address
    identity: Path | None = None
    known_hosts: Path | None = None
    python: str = "python3"
    workdir: str = ""
    backend: str = ""
    threads: int | None = None
