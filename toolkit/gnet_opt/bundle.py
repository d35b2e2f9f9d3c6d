"""The bundle: a folder with a manifest, a portable model, compiled files and proof.

`manifest.json` has the schema "gnet-opt/bundle/1": every other file of the bundle is listed in it
with its SHA-256, paths are relative and POSIX, keys are sorted. Two runs with equal inputs differ
in `created` and in measured times alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gnet_opt.errors import ConfigError, IntegrityError
from gnet_opt.files import dump_json, is_file, sha256_file, write_text
from gnet_opt.preprocess import Preprocess
from gnet_opt.runtime import Artifact, Deferred

SCHEMA = "gnet-opt/bundle/1"
MANIFEST = "manifest.json"
MODEL = "model.onnx"

_NUMBER = (int, float)
_TYPES: dict[str, type | tuple[type, ...]] = {
    "accuracy": (dict, type(None)),
    "artifacts": list,
    "calibration": dict,
    "created": str,
    "deferred": (dict, type(None)),
    "deferred.command": str,
    "deferred.expected": str,
    "deferred.reason": str,
    "facts": dict,
    "golden": dict,
    "golden.tolerance": dict,
    "golden.tolerance.sqnr_db": _NUMBER,
    "labels": list,
    "latency": (dict, type(None)),
    "model": dict,
    "model.classes": int,
    "model.name": str,
    "precision": str,
    "preprocess": dict,
    "scheme": (dict, type(None)),
    "target": dict,
    "target.backend": str,
    "target.name": str,
    "tools": dict,
}
"""What every manifest has, by dotted path; a parent comes before its children."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        root: Its folder.
        manifest: The parsed manifest.
    """

    root: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, root: Path) -> Bundle:
        """Read a bundle's manifest. Files are checked by `check`.

        Raises:
            IntegrityError: It is not a bundle, or its manifest is damaged or of another schema.
        """
        path = root / MANIFEST
        if not path.is_file():
            raise IntegrityError(
                f"{root} is not a bundle: it has no {MANIFEST}. Pass the folder that "
                "`gnet-opt quantize` wrote."
            )
        try:
            text = path.read_text(encoding="utf-8")
            manifest = json.loads(text, parse_constant=_refuse_constant)
        except (OSError, ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{path} cannot be read ({error}). Build the bundle again."
            ) from error
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise IntegrityError(
                f"{path} has the schema {schema!r}; this version of gnet-opt reads {SCHEMA!r}."
            )
        for dotted, kind in _TYPES.items():
            *parents, key = dotted.split(".")
            table = manifest
            for parent in parents:
                table = table[parent]
            if table is None:
                continue
            if key not in table:
                raise IntegrityError(f"{path}: {dotted} is missing. Build the bundle again.")
            value = table[key]
            # In Python True is a number, too.
            wrong = isinstance(value, bool) or not isinstance(value, kind)
            if wrong or (isinstance(value, float) and not math.isfinite(value)):
                raise IntegrityError(f"{path}: {dotted} is of the wrong type.")
        bundle = cls(root=root, manifest=manifest)
        for index, entry in enumerate(manifest["artifacts"]):
            bundle._check_entry(index, entry)
        bundle._check_expected()
        for needed in ("onnx", "golden"):
            bundle.path(needed)
        return bundle

    @classmethod
    def write(cls, root: Path, values: Mapping[str, Any], kinds: Mapping[str, str]) -> Bundle:
        """Write the manifest into a folder that holds all the other files already.

        Args:
            root: The folder.
            values: The manifest but for `schema` and `artifacts`.
            kinds: The kind of each file, by its relative POSIX path.
        """
        entries = []
        for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != MANIFEST):
            relative = path.relative_to(root).as_posix()
            entries.append(
                {
                    "bytes": path.stat().st_size,
                    "kind": kinds[relative],
                    "path": relative,
                    "sha256": sha256_file(path),
                }
            )
        manifest = {**values, "artifacts": entries, "schema": SCHEMA}
        write_text(root / MANIFEST, dump_json(manifest))
        return cls.open(root)

    def noted(self, values: Mapping[str, Any]) -> Bundle:
        """Write values into the manifest beside what is there; files and hashes stay as they are.

        Raises:
            IntegrityError: With these values it would be no manifest.
        """
        write_text(self.root / MANIFEST, dump_json({**self.manifest, **values}))
        return Bundle.open(self.root)

    def check(self) -> int:
        """Compare every file with its recorded size and SHA-256.

        The engine that a device built itself, and its by-products, are not listed and not checked.

        Returns:
            The number of files checked.

        Raises:
            IntegrityError: A file is missing, changed or not listed.
        """
        listed = {MANIFEST}
        for entry in self.manifest["artifacts"]:
            path = self.root / entry["path"]
            listed.add(entry["path"])
            if not is_file(path):
                raise IntegrityError(
                    f"{path} is missing from the bundle. Copy the bundle again, or build it again."
                )
            if path.stat().st_size != entry["bytes"] or sha256_file(path) != entry["sha256"]:
                raise IntegrityError(
                    f"{path} was changed after the bundle was made (its SHA-256 differs). "
                    "Copy the bundle again, or build it again."
                )
        engine = str(self.deferred["expected"]) if self.deferred else None
        for path in self.root.rglob("*"):
            relative = path.relative_to(self.root).as_posix()
            built_here = engine is not None and f"{relative}.".startswith(f"{engine}.")
            if path.is_file() and relative not in listed and not built_here:
                raise IntegrityError(
                    f"{path} does not belong to the bundle: the manifest does not list it. "
                    "Remove it, or build the bundle again."
                )
        return len(listed) - 1

    @property
    def model(self) -> Path:
        """The portable ONNX model."""
        return self.root / MODEL

    @property
    def preprocess(self) -> Preprocess:
        """How a picture becomes the input."""
        try:
            return Preprocess.from_dict(self.manifest["preprocess"])
        except ConfigError as error:
            raise IntegrityError(f"{self.root / MANIFEST}: {error}") from error

    @property
    def threshold(self) -> float:
        """Above what the one output of a model for two classes means class 1; a logit's is 0."""
        value = self.manifest["model"].get("threshold", 0.0)
        if isinstance(value, bool) or not isinstance(value, _NUMBER) or not math.isfinite(value):
            raise IntegrityError(f"{self.root / MANIFEST}: model.threshold is of the wrong type.")
        return float(value)

    @property
    def deferred(self) -> Mapping[str, Any] | None:
        """What has to be done on the device, or None when the bundle is complete."""
        deferred: Mapping[str, Any] | None = self.manifest.get("deferred")
        return deferred

    def path(self, kind: str) -> Path:
        """The one file of a kind.

        Raises:
            IntegrityError: There is no such file in the manifest.
        """
        for entry in self.manifest["artifacts"]:
            if entry["kind"] == kind:
                return self.root / str(entry["path"])
        raise IntegrityError(
            f"{self.root / MANIFEST}: no artifact of the kind {kind!r}. Build the bundle again."
        )

    def _check_entry(self, index: int, entry: Any) -> None:
        where = f"{self.root / MANIFEST}: artifacts[{index}]"
        for key, kind in (("path", str), ("sha256", str), ("kind", str), ("bytes", int)):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise IntegrityError(f"{where}.{key} is missing or of the wrong type.")
        pure = PurePosixPath(entry["path"])
        # A manifest comes with the bundle from elsewhere: it must not reach outside its folder.
        if pure.is_absolute() or ".." in pure.parts or "\\" in entry["path"]:
            raise IntegrityError(f"{where}.path {entry['path']!r} leaves the bundle.")

    def _check_expected(self) -> None:
        """Refuse a name for what the device builds that is none, or that of another file."""
        if self.deferred is None:
            return
        name = self.deferred["expected"]
        taken = {MANIFEST, *(entry["path"] for entry in self.manifest["artifacts"])}
        if not re.fullmatch(r"\w[\w.-]{0,99}", name) or name in taken:
            raise IntegrityError(
                f"{self.root / MANIFEST}: deferred.expected {name[:40]!r} is no name of a file "
                "that is still to be built. Build the bundle again."
            )


def _refuse_constant(text: str) -> None:
    """JSON has no NaN and no infinity, and a tolerance of NaN would let everything pass."""
    raise ValueError(f"{text} is not JSON")


def file_kinds(root: Path, compiled: Artifact | Deferred) -> dict[str, str]:
    """The kind of each file that a backend wrote, by its path relative to `root`."""
    return {path.relative_to(root).as_posix(): kind for kind, path in compiled.files}
