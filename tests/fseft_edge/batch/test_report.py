"""The batch report: the order of its cases, its content, privacy, and damaged results."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from doubles.repository import ROOT
from PIL import Image

from fseft_edge.batch.report import write_report
from fseft_edge.batch.report_tables import COLUMNS
from fseft_edge.masks.quality import MEANINGS
from fseft_edge.masks.result import SegmentedOrgan
from fseft_edge.outbox.records import CaseState, CorrectedOrgan, Correction, Decision, Origin, StageSeconds
from fseft_edge.outbox.store import BatchStore, Outcome, state_path
from fseft_edge.runtime.system import atomic

NAME = "Mustermann^Erika"
LIVER = SegmentedOrgan("liver", 1, 1500.25, (), (1200.0, 1800.0), 0.93, 104)
SMALL = SegmentedOrgan("spleen", 2, 61.0, ("small", "low_confidence"), (100.0, 250.0), 0.61, 96)
SECONDS = StageSeconds(1.25, 14.0, 3.5)
START = 1_780_000_000.0
BY_ADA = {"reviewer": "Ada Lovelace", "mask_sha256": "ab" * 32}


@dataclass
class Batch:
    """An outbox to which tests add cases, with a simulated clock."""

    outbox: Path
    store: BatchStore
    monkeypatch: pytest.MonkeyPatch
    now: float = START

    def at(self, seconds: float) -> None:
        self.now = START + seconds
        self.monkeypatch.setattr("time.time", lambda: self.now)

    def add(self, number: int, source: str = "") -> str:
        key = f"case-{number:012d}"
        self.store.add(Path(f"/inbox/{NAME}_{number}.nii.gz") if not source else Path(source), str(number), key)
        return key

    def done(
        self,
        number: int,
        *organs: SegmentedOrgan,
        source: str = "",
        took: float = 20.0,
        warnings: tuple[str, ...] = (),
    ) -> str:
        key = self.add(number, source)
        self.store.start(key)
        self.at(self.now - START + took)
        self.store.end(key, Outcome(CaseState.DONE, organs or (LIVER,), SECONDS, warnings=warnings))
        folder = self.outbox / key
        folder.mkdir(parents=True)
        (folder / f"{key}.nii.gz").write_bytes(b"mask")
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (40, 90, 3), np.uint8)).save(
            folder / f"{key}.png"
        )
        description = {
            "shape": [512, 512, 130],
            "spacing_mm": [0.98, 0.98, 3.0],
            "encoder": {"name": "edge_base", "id": "ab" * 32},
            "adapters": [{"sha256": "cd" * 32, "organs": ["liver", "spleen"]}],
            "toolkit_version": "9.9",
            "encoded": {"windows": 12, "of": 80, "why": "located"},
        }
        (folder / f"{key}.json").write_text(json.dumps(description))
        return key

    def failed(self, number: int, state: CaseState = CaseState.FAILED, source: str = "") -> str:
        key = self.add(number, source)
        self.store.start(key)
        if state == CaseState.SET_ASIDE:
            self.store.requeue(key, attempted=True)
            self.store.start(key)
        self.at(self.now - START + 5)
        reason, remedy = f"{key} is not a CT.", "Export it again."
        self.store.end(key, Outcome(state, problem="NotACtError", reason=reason, remedy=remedy))
        return key

    def report(self, **more: Any) -> Report:
        path = write_report(self.outbox, self.store, **more)
        assert path == self.outbox / "report.html"
        return Report(self.outbox)


@dataclass
class Report:
    """The content of the three files."""

    outbox: Path

    @property
    def html(self) -> str:
        return (self.outbox / "report.html").read_text(encoding="utf-8")

    @property
    def page(self) -> Reader:
        reader = Reader()
        reader.feed(self.html)
        reader.close()
        assert reader.open == []
        return reader

    @property
    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((self.outbox / "report.csv").read_text(encoding="utf-8"))))

    @property
    def json(self) -> dict[str, Any]:
        fields: dict[str, Any] = json.loads((self.outbox / "report.json").read_text(encoding="utf-8"))
        return fields


class Reader(HTMLParser):
    """A parser that checks the nesting of elements and the uniqueness of ids.

    Attributes:
        open: elements that are not closed yet.
        tags: all elements with their attributes.
        text: text of the page.
        texts: text of each element that has a class, by class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.texts: dict[str, list[str]] = {}
        self._starts: list[tuple[int, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if "id" in attributes:
            assert attributes["id"] not in self.ids
        self.tags.append((tag, attributes))
        if tag not in {"meta", "img"}:
            self.open.append(tag)
            self._starts.append((len(self.text), attributes.get("class", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        start, classes = self._starts.pop()
        for name in classes.split():
            self.texts.setdefault(name, []).append(" ".join(self.text[start:].split()))

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Batch]:
    monkeypatch.setenv("TZ", "UTC")
    outbox = tmp_path / "outbox"
    with BatchStore(state_path(outbox), create=True) as store:
        batch = Batch(outbox, store, monkeypatch)
        batch.at(0)
        yield batch


def test_cases_without_a_mask_come_first_then_flagged_masks_then_the_others(batch: Batch) -> None:
    plain = batch.done(1)
    look = batch.done(2, LIVER, SMALL)
    failed = batch.failed(3)
    waiting = batch.add(4)
    aside = batch.failed(5, CaseState.SET_ASIDE)
    also_plain = batch.done(6)
    cancelled = batch.add(7)
    batch.store.cancel([cancelled])
    order = [failed, aside, look, plain, also_plain, waiting, cancelled]
    report = batch.report()
    assert [found for found in report.page.ids if found.startswith("case-")] == order
    assert [case["case"] for case in report.json["cases"]] == order
    assert list(dict.fromkeys(row["case"] for row in report.rows)) == order


def test_masks_with_the_most_flags_come_first_and_reviewed_masks_last(batch: Batch) -> None:
    decided = batch.done(1, SMALL, SMALL)
    batch.store.review(decided, Decision.ACCEPTED, "", **BY_ADA)
    one = batch.done(2, LIVER, replace(LIVER, flags=("touches_edge",)))
    two = batch.done(3, SMALL)
    found = [name for name in batch.report().page.ids if name.startswith("case-")]
    assert found == [two, one, decided]


def test_a_case_without_a_mask_has_reason_remedy_and_attempts(batch: Batch) -> None:
    failed, aside = batch.failed(1), batch.failed(2, CaseState.SET_ASIDE)
    report = batch.report()
    texts = report.page.texts
    for key, text in zip((failed, aside), texts["case"], strict=True):
        assert f"{key} is not a CT." in text
    assert texts["remedy"] == ["Export it again."] * 2
    assert report.page.text.count("NotACtError") == 2
    assert "1" in texts["state"][1]
    assert [(row["case"], row["state"], row["organ"], row["reason"], row["attempts"]) for row in report.rows] == [
        (failed, "failed", "", f"{failed} is not a CT.", "0"),
        (aside, "set_aside", "", f"{aside} is not a CT.", "1"),
    ]


def test_the_summary_counts_cases_and_the_time_in_which_a_case_was_running(batch: Batch) -> None:
    """Cases run for 40 s, and 1000 s later for 25 s."""
    first = batch.done(1)
    batch.done(2, SMALL)
    batch.at(1040)
    batch.failed(3)
    batch.done(4)
    batch.add(5)
    batch.store.add(Path("/inbox/again.nii.gz"), "x", first)
    summary = batch.report().json["summary"]
    assert summary.pop("made_with") == [
        "encoder edge_base (abababababab); adapter cdcdcdcdcdcd for liver, spleen; fseft-edge 9.9"
    ]
    assert summary == {
        "found": 5,
        "done": 3,
        "flagged": 1,
        "warned": 0,
        "superseded": 0,
        "failed": 1,
        "set_aside": 0,
        "waiting": 1,
        "cancelled": 0,
        "duplicates": 1,
        "began": "2026-05-28T20:26:40+00:00",
        "ended": "2026-05-28T20:44:25+00:00",
        "busy_seconds": 65.0,
        "cases_per_hour": pytest.approx(3 * 3600 / 65, abs=0.01),
        "organs": ["spleen", "liver"],
    }
    page = batch.report().page
    assert [text.split()[0] for text in page.texts["figure"]] == ["5", "3", "1", "0", "1", "0", "1", "0", "0", "1"]
    assert re.findall(r"\d+", page.texts["summary"][0]) == ["3", "5", "1", "1", "1"]
    assert "1 min 5 s" in page.texts["soft"][0]
    assert "166" in page.texts["soft"][0]


def test_the_time_of_overlapping_cases_is_counted_once(batch: Batch) -> None:
    keys = [batch.add(number) for number in (1, 2)]
    for key in keys:
        batch.store.start(key)
    batch.at(10)
    batch.store.end(keys[0], Outcome(CaseState.DONE, (LIVER,), SECONDS))
    batch.at(30)
    batch.store.end(keys[1], Outcome(CaseState.DONE, (LIVER,), SECONDS))
    assert batch.report().json["summary"]["busy_seconds"] == 30


def test_names_of_patients_are_only_in_a_report_with_ids(batch: Batch) -> None:
    hostile = "/inbox/Mustermann^Erika/scan of Mustermann"
    first = batch.done(1)
    batch.done(2, SMALL, source=hostile)
    batch.failed(3)
    batch.failed(4, CaseState.SET_ASIDE)
    batch.add(5)
    batch.store.add(Path(f"/inbox/copy of {NAME}.nii.gz"), "x", first)
    (batch.outbox / first / f"{first}.png").unlink()
    report = batch.report()
    for file in report.outbox.glob("report.*"):
        content = file.read_text(encoding="utf-8")
        assert "Mustermann" not in content
        assert "/inbox" not in content
    assert {row["source"] for row in report.rows} == {""}

    named = batch.report(show_ids=True)
    assert f"{NAME}_1.nii.gz" in named.page.text
    assert f"copy of {NAME}.nii.gz" in named.page.text
    assert "/inbox" not in named.html  # the name of the file, not its folder
    assert {row["source"] for row in named.rows} == {
        *(f"{NAME}_{number}.nii.gz" for number in (1, 3, 4, 5)),
        "scan of Mustermann",
    }
    assert named.json["duplicates"] == [{"case": first, "source": f"copy of {NAME}.nii.gz"}]


def test_all_text_is_escaped(batch: Batch) -> None:
    hostile = '<script>alert("1")</script>&\''
    organ = SegmentedOrgan(hostile, 1, 1.0, (hostile,), (1.0, 2.0), 0.9, 1)
    key = batch.done(1, organ, source=f"/inbox/{hostile.replace('/', '')}.nii.gz")
    batch.store.review(key, Decision.REJECTED, hostile, **BY_ADA)
    bad = batch.add(2, source="/inbox/2")
    batch.store.start(bad)
    batch.store.end(bad, Outcome(CaseState.FAILED, problem=hostile, reason=hostile, remedy=hostile))
    page = batch.report(show_ids=True, title=hostile).page
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>") >= 8
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_warnings_of_a_mask_without_flags_cannot_be_overlooked(batch: Batch) -> None:
    batch.done(1)
    key = batch.done(2, warnings=("Slices were left out: 7 of 16 <b>.", "=A1 The table drifts."))
    report = batch.report()
    assert [row["case"] for row in report.rows] == [key, "case-000000000001"]
    assert report.rows[0]["warnings"] == "Slices were left out: 7 of 16 <b>. =A1 The table drifts."
    case, other = report.json["cases"]
    assert case["warnings"] == ["Slices were left out: 7 of 16 <b>.", "=A1 The table drifts."]
    assert (case["flagged"], other["flagged"], other["warnings"]) == (True, False, [])
    assert (report.json["summary"]["warned"], report.json["summary"]["flagged"]) == (1, 1)
    page = report.page
    assert "<b>" not in report.html
    assert page.texts["warning"] == case["warnings"]
    assert page.texts["warned"] == ["2 warnings about the scan"]
    assert "1 mask must not be used before a person has read its warnings." in page.texts["summary"][0]
    assert page.text.index("2 warnings about the scan") < page.text.index("Masks without flags")
    assert "1 with warnings" in page.texts["figure"]


def test_no_cell_is_a_formula_of_a_spreadsheet(batch: Batch) -> None:
    key = batch.done(1, source="/inbox/=HYPERLINK(1).nii.gz")
    batch.store.review(key, Decision.ACCEPTED, "-1+2", **BY_ADA)
    (row,) = batch.report(show_ids=True).rows
    assert row["source"] == "'=HYPERLINK(1).nii.gz"
    assert row["review_note"] == "'-1+2"
    assert row["volume_ml"] == "1500.25"


def test_the_page_is_one_file_that_loads_nothing_and_runs_no_script(batch: Batch) -> None:
    key = batch.done(1)
    report = batch.report()
    assert not re.search(r"https?://|<script|<link|@import|url\(", report.html)
    tags = report.page.tags
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    assert image["src"].startswith("data:image/webp;base64,")
    assert (image["width"], image["height"]) == ("90", "40")
    assert "content-visibility: auto" in report.html
    targets = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert f"{key}/{key}.png" in targets
    assert {target[1:] for target in targets if target.startswith("#")} <= set(report.page.ids)


def test_each_organ_has_volume_range_confidence_and_flags(batch: Batch) -> None:
    key = batch.done(1, LIVER, SMALL)
    batch.at(86_400)
    batch.store.review(key, Decision.REJECTED, "the tip is missing", reviewer="", mask_sha256="")
    batch.at(90_000)
    batch.store.review(key, Decision.ACCEPTED, "good enough", **BY_ADA)
    report = batch.report()
    liver, spleen = report.rows
    assert tuple(liver) == COLUMNS
    assert (liver["volume_ml"], liver["support_min_ml"], liver["support_max_ml"]) == ("1500.25", "1200.0", "1800.0")
    assert (spleen["organ"], spleen["label"], spleen["flags"]) == ("spleen", "2", "small low_confidence")
    assert (spleen["confidence"], spleen["median_hu"]) == ("0.61", "96")
    assert (spleen["read_s"], spleen["encode_s"], spleen["finish_s"]) == ("1.25", "14.0", "3.5")
    assert (spleen["review"], spleen["review_note"]) == ("accepted", "good enough")
    at = datetime.fromtimestamp(START + 90_000, UTC).isoformat()
    assert [spleen[f"review_{name}"] for name in ("by", "at", "mask_sha256")] == ["Ada Lovelace", at, "ab" * 32]
    (case,) = report.json["cases"]
    assert case["review"] == {"decision": "accepted", "note": "good enough", "at": at, **BY_ADA}
    assert case["decisions"][1:] == [case["review"]]
    assert case["decisions"][0]["note"] == "the tip is missing"
    assert case["decisions"][0]["reviewer"] is None
    assert [SegmentedOrgan.from_json(organ) for organ in case["organs"]] == [LIVER, SMALL]
    assert report.json["schema_version"] == 1
    assert case["encoded"] == spleen["encoded"] == "12 of 80 windows (located)"
    page = report.page
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert [re.findall(r"[\d.]+|within|below|above", label) for label in labels] == [
        ["1500", "within", "1200", "1800"],
        ["61.0", "below", "100", "250"],
    ]
    bars = [attributes["class"] for tag, attributes in page.tags if tag == "svg"]
    assert bars == ["bar", "bar outside"]
    titles = {attributes.get("title") for tag, attributes in page.tags if attributes.get("class") == "flag"}
    assert titles == {MEANINGS["small"], MEANINGS["low_confidence"]}
    for text in (
        *MEANINGS.values(),
        "512 × 512 × 130 voxels",
        "encoded: 12 of 80 windows (located)",
        "read 1.2 s, encode 14.0 s, finish 3.5 s",
        "by Ada Lovelace: good enough",
    ):
        assert text in page.text


def test_corrections_are_reported_week_by_week_and_masks_without_correction_count_as_zero(batch: Batch) -> None:
    """Two masks are accepted in the first week, one of them corrected; one mask in the next; others do not count."""
    keys = [batch.done(number, LIVER, SMALL) for number in range(1, 6)]
    for key in keys:
        description = json.loads((batch.outbox / key / f"{key}.json").read_text())
        (batch.outbox / key / f"{key}.json").write_text(json.dumps(description | {"mask_sha256": "00" * 32}))
    assert "corrections" not in batch.report().page.ids

    def corrected(key: str, sha256: str, added: float, distance: float | None) -> None:
        organs = (
            CorrectedOrgan("liver", 1, 1490.0, distance, distance and 2 * distance, added),
            CorrectedOrgan("spleen", 2, 61.0, 0.0, 0.0, 0.0),
        )
        batch.store.correct(key, Correction(batch.now, "Bo Li", Origin.PAGE, sha256 * 32, "00" * 32, organs))

    monday = datetime(2026, 6, 1, tzinfo=UTC).timestamp() - START
    batch.at(monday)
    corrected(keys[0], "aa", 400.0, 3.0)
    corrected(keys[0], "bb", 100.0, 1.0)
    by = {"reviewer": "Bo Li"}
    batch.store.review(keys[0], Decision.ACCEPTED, "", mask_sha256="bb" * 32, **by)
    batch.at(monday + 7 * 86_400 - 1)
    batch.store.review(keys[1], Decision.ACCEPTED, "", mask_sha256="00" * 32, **by)
    batch.at(monday + 7 * 86_400)
    corrected(keys[2], "cc", 50.0, None)
    batch.store.review(keys[2], Decision.ACCEPTED, "", mask_sha256="cc" * 32, **by)
    batch.store.review(keys[3], Decision.ACCEPTED, "", mask_sha256="dd" * 32, **by)  # a mask of --corrected
    corrected(keys[4], "ee", 50.0, 1.0)
    batch.store.review(keys[4], Decision.REJECTED, "", mask_sha256="ee" * 32, **by)
    report = batch.report()
    first, second = report.json["corrections_by_week"]
    assert (first["week"], first["accepted"], first["corrected"]) == ("2026-06-01", 2, 1)
    liver, spleen = first["organs"]
    assert liver == {"name": "liver", "mean_distance_mm": 0.5, "hd95_mm": 1.0, "added_path_mm": 50.0}
    assert spleen == {"name": "spleen", "mean_distance_mm": 0.0, "hd95_mm": 0.0, "added_path_mm": 0.0}
    assert (second["week"], second["accepted"], second["corrected"]) == ("2026-06-08", 1, 1)
    assert second["organs"][0] == {"name": "liver", "mean_distance_mm": None, "hd95_mm": None, "added_path_mm": 50.0}
    case = next(case for case in report.json["cases"] if case["case"] == keys[0])
    assert [one["mask_sha256"] for one in case["corrections"]] == ["aa" * 32, "bb" * 32]
    assert case["corrections"][1]["organs"][0]["volume_ml"] == 1490.0
    row = next(row for row in report.rows if row["case"] == keys[0] and row["organ"] == "liver")
    assert (row["corrected_by"], row["corrected_mask_sha256"]) == ("Bo Li", "bb" * 32)
    measures = [row[name] for name in ("corrected_volume_ml", "mean_distance_mm", "hd95_mm", "added_path_mm")]
    assert measures == ["1490.0", "1.0", "2.0", "100.0"]
    assert "corrections" in report.page.ids
    assert "2026-06-01 2 1 liver 50.0 0.50 1.00" in " ".join(report.page.text.split())


def test_the_columns_are_documented() -> None:
    document = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    assert [name for name in COLUMNS if f"`{name}`" not in document] == []


def test_damaged_results_of_one_case_do_not_affect_the_others(batch: Batch) -> None:
    keys = [batch.done(number) for number in range(1, 8)]
    file = {key: {kind: batch.outbox / key / f"{key}.{kind}" for kind in ("png", "json", "nii.gz")} for key in keys}
    file[keys[0]]["png"].unlink()
    whole = file[keys[1]]["png"].read_bytes()
    file[keys[1]]["png"].write_bytes(whole[: len(whole) // 2])
    file[keys[2]]["json"].unlink()
    file[keys[3]]["json"].write_bytes(b'{"half": \xff')
    file[keys[4]]["json"].write_text("[]")
    file[keys[5]]["nii.gz"].unlink()
    report = batch.report()
    complaints = [case["complaints"] for case in sorted(report.json["cases"], key=lambda case: case["case"])]
    assert [len(found) for found in complaints] == [0, 0, 1, 1, 1, 1, 0]
    missing, damaged, also_damaged, mask = (found[0] for found in complaints[2:6])
    assert damaged == also_damaged
    assert len({missing, damaged, mask}) == 3
    assert report.json["summary"]["flagged"] == 4
    texts = report.page.texts
    assert sorted(texts["complaint"]) == sorted(2 * [missing, damaged, also_damaged, mask])  # in the index and the case
    assert len(set(texts["missing"])) == len(texts["missing"]) == 2  # one picture is missing, one is damaged
    assert sum(tag == "img" for tag, _ in report.page.tags) == 5


@pytest.mark.parametrize(
    "fields", [{"shape": 3}, {"encoded": 4}, {"encoder": "x", "adapters": 4}, {"adapters": [{"sha256": None}]}]
)
def test_a_description_with_wrong_entries_is_ignored(batch: Batch, fields: dict[str, Any]) -> None:
    key = batch.done(1)
    (batch.outbox / key / f"{key}.json").write_text(json.dumps(fields))
    assert batch.report().json["summary"]["made_with"] == []


def test_a_state_of_an_older_version_is_reported(batch: Batch) -> None:
    """Organs of the older version have four fields."""
    key = batch.done(1)
    old = [{name: value for name, value in asdict(LIVER).items() if name in ("name", "label", "volume_ml", "flags")}]
    with sqlite3.connect(batch.store.path) as connection:
        connection.execute("UPDATE cases SET organs = ? WHERE key = ?", (json.dumps(old), key))
    connection.close()
    report = batch.report()
    (row,) = report.rows
    assert (row["volume_ml"], row["support_min_ml"], row["confidence"], row["median_hu"]) == ("1500.25", "", "", "")
    assert sum(tag == "svg" for tag, _ in report.page.tags) == 0


def test_an_empty_outbox_has_a_report(batch: Batch) -> None:
    report = batch.report()
    assert set(report.page.texts["figure"]) == set(report.page.texts["none"])
    assert report.rows == []
    assert report.json["cases"] == []


def test_a_range_from_zero_to_zero_can_be_drawn(batch: Batch) -> None:
    batch.done(1, SegmentedOrgan("liver", 1, 0.0, ("empty",), (0.0, 0.0)))
    assert "nan" not in batch.report().html


def test_the_same_state_gives_the_same_bytes(batch: Batch) -> None:
    batch.done(1, LIVER, SMALL)
    batch.failed(2)
    batch.report()
    before = {path.name: path.read_bytes() for path in batch.outbox.glob("report.*")}
    assert sorted(before) == ["report.csv", "report.html", "report.json"]
    batch.at(5000)
    batch.report()
    assert {path.name: path.read_bytes() for path in batch.outbox.glob("report.*")} == before


def test_an_interrupted_report_does_not_replace_the_earlier_page(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    batch.done(1)
    batch.report()
    before = (batch.outbox / "report.html").read_bytes()
    batch.done(2)

    def interrupted(path: Path) -> None:
        if path.suffix == ".html":
            raise KeyboardInterrupt

    monkeypatch.setattr(atomic, "_flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batch.report()
    assert (batch.outbox / "report.html").read_bytes() == before
    assert not list(batch.outbox.glob(".*.partial*"))


def test_the_size_of_the_page_grows_only_by_its_pictures_and_some_kilobytes_per_case(batch: Batch) -> None:
    """Three pictures have the size of real ones and contain noise, which is the worst case for the compression."""
    noise = np.random.default_rng(0).normal(100, 30, (680, 1440, 1)).clip(0, 255).astype(np.uint8)
    picture = batch.outbox / "noise.png"
    Image.fromarray(np.repeat(noise, 3, axis=2)).save(picture)
    for number in range(1, 41):
        key = batch.done(number)
        if number < 4:
            shutil.copy(picture, batch.outbox / key / f"{key}.png")
    report = batch.report()
    sizes = [len(attributes["src"]) for tag, attributes in report.page.tags if tag == "img"]
    assert len(sizes) == 40
    assert max(sizes) < 400_000
    assert len(report.html) - sum(sizes) < 40 * 4_000
    widths = {int(attributes["width"]) for tag, attributes in report.page.tags if tag == "img"}
    assert widths == {90, 960}


@pytest.mark.browser
def test_a_browser_shows_the_page(batch: Batch, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("Chromium is not installed")
    key = batch.done(1, LIVER, SMALL)
    batch.failed(2)
    batch.report()
    page = (batch.outbox / "report.html").as_uri()
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    dumped = subprocess.run([*command, "--dump-dom", page], check=True, capture_output=True, timeout=120)  # noqa: S603 - Debian's own browser, on our own page
    dom = dumped.stdout.decode("utf-8")
    assert f'id="{key}"' in dom
    assert "Export it again." in dom
    picture = tmp_path / "screen.png"
    size = ["--window-size=1400,1800", f"--screenshot={picture}"]
    subprocess.run([*command, *size, page], check=True, capture_output=True, timeout=120)  # noqa: S603 - Debian's own browser, on our own page
    shown = np.asarray(Image.open(picture).convert("L"))
    assert shown.shape == (1800, 1400)
    assert len(np.unique(shown)) > 50
    assert 0.002 < float((shown < 100).mean()) < 0.5  # ink on paper
