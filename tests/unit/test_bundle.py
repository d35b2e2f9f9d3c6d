from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnet_opt.bundle import MANIFEST, MODEL, SCHEMA, Bundle, file_kinds
from gnet_opt.errors import GnetOptError, IntegrityError
from gnet_opt.files import sha256_file
from gnet_opt.preprocess import IMAGENET
from gnet_opt.runtime import Artifact, Deferred

VALUES: dict[str, Any] = {
    "accuracy": None,
    "calibration": {"images": 3},
    "created": "2026-11-23T12:00:00+00:00",
    "deferred": None,
    "facts": {},
    "golden": {"tolerance": {"sqnr_db": 20.0}},
    "labels": ["ant", "bee"],
    "latency": None,
    "model": {"classes": 2, "name": "small"},
    "precision": "int8",
    "preprocess": IMAGENET.to_dict(),
    "scheme": {"activations": "u8"},
    "target": {"backend": "onnxruntime", "name": "board"},
    "tools": {"gnet-opt": "0"},
}
KINDS = {"model.onnx": "onnx", "golden.npz": "golden", "sub/extra.bin": "weights"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "sub").mkdir(parents=True)
    for index, name in enumerate(KINDS):
        (folder / name).write_bytes(bytes([index]) * (index + 5))
    Bundle.write(folder, VALUES, KINDS)
    return folder


def rewrite(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def refused(root: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(root).check()
    return str(caught.value)


def test_what_is_written_is_read(root: Path) -> None:
    bundle = Bundle.open(root)
    assert bundle.check() == 3
    assert bundle.manifest["artifacts"] == [
        {
            "bytes": (root / path).stat().st_size,
            "kind": KINDS[path],
            "path": path,
            "sha256": sha256_file(root / path),
        }
        for path in sorted(KINDS)
    ]
    assert {k: v for k, v in bundle.manifest.items() if k not in ("artifacts", "schema")} == VALUES
    assert bundle.manifest["schema"] == SCHEMA == "gnet-opt/bundle/1"
    assert bundle.model == root / MODEL
    assert bundle.path("weights") == root / "sub" / "extra.bin"
    assert bundle.preprocess == IMAGENET
    assert bundle.deferred is None


def test_the_manifest_has_one_form(root: Path) -> None:
    text = (root / MANIFEST).read_text()
    Bundle.write(root, dict(reversed(VALUES.items())), KINDS)
    assert (root / MANIFEST).read_text() == text
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"


def test_a_file_without_a_kind_is_not_written_down_silently(root: Path) -> None:
    (root / "unknown").touch()
    with pytest.raises(KeyError, match="unknown"):
        Bundle.write(root, VALUES, KINDS)


def test_a_bundle_may_be_moved(root: Path, tmp_path: Path) -> None:
    moved = root.rename(tmp_path / "elsewhere")
    assert Bundle.open(moved).check() == 3
    assert str(root) not in (moved / MANIFEST).read_text()


@pytest.mark.parametrize("path", KINDS)
def test_every_changed_byte_is_found(root: Path, path: str) -> None:
    whole = (root / path).read_bytes()
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1
        (root / path).write_bytes(changed)
        assert refused(root) == (
            f"{root / path} was changed after the bundle was made (its SHA-256 differs). "
            "Copy the bundle again, or build it again."
        )
    (root / path).write_bytes(whole + b"x")
    assert "was changed after the bundle was made" in refused(root)


def test_a_missing_file(root: Path) -> None:
    (root / MODEL).unlink()
    assert refused(root) == (
        f"{root / MODEL} is missing from the bundle. Copy the bundle again, or build it again."
    )


@pytest.mark.parametrize("path", ["x.bin", "sub/x.bin", ".hidden"])
def test_an_extra_file(root: Path, path: str) -> None:
    (root / path).touch()
    assert refused(root) == (
        f"{root / path} does not belong to the bundle: the manifest does not list it. "
        "Remove it, or build the bundle again."
    )


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == (
        f"{tmp_path / 'none'} is not a bundle: it has no manifest.json. Pass the folder that "
        "`gnet-opt quantize` wrote."
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"schema": "gnet-opt/bundle/1", "x": NaN}',
        b'{"x": Infinity}',
    ],
    ids=["empty", "cut", "not utf-8", "nested lists", "nested tables", "nan", "infinity"],
)
def test_a_manifest_that_is_not_json(root: Path, data: bytes) -> None:
    (root / MANIFEST).write_bytes(data)
    message = refused(root)
    assert message.startswith(f"{root / MANIFEST} cannot be read (")
    assert message.endswith("). Build the bundle again.")


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("[]", None),
        ("5", None),
        ("{}", None),
        ('{"schema": 1}', 1),
        ('{"schema": "gnet-opt/bundle/2"}', "gnet-opt/bundle/2"),
        ('{"schema": ["gnet-opt/bundle/1"]}', ["gnet-opt/bundle/1"]),
    ],
)
def test_a_manifest_of_another_schema(root: Path, text: str, schema: Any) -> None:
    (root / MANIFEST).write_text(text)
    assert refused(root) == (
        f"{root / MANIFEST} has the schema {schema!r}; "
        "this version of gnet-opt reads 'gnet-opt/bundle/1'."
    )


@pytest.mark.parametrize("key", [*VALUES, "artifacts"])
def test_a_missing_key(root: Path, key: str) -> None:
    rewrite(root, lambda manifest: manifest.pop(key))
    assert refused(root) == f"{root / MANIFEST}: {key} is missing. Build the bundle again."


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("artifacts", {}),
        ("artifacts", 5),
        ("golden", "golden.npz"),
        ("golden.tolerance", 20),
        ("golden.tolerance.sqnr_db", "20"),
        ("labels", "ant"),
        ("model", None),
        ("model.classes", 2.5),
        ("precision", None),
        ("preprocess", []),
        ("target", "board"),
        ("target.backend", None),
        ("deferred", "later"),
    ],
)
def test_a_value_of_the_wrong_type(root: Path, dotted: str, value: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        *parents, key = dotted.split(".")
        for parent in parents:
            manifest = manifest[parent]
        manifest[key] = value

    rewrite(root, change)
    assert refused(root) == f"{root / MANIFEST}: {dotted} is of the wrong type."


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../other", "sub/../../other", "..", "a\\b", "..\\other"]
)
def test_a_path_that_leaves_the_bundle(root: Path, path: str) -> None:
    (root.parent / "other").write_bytes(b"secret")
    rewrite(root, lambda manifest: manifest["artifacts"][1].update(path=path))
    assert refused(root) == (f"{root / MANIFEST}: artifacts[1].path {path!r} leaves the bundle.")


@pytest.mark.parametrize("path", ["", ".", "nul\0byte", "sub"])
def test_a_path_that_is_no_file(root: Path, path: str) -> None:
    rewrite(root, lambda manifest: manifest["artifacts"][1].update(path=path))
    assert "is missing from the bundle" in refused(root)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda entry: entry.update(path=5), "artifacts[0].path"),
        (lambda entry: entry.pop("sha256"), "artifacts[0].sha256"),
        (lambda entry: entry.update(kind=None), "artifacts[0].kind"),
        (lambda entry: entry.update(bytes="5"), "artifacts[0].bytes"),
    ],
)
def test_a_damaged_entry(root: Path, change: Callable[[Any], Any], where: str) -> None:
    rewrite(root, lambda manifest: change(manifest["artifacts"][0]))
    assert refused(root) == f"{root / MANIFEST}: {where} is missing or of the wrong type."


@pytest.mark.parametrize("entry", [None, 5, "model.onnx", []])
def test_an_entry_that_is_no_table(root: Path, entry: Any) -> None:
    rewrite(root, lambda manifest: manifest["artifacts"].insert(0, entry))
    assert "artifacts[0].path is missing or of the wrong type" in refused(root)


def test_a_preprocess_that_is_impossible(root: Path) -> None:
    rewrite(root, lambda manifest: manifest["preprocess"].update(crop=1000))
    with pytest.raises(IntegrityError) as caught:
        _ = Bundle.open(root).preprocess
    assert str(caught.value) == (
        f"{root / MANIFEST}: preprocess.resize (256) must be at least preprocess.crop (1000), "
        "and both between 1 and 8192."
    )


def test_a_kind_that_is_not_there(root: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        Bundle.open(root).path("openvino-ir")
    assert str(caught.value) == (
        f"{root / MANIFEST}: no artifact of the kind 'openvino-ir'. Build the bundle again."
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)


def everywhere(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items: Any = []
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    return [path, *(place for key, item in items for place in everywhere(item, (*path, key)))]


@settings(max_examples=300)
@given(data=st.data())
def test_any_hostile_manifest_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    entry = {"bytes": 1, "kind": "onnx", "path": "model.onnx", "sha256": "0"}
    manifest: Any = {**copy.deepcopy(VALUES), "artifacts": [entry], "schema": SCHEMA}
    place = data.draw(st.sampled_from(everywhere(manifest)))
    value = data.draw(json_values)
    if place:
        parent = manifest
        for key in place[:-1]:
            parent = parent[key]
        parent[place[-1]] = value
    else:
        manifest = value
    root = tmp_path_factory.getbasetemp() / "hostile"
    root.mkdir(exist_ok=True)
    (root / MANIFEST).write_text(json.dumps(manifest))
    try:
        bundle = Bundle.open(root)
        assert isinstance(bundle.manifest["target"]["backend"], str)
        assert bundle.preprocess.crop >= 1
        assert bundle.classes == bundle.manifest["model"]["classes"]
        _ = bundle.path("onnx"), bundle.bytes, bundle.deferred
        bundle.check()
    except GnetOptError as error:
        assert str(root) in str(error)


def test_kinds_of_files_are_by_relative_path(tmp_path: Path) -> None:
    xml, weights = tmp_path / "ir" / "model.xml", tmp_path / "ir" / "model.bin"
    files = (("ir", xml), ("weights", weights))
    artifact = Artifact(backend="x", path=xml, files=files)
    deferred = Deferred(backend="x", reason="r", command="c", expected="e", files=files)
    for compiled in (artifact, deferred):
        assert file_kinds(tmp_path, compiled) == {"ir/model.bin": "weights", "ir/model.xml": "ir"}


DEFERRED = {"command": "build", "expected": "model.engine", "reason": "another machine"}


def test_what_the_device_built_is_not_checked(root: Path) -> None:
    (root / "model.engine").touch()
    (root / "model.engine.timing").touch()
    assert "does not belong to the bundle" in refused(root)
    rewrite(root, lambda manifest: manifest.update(deferred=DEFERRED))
    assert Bundle.open(root).check() == 3
    (root / "other.engine").touch()
    assert "other.engine does not belong to the bundle" in refused(root)


@pytest.mark.parametrize(
    "name",
    ["", ".", "../model.engine", "a/b", "a\\b", "a\0", "a" * 101, "model.onnx", "manifest.json"],
)
def test_a_name_of_the_engine_that_is_none(root: Path, name: str) -> None:
    rewrite(root, lambda manifest: manifest.update(deferred={**DEFERRED, "expected": name}))
    assert refused(root) == (
        f"{root / MANIFEST}: deferred.expected {name[:40]!r} is no name of a file that is still to "
        "be built. Build the bundle again."
    )


@pytest.mark.parametrize("key", DEFERRED)
def test_a_deferred_build_says_all_of_it(root: Path, key: str) -> None:
    deferred = {name: text for name, text in DEFERRED.items() if name != key}
    rewrite(root, lambda manifest: manifest.update(deferred=deferred))
    assert refused(root) == (
        f"{root / MANIFEST}: deferred.{key} is missing. Build the bundle again."
    )
