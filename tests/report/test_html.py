"""The pages as a browser reads them: whole, self-contained, escaped."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from depthsearch.errors import MaskError, StorageError
from depthsearch.report import compare_html, compare_report, run_report, write_report
from depthsearch.space import SearchSpace

WriteRun = Callable[..., Path]
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Collects what a page holds, and demands that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        if "style" not in self.open:
            self.text += data

    @property
    def images(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


def demand_self_contained(text: str) -> Page:
    """No script, no style sheet, nothing fetched, and every picture readable."""
    page = Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"@import|url\(", text)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "srcset", "action", "data"):
            assert value.startswith("data:image/")
    for source in page.images:
        kind, _, data = source.partition(";base64,")
        content = base64.b64decode(data, validate=True)
        if kind == "data:image/svg+xml":
            root = ET.fromstring(content)  # written by this package a moment ago
            for element in root.iter():
                for name, value in element.attrib.items():
                    if name.endswith("href"):
                        assert value.startswith(("#", "data:"))
        else:
            assert content.startswith(b"\x89PNG")
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alts) == len(page.images)
    assert all(alts)
    return page


def test_the_report_of_a_finished_run(
    tmp_path: Path, write_run: WriteRun, comparison: dict[str, Any]
) -> None:
    folder = write_run(tmp_path / "run", generations=6)
    (folder / "export.json").write_text(json.dumps(comparison["export"] | {"path": "small <1>"}))
    path = write_report(folder)
    assert path == folder / "report.html"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.json", "config.yaml", "export.json", "journal.jsonl", "report.html",
    ]  # fmt: skip
    page = demand_self_contained(path.read_text(encoding="utf-8"))
    assert page.titles == [
        "What is dropped",
        "How the search went",
        "Does the result hold on fresh data?",
        "Which sublayers good masks drop",
        "The best mask",
        "The exported model beside the dense one",
        "Best masks by search loss",
        "The search",
        "Signature",
    ]
    assert len(page.images) == 4
    assert "not finished" not in page.text
    for part in (
        "75.0 % of its blocks",
        "decoder.12.ffn",
        "sha256:4f1c",
        "dtype: bfloat16",
        "Exported to small <1>.",
        "depthsearch feed RUN says how many workers",
    ):
        assert part in page.text
    assert "best baseline (window" in page.text or "itself a baseline" in page.text


@pytest.mark.parametrize(
    ("losses", "unit", "said"),
    [
        ({}, "nats", ["Loss: KL divergence to the dense model, nats", "A long line to the right"]),
        ({"score": "kl"}, "nats", ["Loss: KL divergence to the dense model, nats", "A long line"]),
        (
            {"score": "angular"},
            "nats",
            [
                "Loss: angle to the dense model's logits, half turns",
                "Loss of the finalists: KL divergence to the dense model, nats",
                "compared masks by another loss, which is not shown here",
            ],
        ),
        ({"kind": "norm"}, "logits", ["Loss: distance to the dense model's logits, logits"]),
    ],
)
def test_losses_are_named_with_their_unit(
    tmp_path: Path, write_run: WriteRun, losses: dict[str, str], unit: str, said: list[str]
) -> None:
    folder = write_run(tmp_path / "run", generations=3, **losses)
    page = demand_self_contained(run_report(folder))
    text = re.sub(r"\s+", " ", page.text)
    for part in said:
        # The cells of a row stand side by side.
        assert part.replace(": ", "") in text
    assert f"{unit} on fresh data" in text
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    own = "half turns" if losses.get("score") == "angular" else unit
    assert any(f"{own}." in alt for alt in alts)
    assert ("A long line" in text) == (losses.get("score") != "angular")


@pytest.mark.parametrize(
    ("state", "pictures"), [("started", 0), ("torn", 3), ("searching", 3), ("finals", 4)]
)
def test_the_report_of_an_unfinished_run(
    tmp_path: Path, write_run: WriteRun, state: str, pictures: int
) -> None:
    folder = write_run(tmp_path / "run", state=state, generations=2)
    page = demand_self_contained(run_report(folder))
    assert len(page.images) == pictures
    assert "This run has not finished" in page.text
    assert f"depthsearch resume {folder}" in page.text


@pytest.mark.parametrize(
    "change",
    [
        {
            "granularity": "attention",
            "protected": [0, 18],
            "budget": {"metric": "kv_bytes", "ratio": 0.6},
        },
        {"granularity": "block", "budget": {"metric": "blocks", "drop": 3}},
        {"packable": True, "budget": {"metric": "sites", "drop": 5}},
    ],
)
def test_reports_of_other_spaces(
    tmp_path: Path, write_run: WriteRun, space: SearchSpace, change: dict[str, Any]
) -> None:
    data = space.to_json() | change
    data["sites"] = data["sites"][:20]
    for costs in data["costs"].values():
        costs["sites"] = costs["sites"][:20]
    data["budget"] = {"ratio": None, "cap": None, "drop": None, "of": "model"} | change["budget"]
    folder = write_run(tmp_path / "run", space=SearchSpace.from_json(data), generations=1)
    page = demand_self_contained(run_report(folder))
    assert len(page.images) == 4


def test_a_latency_budget_is_reported_in_milliseconds(
    tmp_path: Path, write_run: WriteRun, space: SearchSpace
) -> None:
    sites = [8_875_000, 2_685_000] * 30
    data = space.to_json()
    data["costs"]["latency"] = {"fixed": 45_000_000, "sites": sites, "shared": []}
    data["budget"] = {"metric": "latency", "ratio": 0.75, "cap": None, "drop": None, "of": "model"}
    folder = write_run(tmp_path / "run", space=SearchSpace.from_json(data), generations=1)
    text = run_report(folder)
    demand_self_contained(text)
    dense = 45 + 30 * (8.875 + 2.685)
    assert f"{dense:.4g} ms (100.0 % of the dense model" in text
    assert f"{0.75 * dense:.4g} ms (75.0 % of the dense model" in text
    assert "Decoding step" in text
    assert "391,800,000" not in text


def test_reports_are_the_same_each_time(tmp_path: Path, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", generations=1)
    assert run_report(folder) == run_report(folder)


def test_foreign_text_is_escaped_everywhere(tmp_path: Path, write_run: WriteRun) -> None:
    evil = "<script>alert(\"1\")</script> $x_{ & 'quoted' 模型 \x07"
    folder = write_run(tmp_path / "run", generations=1)
    lines = (folder / "journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[0]["signature"] = {evil: {"inner": evil}}
    for record in records:
        for proposal in record.get("proposals", ()):
            proposal["origin"] = evil
    records[0]["config"]["model"]["path"] = evil
    (folder / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = demand_self_contained(run_report(folder))
    assert '<script>alert("1")' in page.text


def test_a_report_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, write_run: WriteRun
) -> None:
    folder = write_run(tmp_path / "run", state="started")
    (folder / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"cannot write .*report\.html"):
        write_report(folder)
    assert not list(folder.glob("*.partial"))
    assert not list(folder.glob(".*"))


def test_the_report_of_a_comparison(tmp_path: Path, comparison: dict[str, Any]) -> None:
    path = compare_report(comparison, tmp_path)
    assert path == tmp_path / "report.html"
    page = demand_self_contained(path.read_text(encoding="utf-8"))
    assert page.titles == [
        "Held-out quality",
        "Differences between arms",
        "The exported model beside the dense one",
        "What each arm drops",
        "What each arm had found at each cost",
        "Does a lower search loss carry over?",
        "Every run",
        "Signature",
    ]
    assert len(page.images) == 4
    assert page.text.index(comparison["verdict"]) < page.text.index("Held-out quality")
    assert compare_report(comparison, tmp_path / "other.html") == tmp_path / "other.html"


def test_search_losses_of_two_kinds_share_no_axis(comparison: dict[str, Any]) -> None:
    plain = demand_self_contained(compare_html(comparison))
    assert "left out" not in plain.text
    for arm in comparison["arms"]:
        arm["score"] = "norm" if arm["name"] == "greedy" else "kl"
        if arm["score"] == "norm":
            arm["select_loss"] = 777.25
            arm["anytime"] = [[2e5, 777.25]]
    page = demand_self_contained(compare_html(comparison))
    assert "searched by another loss are left out: greedy (norm)." in page.text
    assert "777.2500 (norm)" in page.text
    alts = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    (curves,) = [alt for alt in alts if alt.startswith("Best search loss")]
    assert "greedy" not in curves
    assert "evolution" in curves
    for arm in comparison["arms"]:
        arm["score"] = "norm"
    page = demand_self_contained(compare_html(comparison))
    assert "left out" not in page.text
    assert "(norm)" not in page.text


def test_a_comparison_with_failed_arms_and_without_export(comparison: dict[str, Any]) -> None:
    comparison["export"] = None
    for arm in comparison["arms"]:
        if arm["name"] == "greedy":
            for key in ("mask", "select_loss", "finals_loss", "heldout_kl", "heldout_kl_stderr"):
                arm[key] = None
            arm["anytime"] = []
    comparison["summary"][0] |= {
        "heldout_kl_mean": None,
        "heldout_kl_low": None,
        "heldout_kl_high": None,
        "heldout_ce_mean": None,
    }
    page = demand_self_contained(compare_html(comparison))
    assert "The exported model beside the dense one" not in page.titles
    assert len(page.images) == 4
    for arm in comparison["arms"]:
        arm |= {"mask": None, "anytime": [], "heldout_kl": None}
    comparison |= {"summary": [], "pairs": []}
    assert demand_self_contained(compare_html(comparison)).images == []


def test_a_comparison_escapes_the_names_of_its_arms(comparison: dict[str, Any]) -> None:
    for arm in comparison["arms"]:
        arm["name"] = f"<b>{arm['name']}</b>\x00"
    comparison["summary"][0]["arm"] = "<i>x</i>"
    comparison["verdict"] = "<u>better</u>"
    page = demand_self_contained(compare_html(comparison))
    assert not {"b", "i", "u"}.intersection(page.tags[page.tags.index("h1") :])
    assert "<u>better</u>" in page.text


def test_a_comparison_of_unknown_sites_is_refused(comparison: dict[str, Any]) -> None:
    comparison["sites"][0] = "decoder.0.mixer"
    with pytest.raises(MaskError, match="is not a site name"):
        compare_html(comparison)
