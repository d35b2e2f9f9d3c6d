"""`gnet-opt compare` and `gnet-opt report` as a user and a CI job call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import content, gnet_opt

import result_documents as documents


def written(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return written(tmp_path / "a.json", documents.document(documents.subject(2.0)))


@pytest.fixture
def slower(tmp_path: Path) -> Path:
    document = documents.document(documents.subject(2.4, seed=5, model_sha256="c" * 64))
    return written(tmp_path / "b.json", document)


class TestCompare:
    def test_equal_runs(self, a: Path) -> None:
        done = gnet_opt("compare", a, a, "--fail-if-slower", "5%")
        assert (done.code, done.err) == (0, "")
        assert "demo-int8 openvino" in done.out
        assert " equal" in done.out

    def test_a_slower_run_is_told_and_passes_unless_it_must_not(
        self, a: Path, slower: Path
    ) -> None:
        done = gnet_opt("compare", a, slower)
        assert (done.code, done.err) == (0, "")
        assert " slower" in done.out
        assert f"Differs: model_sha256 of demo-int8 openvino: {'a' * 64} in A" in done.out
        assert gnet_opt("compare", a, slower, "--fail-if-slower", "40%").code == 0
        assert gnet_opt("compare", slower, a, "--fail-if-slower", "5").code == 0
        done = gnet_opt("compare", a, slower, "--fail-if-slower", "5 %")
        assert done.code == 8
        assert " slower" in done.out
        assert done.err.startswith(
            "gnet-opt: B is slower than A by more than 5 %: demo-int8 openvi"
        )

    def test_json(self, a: Path, slower: Path) -> None:
        done = gnet_opt("compare", a, slower, "--fail-if-slower", "5%", "--json")
        assert done.code == 8
        assert sorted(done.json) == ["allowed", "differences", "limit", "notes", "ok", "rows"]
        assert (done.json["ok"], done.json["limit"]) == (False, 0.05)
        (row,) = done.json["rows"]
        assert row["verdict"] == "slower"
        assert row["ratio"]["low"] > 1.05
        assert [each["name"] for each in done.json["differences"]] == ["model_sha256"]

    def test_a_wider_drift_swallows_more(self, a: Path, slower: Path) -> None:
        done = gnet_opt("compare", a, slower, "--drift", "20%", "--json")
        assert done.json["rows"][0]["verdict"] == "equal"

    def test_unlike_runs(self, a: Path, tmp_path: Path) -> None:
        other = documents.document(documents.subject(2.0, threads=1))
        b = written(tmp_path / "b.json", other)
        done = gnet_opt("compare", a, b)
        assert (done.code, done.out) == (2, "")
        assert "threads of demo-int8 openvino: 2 in A, 1 in B" in done.err
        done = gnet_opt("compare", a, b, "--allow", "threads")
        assert done.code == 0
        assert "Differs, as allowed: threads of demo-int8 openvino: 2 in A, 1 in B." in done.out

    def test_by_index(self, a: Path, tmp_path: Path) -> None:
        b = written(tmp_path / "b.json", documents.document(documents.subject(2.0, name="new")))
        assert gnet_opt("compare", a, b).code == 2
        assert gnet_opt("compare", a, b, "--match", "index").code == 0

    @pytest.mark.parametrize(
        "arguments",
        [["--fail-if-slower", "a lot"], ["--allow", "weather"], ["--drift", "-1%"]],
    )
    def test_options_that_cannot_be(self, arguments: list[str], a: Path) -> None:
        done = gnet_opt("compare", a, a, *arguments)
        assert (done.code, done.out) == (2, "")
        assert "Invalid value" in done.err

    def test_a_file_that_was_cut_off(self, a: Path, tmp_path: Path) -> None:
        cut = tmp_path / "cut.json"
        cut.write_text(a.read_text(encoding="utf-8")[:-100], encoding="utf-8")
        done = gnet_opt("compare", a, cut)
        assert done.code == 2
        assert done.err.startswith(f"gnet-opt: {cut} cannot be read: ")


class TestReport:
    def test_it_is_written_beside_the_results(self, a: Path) -> None:
        done = gnet_opt("report", a)
        assert (done.code, done.err) == (0, "")
        page = a.with_name("report.html")
        assert done.out.strip() == str(page)
        assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    def test_or_where_it_is_wanted(self, a: Path, slower: Path, tmp_path: Path) -> None:
        out = tmp_path / "new" / "page.html"
        done = gnet_opt("report", a, slower, "-o", out, "--json")
        assert done.json == {"report": str(out), "results": [str(a), str(slower)]}
        assert "run 2" in out.read_text(encoding="utf-8")

    def test_nothing_is_replaced_in_silence(self, a: Path, tmp_path: Path) -> None:
        out = tmp_path / "page.html"
        out.write_text("mine", encoding="utf-8")
        done = gnet_opt("report", a, "-o", out)
        assert done.code == 2
        assert out.read_text(encoding="utf-8") == "mine"
        assert gnet_opt("report", a, "-o", out, "--force").code == 0
        assert out.read_text(encoding="utf-8") != "mine"

    def test_a_document_that_is_none_leaves_nothing_behind(self, tmp_path: Path) -> None:
        bad = written(tmp_path / "bad.json", {"schema": "gnet-opt/bench/1"})
        before = content(tmp_path)
        done = gnet_opt("report", bad)
        assert done.code == 2
        assert f"{bad}.comparison is missing" in done.err
        assert content(tmp_path) == before
