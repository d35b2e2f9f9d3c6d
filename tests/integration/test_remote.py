"""Running on a device over SSH: against a real server on the loopback interface."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import content, marked
from sshd import CONFIG, Sshd, make_key, running

from gnet_opt import __version__
from gnet_opt.errors import BackendError, ConfigError, GnetOptError, IntegrityError, RemoteError
from gnet_opt.files import sha256_file
from gnet_opt.paths import remote_runs
from gnet_opt.remote import OUT, Address, Device, Outcome, Result, Work, check, job, read_fleet, run
from gnet_opt.remote import connection as connections
from gnet_opt.remote import device as program
from gnet_opt.remote import session as sessions
from signals import interruptible

HOSTILE = "a 'b' \"c\" $(touch hacked) ;&*é"

JOB = """\
import json, os, pathlib, sys, time
from importlib.metadata import version
import gnet_opt

runs, mode, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
out = sys.argv[sys.argv.index("-o") + 1]
with open(runs, "a") as stream:
    stream.write(f"{os.getpid()}\\n")
if mode == "fail":
    print("Rounds 1/2\\ngnet-opt: model.xml cannot be read.", file=sys.stderr)
    sys.exit(7)
if mode == "die":
    os.kill(os.getpid(), 9)
end, step = time.monotonic() + seconds, 0
while time.monotonic() < end:
    step += 1
    print(f"Rounds {step}", file=sys.stderr, flush=True)
    time.sleep(0.1)
out = pathlib.Path(out)
(out / "more").mkdir(parents=True)
(out / "more" / "results.csv").write_text("a,b\\n")
if mode == "nothing":
    sys.exit(0)
(out / "results.json").write_text(json.dumps({
    "arguments": sys.argv[2:],
    "environment": {"machine": "here"},
    "inputs": {str(p): p.read_text() for p in pathlib.Path("inputs").rglob("*") if p.is_file()},
    "package": gnet_opt.__file__,
    "telemetry_off": os.environ["ORT_DISABLE_TELEMETRY"],
    "temporary": os.environ["TMPDIR"],
    "version": version("gnet-opt"),
}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running(tmp_path_factory.mktemp("sshd")) as made:
        yield made


@pytest.fixture
def device(server: Sshd) -> Iterator[Device]:
    yield Device(
        name="board",
        address=Address.parse(server.url),
        identity=server.identity,
        known_hosts=server.known_hosts,
        python=sys.executable,
        workdir=str(server.work),
    )
    assert not list(server.work.iterdir()), "the device is not as it was"
    assert not list(server.home.iterdir()), "the device is not as it was"
    assert not list(remote_runs().glob("*")), "something is kept of a run that is over"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses: what is waited for here comes at once."""
    monkeypatch.setattr(sessions, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(job, "POLL_SECONDS", 0.1)


@pytest.fixture
def work(tmp_path: Path) -> Callable[..., Work]:
    """A work that takes a while and leaves results; it notes each time that it is started."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    folder = tmp_path / HOSTILE
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / HOSTILE).write_text("content")

    def made(mode: str = "good", seconds: float = 0.0) -> Work:
        words = (script, str(tmp_path / "runs"), mode, str(seconds), HOSTILE, "", "--x=$HOME")
        return Work(command=(*words, folder, "-o", OUT))

    return made


class Told(list[str]):
    """What was told, in order; each text may set something off, once."""

    def __init__(self, **actions: Callable[[], object]) -> None:
        super().__init__()
        self.actions = actions

    def __call__(self, device: Device, text: str) -> None:
        self.append(text)
        for name in [name for name in self.actions if text.lower().startswith(name)]:
            self.actions.pop(name)()


def only(results: list[Result[Outcome]]) -> Outcome:
    (result,) = results
    if result.error is not None:
        raise result.error
    assert result.value is not None
    return result.value


def starts(tmp_path: Path) -> int:
    path = tmp_path / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_the_results_come_home_and_the_device_is_as_it_was(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    told = Told()
    outcome = only(run([device], work(), tmp_path / "out", told))
    document = outcome.document
    assert sorted(content(tmp_path / "out" / "board")) == [
        "more",
        "more/results.csv",
        "results.json",
    ]
    assert json.loads((tmp_path / "out" / "board" / "results.json").read_text()) == document
    assert outcome.files == ("more/results.csv", "results.json")
    # It ran our own copy of gnet-opt, in a folder of ours, with every word as it was.
    folder = Path(document["package"]).parents[2]
    assert folder.parent == server.work
    assert document["package"] == str(folder / "package" / "gnet_opt" / "__init__.py")
    assert document["telemetry_off"] == "1"  # nothing of our environment comes along
    assert document["temporary"] == str(folder / "tmp")
    assert document["version"] == __version__
    place = f"inputs/7/{HOSTILE}"
    words = ["good", "0.0", HOSTILE, "", "--x=$HOME", place, "-o", "out"]
    assert document["arguments"] == words
    assert document["inputs"][f"{place}/deep/{HOSTILE}"] == "content"
    assert document["environment"]["machine"] == "here"
    remote = document["environment"]["remote"]
    assert remote["host"] == f"127.0.0.1:{server.port}"
    assert remote["python"] == ".".join(map(str, sys.version_info[:3]))
    assert remote["reconnections"] == 0
    assert len(remote["results_sha256"]) == 64
    assert starts(tmp_path) == 1
    assert told[0] == "looking at the device"
    assert told[-1] == "bringing the results home"
    assert not list(Path.cwd().glob("hacked")) and not list(server.home.glob("hacked"))


def test_results_may_be_only_returned(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    before = content(tmp_path)
    assert only(run([device], work(), None, Told())).document["version"] == __version__
    assert sorted(set(content(tmp_path)) - set(before)) == ["runs"]


@pytest.mark.parametrize("moment", ["looking", "copying", "running", "rounds 3", "bringing"])
def test_cutting_the_connection_loses_nothing(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path, moment: str
) -> None:
    cuts: list[int] = []
    told = Told(**{moment: lambda: cuts.append(server.cut())})
    document = only(run([device], work(seconds=1.0), tmp_path / "out", told)).document
    # Before the first connection there is none to cut.
    assert (cuts[0] > 0) == (moment != "looking")
    assert document["environment"]["remote"]["reconnections"] == len([n for n in cuts if n])
    assert ("connected again" in told) == (moment != "looking")
    assert starts(tmp_path) == 1


def test_cutting_it_again_and_again_loses_nothing(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    cuts: list[int] = []
    moments = ("copying 2", "copying 4", "running", "rounds 3", "connected again", "bringing")
    told = Told(**{moment: lambda: cuts.append(server.cut()) for moment in moments})
    document = only(run([device], work(seconds=3.0), tmp_path / "out", told)).document
    assert len(cuts) == len(moments) and all(cuts)
    assert document["environment"]["remote"]["reconnections"] == len(moments)
    assert starts(tmp_path) == 1


def test_a_connection_that_falls_silent_is_noticed(
    server: Sshd,
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "_KEEPALIVE_SECONDS", 0.3)
    frozen: list[int] = []
    told = Told(rounds=lambda: frozen.extend(server.freeze()))
    try:
        document = only(run([device], work(seconds=1.0), tmp_path / "out", told)).document
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGKILL)
    assert frozen
    assert document["environment"]["remote"]["reconnections"] == 1
    assert starts(tmp_path) == 1


def test_a_server_that_is_away_for_a_while_is_waited_for(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    def restart() -> None:
        server.stop()
        threading.Timer(1.0, server.start).start()

    told = Told(rounds=restart)
    document = only(run([device], work(seconds=0.5), tmp_path / "out", told)).document
    assert document["environment"]["remote"]["reconnections"] == 1
    assert len([text for text in told if text.startswith("connection lost")]) > 1
    assert starts(tmp_path) == 1


KILLED = """
import os, signal, sys
from pathlib import Path, PurePosixPath
from gnet_opt.remote import OUT, Address, Device, Work, run
from gnet_opt.remote import job

job.POLL_SECONDS = 0.1
moment, number, *rest = sys.argv[1:]
url, identity, known_hosts, python, workdir, script, runs, folder, seconds, words = rest
device = Device(name="board", address=Address.parse(url), identity=Path(identity),
                known_hosts=Path(known_hosts), python=python, workdir=workdir)
words = (Path(script), runs, "good", seconds, *words.split("|"), Path(folder), "-o", OUT)

def tell(device, text):
    if text.lower().startswith(moment):
        os.kill(os.getpid(), int(number))

run([device], Work(command=words), Path(folder).parent / "killed out", tell)
"""


def start_and_kill(
    device: Device, work: Work, tmp_path: Path, moment: str, number: int
) -> subprocess.CompletedProcess[str]:
    """Do a work in another process that sends itself a signal when it tells of `moment`."""
    script, runs, _, seconds, *words, folder, _, _ = (str(word) for word in work.command)
    address = f"ssh://{device.address.user}@{device.address.place}"
    places = [address, str(device.identity), str(device.known_hosts), device.python, device.workdir]
    told = [script, runs, folder, seconds, "|".join(words)]
    with interruptible():
        return subprocess.run(
            [sys.executable, "-c", KILLED, moment, str(int(number)), *places, *told],
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.mark.parametrize("moment", ["copying", "rounds", "bringing"])
def test_a_killed_command_goes_on_where_it_was(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path, moment: str
) -> None:
    slow = work(seconds=2.0)
    killed = start_and_kill(device, slow, tmp_path, moment, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = server.work.iterdir()
    assert list(remote_runs().glob("*.json"))
    told = Told()
    document = only(run([device], slow, tmp_path / "out", told)).document
    assert told[0].startswith("going on with an earlier run")
    assert Path(document["temporary"]).parent == folder
    assert starts(tmp_path) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_command_ends_the_job_and_tidies_up(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path, number: int
) -> None:
    stopped = start_and_kill(device, work(seconds=60.0), tmp_path, "rounds", number)
    assert stopped.returncode not in (0, -signal.SIGKILL)
    assert "KeyboardInterrupt" in stopped.stderr
    assert starts(tmp_path) == 1
    assert not marked(program.MARK)  # and the fixture sees to the folders


def test_a_folder_that_is_gone_is_made_anew(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    slow = work(seconds=1.0)
    start_and_kill(device, slow, tmp_path, "rounds", signal.SIGKILL)
    (folder,) = server.work.iterdir()
    program.remove(str(folder))
    told = Told()
    only(run([device], slow, tmp_path / "out", told))
    assert "looking at the device" in told
    assert starts(tmp_path) == 2


def test_the_same_work_is_not_done_twice_at_once(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    seen: list[GnetOptError | None] = []

    def again() -> None:
        # Another thread: this one has a running event loop.
        thread = threading.Thread(
            target=lambda: seen.extend(
                result.error for result in run([device], work(seconds=1.0), None, Told())
            )
        )
        thread.start()
        thread.join()

    only(run([device], work(seconds=1.0), None, Told(rounds=again)))
    (error,) = seen
    assert isinstance(error, ConfigError)
    assert "under way in another process" in str(error)
    assert starts(tmp_path) == 1


def test_a_job_that_is_gone_is_told_with_its_last_words(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    def kill() -> None:
        (folder,) = server.work.iterdir()
        for pid in program._marked(str(folder)):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(RemoteError, match=r"gone without a result \(lost\).*Rounds") as caught:
        only(run([device], work(seconds=60.0), tmp_path / "out", Told(**{"rounds 3": kill})))
    assert caught.value.exit_code == 9
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mode", "kind", "words"),
    [
        ("fail", BackendError, r"On 127\.0\.0\.1:\d+ \(exit code 7\): model\.xml cannot be read\."),
        ("die", RemoteError, "killed there by signal 9.*memory ran out"),
        ("nothing", RemoteError, r"left no results\.json"),
    ],
)
def test_a_job_that_fails_fails_here_in_the_same_way(
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    mode: str,
    kind: type[GnetOptError],
    words: str,
) -> None:
    with pytest.raises(kind, match=words) as caught:
        only(run([device], work(mode), tmp_path / "out", Told()))
    assert type(caught.value) is kind
    assert not (tmp_path / "out").exists()


def test_an_unknown_host_key_is_refused(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    nobody = tmp_path / "known"
    nobody.write_text("")
    with pytest.raises(RemoteError) as caught:
        only(run([replace(device, known_hosts=nobody)], work(), None, Told()))
    text = str(caught.value)
    assert f"The host key of 127.0.0.1:{server.port} is not in {nobody}" in text
    assert f"ssh-keyscan -p {server.port} 127.0.0.1 >> {nobody}" in text


def test_another_host_key_is_refused(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    make_key(tmp_path / "other")
    kind, key = (tmp_path / "other.pub").read_text().split()[:2]
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{server.port} {kind} {key}\n")
    with pytest.raises(RemoteError, match=r"shows another host key than the one in .* Nothing was"):
        only(run([replace(device, known_hosts=known)], work(), None, Told()))


def test_a_configuration_that_checks_no_host_keys_is_refused(
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / ".ssh" / "config"
    config.parent.mkdir()
    config.write_text("Host *\n  UserKnownHostsFile none\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="switches the check of host keys off"):
        only(run([replace(device, known_hosts=None)], work(), None, Told()))


def test_aliases_of_the_ssh_configuration_work(
    server: Sshd,
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tmp_path / ".ssh" / "config"
    config.parent.mkdir()
    config.write_text(
        f"Host My-Board\n  HostName 127.0.0.1\n  Port {server.port}\n  User {device.address.user}\n"
        f"  IdentityFile {server.identity}\n  UserKnownHostsFile {server.known_hosts}\n"
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    alias = replace(
        device, address=Address.parse("ssh://My-Board"), identity=None, known_hosts=None
    )
    document = only(run([alias], work(), None, Told())).document
    assert document["environment"]["remote"]["host"] == "My-Board"


def test_a_key_that_is_not_known_there_is_refused(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    make_key(tmp_path / "other")
    with pytest.raises(
        RemoteError, match=r"does not let the account .* in with any key.*ssh-copy-id"
    ):
        only(run([replace(device, identity=tmp_path / "other")], work(), None, Told()))


def test_a_key_with_a_passphrase_is_used_through_the_agent(
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert device.identity is not None
    locked = tmp_path / "locked"
    shutil.copy(device.identity, locked)
    locked.chmod(0o600)
    shutil.copy(f"{device.identity}.pub", f"{locked}.pub")
    change = ["ssh-keygen", "-q", "-p", "-P", "", "-N", "a phrase", "-f", str(locked)]
    subprocess.run(change, check=True, stdout=subprocess.DEVNULL)
    there = replace(device, identity=locked)
    with pytest.raises(RemoteError, match=r"passphrase has to be in the agent: ssh-add FILE"):
        only(run([there], work(), None, Told()))
    socket = tmp_path / "agent"
    with subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL
    ) as process:
        try:
            while not socket.exists():
                time.sleep(0.02)
            monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
            subprocess.run(["ssh-add", "-q", str(device.identity)], check=True)
            assert only(run([there], work(), None, Told())).document["version"] == __version__
        finally:
            process.kill()


def test_a_key_that_is_no_key_is_refused(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("no key\n")
    with pytest.raises(ConfigError, match="key cannot be used"):
        only(run([replace(device, identity=tmp_path / "key")], work(), None, Told()))


def test_a_server_without_file_transfer(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    plain = "".join(line for line in CONFIG.splitlines(True) if not line.startswith("Subsystem"))
    with running(tmp_path / "sshd", plain) as other:
        there = replace(
            device,
            address=Address.parse(other.url),
            identity=other.identity,
            known_hosts=other.known_hosts,
        )
        with pytest.raises(RemoteError, match=r"no file transfer \(SFTP\).*openssh-sftp-server"):
            only(run([there], work(), None, Told()))


def test_a_device_that_is_not_there(
    device: Device, work: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = replace(device, address=replace(device.address, port=1))
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:1 cannot be reached: .*switched on"):
        only(run([nobody], work(), None, Told()))
    assert time.monotonic() - began < sessions.PATIENCE / 10


def test_no_python(device: Device, work: Callable[..., Work]) -> None:
    with pytest.raises(RemoteError, match=r"there is no Python to run as '/no/python'.*--python"):
        only(run([replace(device, python="/no/python")], work(), None, Told()))


def test_all_that_is_missing_is_told_at_once(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = tmp_path / "bare" / "bin" / "python"
    unfit = replace(device, python=str(bare), workdir="/no/such/folder")
    needy = Work(command=work().command, backends=("openvino", "tensorrt-rtx", "somebody's"))
    with pytest.raises(RemoteError) as caught:
        only(run([unfit], needy, tmp_path / "out", Told()))
    first, *problems = str(caught.value).splitlines()
    assert first.endswith("nothing was copied to it, and nothing changed there:")
    assert problems == [
        "  - /no/such/folder is not a folder that can be written. Name one with --workdir.",
        "  - pillow, click, numpy, rich, threadpoolctl, openvino, tensorrt-rtx are not installed "
        f"for {bare} there. Run there, if you want it: {bare} -m pip install pillow click numpy "
        "rich threadpoolctl openvino tensorrt-rtx",
    ]


def test_check_changes_nothing(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    told = Told()
    (result,) = check([device], work(), told)
    assert result.value is not None
    assert result.value.problems == ()
    facts = result.value.facts
    assert facts.workdir == str(server.work)
    assert facts.python == list(sys.version_info[:3])
    assert facts.modules["numpy"]
    assert facts.memory_available and facts.disk_free and facts.cpus
    assert starts(tmp_path) == 0


def test_what_arrives_changed_is_not_used(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    def change() -> None:
        (tmp_path / HOSTILE / "deep" / HOSTILE).write_text("changed while it was copied")

    with pytest.raises(IntegrityError, match="is not there as it was sent"):
        only(run([device], work(), tmp_path / "out", Told(copying=change)))
    assert starts(tmp_path) == 0


def test_what_is_gone_while_it_is_copied_is_told(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    gone = (tmp_path / HOSTILE / "deep" / HOSTILE).unlink
    with pytest.raises(IntegrityError, match="cannot be read any more"):
        only(run([device], work(), tmp_path / "out", Told(copying=gone)))
    assert starts(tmp_path) == 0


def test_results_that_change_on_their_way_are_not_used(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    def change() -> None:
        (path,) = server.work.glob("*/out/results.json")
        path.write_text("{}")

    with pytest.raises(IntegrityError, match="did not arrive as it was written"):
        only(run([device], work(), tmp_path / "out", Told(bringing=change)))
    assert not list((tmp_path / "out").iterdir())


def test_results_without_end_are_not_read(
    server: Sshd,
    device: Device,
    work: Callable[..., Work],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(job, "LARGEST", 100)
    asked: list[int] = []
    real = connections.Connection.read

    async def read(
        self: connections.Connection, path: str, offset: int = 0, most: int = -1
    ) -> bytes | None:
        asked.append(most)
        return await real(self, path, offset, most)

    monkeypatch.setattr(connections.Connection, "read", read)
    with pytest.raises(RemoteError, match="have more than 0 MiB"):
        only(run([device], work(), tmp_path / "out", Told()))
    assert all(0 < most <= 2**20 for most in asked), "something is read without a limit"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("path", ["", ".", "a/./b", "a//b", "/a", "../a", "a/..", "a\\b", "a\0b"])
def test_a_result_is_a_file_in_the_folder(path: str, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is no name of a file in the folder"):
        job._inside(tmp_path, path)


def test_a_fleet_goes_on_without_those_that_fail(
    server: Sshd, device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    fleet = tmp_path / "devices.toml"
    keys = os.path.relpath(server.root, tmp_path)
    fleet.write_text(
        f'[[device]]\nname = "one"\nurl = "{server.url}"\nthreads = 2\n'
        f'[[device]]\nname = "away"\nurl = "ssh://127.0.0.1:1"\n'
        f'[[device]]\nname = "two"\nurl = "{server.url}"\nidentity = "{keys}/key"\n'
    )
    names: list[tuple[str, str]] = []
    results = run(
        read_fleet(fleet, device),
        work(seconds=0.5),
        tmp_path / "out",
        lambda who, text: names.append((who.name, text)),
    )
    assert [(result.device.name, result.error is None) for result in results] == [
        ("one", True),
        ("away", False),
        ("two", True),
    ]
    assert isinstance(results[1].error, RemoteError)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one", "two"]
    documents: list[Any] = [result.value and result.value.document for result in results]
    assert documents[0]["environment"]["remote"]["name"] == "one"
    assert documents[0]["arguments"][-2:] == ["--threads", "2"]
    assert documents[2]["arguments"][-2:] == ["-o", "out"]
    assert documents[2]["environment"]["remote"]["name"] == "two"
    assert starts(tmp_path) == 2
    # They ran at the same time, each with lines of its own.
    first_end = min(names.index((name, "bringing the results home")) for name in ("one", "two"))
    assert {name for name, text in names[:first_end] if text == "running"} == {"one", "two"}


def test_results_are_replaced_whole(
    device: Device, work: Callable[..., Work], tmp_path: Path
) -> None:
    old = tmp_path / "out" / "board"
    old.mkdir(parents=True)
    (old / "older").write_text("")
    only(run([device], work(), tmp_path / "out", Told()))
    assert sorted(path.name for path in old.iterdir()) == ["more", "results.json"]
    digest = json.loads((old / "results.json").read_text())["environment"]["remote"]
    assert digest["results_sha256"] != sha256_file(old / "results.json")  # it was annotated here
