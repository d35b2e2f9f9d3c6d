from __future__ import annotations

from pathlib import Path

import pytest

from gnet_opt.errors import ConfigError
from gnet_opt.remote import Address, Device, Work, read_fleet
from gnet_opt.remote.fleet import own


@pytest.mark.parametrize(
    ("url", "user", "host", "port", "place", "arguments"),
    [
        ("ssh://nano", "", "nano", None, "nano", "nano"),
        ("ssh://Me@Nano.local", "Me", "Nano.local", None, "Nano.local", "Me@Nano.local"),
        ("ssh://me@10.0.0.7:2222/", "me", "10.0.0.7", 2222, "10.0.0.7:2222", "-p 2222 me@10.0.0.7"),
        ("ssh://me@[fe80::1]:22", "me", "fe80::1", 22, "[fe80::1]:22", "-p 22 me@fe80::1"),
        ("ssh://[::1]", "", "::1", None, "::1", "::1"),
        ("ssh://a%40b@host", "a@b", "host", None, "host", "a@b@host"),
    ],
)
def test_addresses(
    url: str, user: str, host: str, port: int | None, place: str, arguments: str
) -> None:
    address = Address.parse(url)
    assert (address.user, address.host, address.port) == (user, host, port)
    assert (address.place, address.arguments) == (place, arguments)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nano",
        "me@nano",
        "http://nano",
        "ssh://",
        "ssh://me@",
        "ssh://nano:port",
        "ssh://nano:0",
        "ssh://nano:65536",
        "ssh://nano/folder",
        "ssh://nano?x=1",
        "ssh://fe80::1",
        "ssh://[fe80::1",
        "ssh://-oProxyCommand=touch",
        "ssh://-l@nano",
        "ssh://me@na no",
        "ssh://me@nano%0Ax",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"Write ssh://user@host or ssh://user@host:port"):
        Address.parse(url)


def test_a_password_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="must not hold a password") as caught:
        Address.parse("ssh://me:hunter2@nano")
    assert "hunter2" not in str(caught.value)


DEFAULTS = Device(name="all", address=Address(host="none"), python="/opt/python", workdir="/data")


def fleet(tmp_path: Path, text: str) -> list[Device]:
    (tmp_path / "devices.toml").write_text(text)
    return read_fleet(tmp_path / "devices.toml", DEFAULTS)


def test_a_fleet_is_read_over_what_holds_for_all(tmp_path: Path) -> None:
    one, two = fleet(
        tmp_path,
        """
        [[device]]
        name = "one"
        url = "ssh://me@nano:22"
        [[device]]
        name = "two"
        url = "ssh://orin"
        identity = "keys/orin"
        known_hosts = "/etc/hosts-of-ours"
        python = "python3.12"
        workdir = "/mnt"
        backend = "onnxruntime"
        threads = 4
        """,
    )
    assert one == Device(
        name="one",
        address=Address(user="me", host="nano", port=22),
        python="/opt/python",
        workdir="/data",
    )
    assert two.identity == tmp_path / "keys" / "orin"
    assert two.known_hosts == Path("/etc/hosts-of-ours")
    assert (two.python, two.workdir, two.backend, two.threads) == (
        "python3.12",
        "/mnt",
        "onnxruntime",
        4,
    )
    work = Work(command=("bench",), backends=("openvino",))
    assert own(one, work) == work
    assert own(two, work) == Work(
        command=("bench", "--backend", "onnxruntime", "--threads", "4"), backends=("onnxruntime",)
    )


GOOD = '[[device]]\nname = "one"\nurl = "ssh://nano"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "devices.toml has no [[device]]."),
        ("device = 3", "devices.toml has no [[device]]."),
        ("device = [3]", "device[0] is not a table."),
        (GOOD + "[other]", "devices.toml has 'other'."),
        ("[[device", "devices.toml cannot be read ("),
        ('[[device]]\nurl = "ssh://nano"', "device[0].name is missing."),
        ('[[device]]\nname = "one"', "device[0].url is missing."),
        (GOOD + GOOD, "device[1].name 'one' is there already."),
        (GOOD + GOOD.replace("one", "ONE"), "device[1].name 'one' is there already."),
        (GOOD.replace("one", "../up"), "device[0].name '../up' cannot name a folder"),
        (GOOD + 'pyhton = "x"', "device[0].pyhton is not known. Known are backend, identity,"),
        (GOOD + 'threads = "2"', "device[0].threads is not a whole number."),
        (GOOD + "threads = true", "device[0].threads is not a whole number."),
        (GOOD + "threads = 0", "device[0].threads is less than 1."),
        (GOOD + "python = 3", "device[0].python is not a text."),
        (GOOD.replace("ssh:", "http:"), "device[0].url: 'http://nano' does not begin with ssh://."),
    ],
)
def test_what_is_wrong_with_a_fleet_is_told_with_its_place(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        fleet(tmp_path, text)
    assert message in str(caught.value)
    assert str(tmp_path / "devices.toml") in str(caught.value)


def test_a_fleet_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_fleet(tmp_path / "none.toml", DEFAULTS)
