"""`gnet-opt sensitivity`: the ranking, its files, and going on after an interruption."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from commands import Done, content, gnet_opt, marked, started
from world import World

from gnet_opt import sensitivity
from gnet_opt.quantization.cache import calibrate
from gnet_opt.target import find

LAYERS = {
    "stem.conv",
    "inception.branch1.conv",
    "inception.branch2.0.conv",
    "inception.branch2.1.conv",
    "inception.branch3.0.conv",
    "inception.branch3.1.conv",
    "inception.branch4.1.conv",
    "fc",
}


def arguments(world: World, *more: str | Path, card: Path | None = None) -> list[str | Path]:
    """The command, on twelve pictures."""
    sets = ["--calibration", world.calibration]
    return ["sensitivity", card or world.small, "-t", "jetson", *sets, *more]


def rank(world: World, *more: str | Path, card: Path | None = None) -> Done:
    return gnet_opt(*arguments(world, *more, card=card))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sensitivity.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking that nothing interrupted; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = rank(world, "-o", out)
    assert done.code == 0, done.err
    return out


def test_a_target_without_int8_is_refused(world: World, tmp_path: Path) -> None:
    sets = ["--calibration", world.calibration]
    done = gnet_opt("sensitivity", world.small, "-t", "jetson-nano", *sets, "-o", tmp_path / "out")
    assert done.code == 2
    assert "The target jetson-nano has no int8" in done.err
    assert list(tmp_path.iterdir()) == []


def test_layers_are_ranked_by_cost(whole: Path) -> None:
    head, *costs = lines(whole)
    assert head["schema"] == "gnet-opt/sensitivity/1"
    assert head["model"] == "small"
    assert head["scheme"] == find("jetson").scheme.to_dict()
    assert head["recipe"]["method"] == "minmax"
    assert head["images"]["images"] == head["calibration"]["images"] == 12
    assert head["semantics"] == "reference"
    assert {cost["name"] for cost in costs} == LAYERS
    noises = [cost["noise"] for cost in costs]
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] > 0.0
    macs = {cost["name"]: cost["macs"] for cost in costs}
    assert macs["fc"] == 32 * 5
    assert macs["stem.conv"] == 8 * 3 * 7 * 7 * 32 * 32
    root = ElementTree.parse(whole / "sensitivity.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert sorted(path.name for path in whole.iterdir()) == ["sensitivity.jsonl", "sensitivity.svg"]


def test_the_ruined_layer_is_the_costliest(world: World, tmp_path: Path) -> None:
    done = rank(world, "-o", tmp_path / "out", "--json", card=world.ruined)
    assert done.code == 0, done.err
    first, second = done.json["costs"][:2]
    assert first["name"] == "fc"
    assert first["sqnr_db"] < 10.0 < 20.0 < second["sqnr_db"]


def test_the_result_for_people_and_for_programs(world: World, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = rank(world, "-o", out)
    assert (done.code, done.err.splitlines()[-1]) == (
        0,
        "8 layers were measured by an earlier run.",
    )
    assert "small for jetson-orin-nano" in done.out
    names = [line.split()[0] for line in done.out.splitlines() if line.split()[:1]]
    assert [name for name in names if name in LAYERS] == [cost["name"] for cost in lines(out)[1:]]
    assert "12 pictures of calibration, reference semantics, one layer in INT8 each." in done.out
    files = [str(out / name) for name in ("sensitivity.jsonl", "sensitivity.svg")]
    assert f"Written: {', '.join(files)}" in done.out
    again = rank(world, "-o", out, "--json", "--quiet")
    assert (again.code, again.err) == (0, "")
    assert again.json == {
        "costs": lines(out)[1:],
        "file": files[0],
        "images": 12,
        "plot": files[1],
        "resumed": 8,
        "semantics": "reference",
        "set": "calibration",
    }
    assert content(out) == content(whole)


@pytest.mark.parametrize("jobs", ["1", "2", "5"])
def test_the_number_of_jobs_does_not_matter(
    world: World, whole: Path, tmp_path: Path, jobs: str
) -> None:
    assert rank(world, "-o", tmp_path / "out", "--jobs", jobs, "--no-cache").code == 0
    assert content(tmp_path / "out") == content(whole)


def test_only_missing_layers_are_measured(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    text = (whole / "sensitivity.jsonl").read_text()
    head, *costs = text.splitlines(keepends=True)
    # As an interruption leaves it: in the order found, the last line half written.
    found = [costs[5], costs[2], costs[0], costs[3][:-10]]
    (out / "sensitivity.jsonl").write_text("".join([head, *found]))
    real = sensitivity._compare
    measured: list[str] = []

    def spy(name: str, *rest: Any) -> Any:
        measured.append(name)
        return real(name, *rest)

    monkeypatch.setattr(sensitivity, "_compare", spy)
    done = rank(world, "-o", out)
    assert done.code == 0, done.err
    assert "3 layers were measured by an earlier run." in done.err
    left = [json.loads(costs[index])["name"] for index in (1, 3, 4, 6, 7)]
    assert sorted(measured) == sorted(left)
    assert content(out) == content(whole)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on(
    world: World, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    command = arguments(world, "-o", out, "--jobs", "2")
    with started(*command, temporary=temporary) as (process, mark):
        deadline = time.monotonic() + 120
        while not (out / "sensitivity.jsonl").exists() or len(lines(out)) < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.pid in marked(mark)
        process.send_signal(number)
        printed, err = process.communicate(timeout=60)
        assert printed == ""
        if number == signal.SIGKILL:
            # Workers end by themselves when nobody asks them any more.
            while marked(mark) and time.monotonic() < deadline:
                time.sleep(0.05)
        else:
            assert process.returncode == 130, err
            last = err.splitlines()[-1]
            assert last == "Interrupted. Nothing half-written was left behind."
            assert [name for name in content(temporary) if "gnet-opt" in name] == []
        assert marked(mark) == []
    before = len(lines(out)) - 1
    assert 2 <= before < 8
    assert [path.name for path in out.iterdir()] == ["sensitivity.jsonl"]
    done = rank(world, "-o", out, "--json")
    assert done.code == 0, done.err
    assert done.json["resumed"] == before
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--method", "mse"], "recipe"),
        (["--count", "4"], "images"),
        (["--samples", "11"], "calibration, images"),
        (["--target", "raspberry-pi-5"], "scheme"),
    ],
)
def test_another_measurement_is_not_mixed_in(
    world: World, whole: Path, tmp_path: Path, more: list[str], named: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = rank(world, "-o", out, *more)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[-1] == (
        f"gnet-opt: {out / 'sensitivity.jsonl'} has other measurements: {named} differ. Pass "
        "--force to replace it, or another --output."
    )
    assert content(out) == content(whole)


def test_force_replaces_another_measurement(world: World, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = rank(world, "-o", out, "--target", "raspberry-pi-5", "--force", "--json")
    assert done.code == 0, done.err
    assert done.json["resumed"] == 0
    head, *costs = lines(out)
    assert head["scheme"] == find("raspberry-pi-5").scheme.to_dict()
    assert len(costs) == 8
    assert content(out) != content(whole)


def test_another_model_in_the_same_folder(world: World, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = rank(world, "-o", out, card=world.ruined)
    assert done.code == 2
    assert "has other measurements: graph, model differ. " in done.err


def test_without_matplotlib_there_is_no_plot(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    hide = lambda name: None if name == "matplotlib" else real(name)  # noqa: E731
    monkeypatch.setattr(sensitivity, "find_spec", hide)
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "sensitivity.jsonl", out)
    done = rank(world, "-o", out, "--json")
    assert done.code == 0
    assert done.err.splitlines()[-1] == 'The plot was left out: pip install "gnet-opt[plot]"'
    assert done.json["plot"] is None
    assert [path.name for path in out.iterdir()] == ["sensitivity.jsonl"]
    assert f"Written: {out / 'sensitivity.jsonl'}\n" in rank(world, "-o", out).out


def test_pictures_of_another_set(world: World, tmp_path: Path) -> None:
    # Their labels are not needed, and may be names.
    out = tmp_path / "out"
    done = rank(world, "-o", out, "--images", world.evaluation, "--count", "5", "--json")
    assert done.code == 0, done.err
    assert (done.json["images"], done.json["set"]) == (5, "evaluation")
    head = lines(out)[0]
    assert head["calibration"]["images"] == 12
    assert head["images"]["images"] == 5


def test_statistics_come_from_the_cache(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []

    def spy(model: Path, *rest: Any, **more: Any) -> Any:
        calls.append(model)
        return calibrate(model, *rest, **more)

    monkeypatch.setattr("gnet_opt.quantization.cache.calibrate", spy)
    monkeypatch.setenv("GNET_OPT_CACHE", str(tmp_path / "cache"))
    assert rank(world, "-o", tmp_path / "none", "--no-cache", "--count", "1").code == 0
    assert not (tmp_path / "cache").exists()
    assert len(calls) == 1
    for name in ("first", "second"):
        assert rank(world, "-o", tmp_path / name, "--count", "1").code == 0
    assert len(calls) == 2
    assert content(tmp_path / "none") == content(tmp_path / "first") == content(tmp_path / "second")


def test_the_default_output_is_named_after_model_and_target(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert rank(world, "--count", "1").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["small-jetson-orin-nano-sensitivity"]


@pytest.mark.parametrize("where", ["file", "below a file", "other file"])
def test_an_output_that_cannot_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    out = tmp_path / "out"
    if where == "other file":
        out.mkdir()
        (out / "sensitivity.jsonl").write_text("of the user")
        message = "is no sensitivity file of this version"
    else:
        out.write_text("of the user")
        message = "is no folder, so"

        def fail(*rest: Any, **more: Any) -> None:
            raise AssertionError("work was begun")

        monkeypatch.setattr(sensitivity, "prepare", fail)
    before = content(tmp_path)
    done = rank(world, "-o", out / "x" if where == "below a file" else out, "--force")
    assert (done.code, done.out) == (2, "")
    assert message in done.err.splitlines()[-1]
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "entropy"], 5, "The method entropy needs at least 16 calibration pictures"),
        (["--method", "auto"], 2, "Usage: gnet-opt sensitivity"),
        (["--count", "0"], 2, "Usage: gnet-opt sensitivity"),
        (["--jobs", "0"], 2, "Usage: gnet-opt sensitivity"),
        (["--target", "jetsn"], 2, "There is no target 'jetsn'. Did you mean jetson?"),
    ],
)
def test_options_that_cannot_be(
    world: World, tmp_path: Path, more: list[str], code: int, message: str
) -> None:
    done = rank(world, "-o", tmp_path / "o" / "out", *more)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert content(tmp_path) == {}


def test_a_layer_that_cannot_be_run_keeps_what_was_found(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gnet_opt.errors import BackendError

    real = sensitivity._logits

    def broken(model: Path, inputs: Path, folder: Path) -> Any:
        if folder.name == "4":
            raise BackendError("the worker died")
        return real(model, inputs, folder)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sensitivity, "_logits", broken)
        done = rank(world, "-o", out, "--jobs", "1")
    assert done.code == 7
    assert done.err.splitlines()[-1] == "gnet-opt: the worker died"
    assert len(lines(out)) == 1 + 4
    done = rank(world, "-o", out, "--json")
    assert done.json["resumed"] == 4
    assert content(out) == content(whole)
