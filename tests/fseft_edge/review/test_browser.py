"""The review page in a real browser: headless Chromium, with WebGL computed on the CPU."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from doubles.browser import Tab
from doubles.encoder import label_of, scan
from doubles.reviewed import PATIENT, Batch, add_failure, run_batch
from doubles.reviewer import served

from fseft_edge.outbox.records import CaseState, Decision
from fseft_edge.outbox.store import Outcome
from fseft_edge.review.browser import open_in_browser
from fseft_edge.review.server import open_review

pytestmark = pytest.mark.browser

ORANGE, BLUE = np.array([255, 150, 0]), np.array([60, 185, 255])


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path)


def test_a_batch_is_reviewed_with_the_keyboard(batch: Batch, tab: Tab) -> None:
    """Open the page, scroll, accept, and reject with a note; every request goes to this machine."""
    plain, flagged = batch.keys
    failed = add_failure(batch)
    with served(batch.outbox) as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.wait("#message:not([hidden])")
        assert "token" not in tab.page.url
        assert tab.text("#progress") == "0 of 2 decided"
        assert f"{failed} is not a NIfTI file" in tab.text("#message")
        assert tab.text("#title") == failed
        assert not tab.page.is_visible("#accept")

        tab.page.keyboard.press("n")
        tab.shown(flagged)
        first = tab.canvas()
        assert first.std() > 20  # the canvas is not empty
        assert "small" in tab.text("#organs")

        assert tab.moved(lambda: tab.page.keyboard.press("ArrowUp")) == [1, 0, 0]
        assert tab.moved(lambda: tab.page.keyboard.press("ArrowLeft")) == [0, 0, 1]
        assert (tab.canvas() != first).any()
        tab.page.mouse.move(500, 300)  # in the axial plane
        before = tab.canvas()
        steps = tab.moved(lambda: tab.page.mouse.wheel(0, 100))
        assert [abs(step) for step in steps] == [1, 0, 0]
        assert (tab.canvas() != before).any()

        tab.page.keyboard.press("a")
        tab.wait("#decided:has-text('accepted')")
        assert tab.text("#progress") == "1 of 2 decided"
        tab.page.keyboard.press("p")
        tab.wait("#message:not([hidden])")
        left = tab.canvas()[200:-20, 20:-20]  # below the message, without the border of the canvas
        assert (left == left[0, 0]).all()  # the earlier scan is not visible any more
        tab.page.keyboard.press("n")
        tab.shown(flagged)
        tab.page.keyboard.press("n")
        tab.shown(plain)
        note = "<b>an</b> <img src=x onerror=alert(1)> apron"
        tab.page.fill("#note", note)  # in the note the keys n, p, a and r only write text
        assert tab.text("#title") == plain
        tab.page.keyboard.press("Escape")
        tab.page.keyboard.press("r")
        tab.wait("#decided:has-text('rejected')")
        assert tab.text("#progress") == "2 of 2 decided"
        assert tab.page.input_value("#note") == note
        assert PATIENT not in tab.page.content()
        hosts = {urlsplit(url).netloc for url in tab.requested if not url.startswith("data:")}
        assert hosts == {reviewer.host}
    with batch.store() as store:
        assert store.case(flagged).review.decision == Decision.ACCEPTED
        assert (store.case(plain).review.decision, store.case(plain).review.note) == (Decision.REJECTED, note)
    assert tab.problems == []


@pytest.mark.parametrize("axes", ["RAS", "PLI"])
def test_the_display_is_radiological_and_every_organ_has_its_colour(tmp_path: Path, tab: Tab, axes: str) -> None:
    """The liver (label value 2, blue) is on the patient's right, the spleen (label value 1, orange) on the left."""
    patient = scan(1)
    towards_right = patient.labels.affine[0, :3]
    liver, spleen = (
        np.argwhere(patient.labels.array == label_of(organ)).mean(0) @ towards_right for organ in ("liver", "spleen")
    )
    assert liver > spleen
    batch = run_batch(tmp_path, (1,), axes=axes)
    with served(batch.outbox) as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.shown(batch.keys[0])
        tab.page.select_option("#planes", "coronal")
        tab.page.keyboard.press("0")
        tab.page.wait_for_timeout(500)
        seen = tab.canvas()
    blue, orange = (np.argwhere(np.abs(seen - colour).sum(2) < 40) for colour in (BLUE, ORANGE))
    assert min(len(blue), len(orange)) > 20
    assert blue[:, 1].mean() < orange[:, 1].mean()


def test_without_webgl_the_preview_picture_and_the_reason_are_shown(batch: Batch, tab: Tab) -> None:
    tab.page.add_init_script(
        "const get = HTMLCanvasElement.prototype.getContext;"
        "HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {"
        " return kind === 'webgl2' ? null : get.call(this, kind, ...rest); };"
    )
    with served(batch.outbox) as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.shown(batch.keys[1])
        assert "WebGL2" in tab.text("#message")
        assert tab.page.is_visible("#picture")
        assert tab.page.evaluate("document.getElementById('picture').naturalWidth") == 60
        batch.mask(batch.keys[0], ".png").unlink()
        tab.page.keyboard.press("n")
        tab.wait(f'#message:has-text("{batch.keys[0]} cannot be displayed")')
        assert tab.page.is_disabled("#accept")
        assert not tab.page.is_visible("#picture")


def test_a_case_that_cannot_be_displayed_cannot_be_accepted(batch: Batch, tab: Tab) -> None:
    batch.source(batch.keys[1]).unlink()
    with served(batch.outbox) as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.wait('#message:has-text("cannot be displayed")')
        assert tab.page.is_disabled("#accept")
        tab.page.keyboard.press("a")
        tab.page.keyboard.press("n")
        tab.shown(batch.keys[0])
    with batch.store() as store:
        assert store.case(batch.keys[1]).review is None


def test_the_file_for_the_default_browser_leads_to_the_page(
    batch: Batch, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a browser, a file is another site, whose redirects carry no strict cookie."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    with served(batch.outbox) as reviewer, open_in_browser(reviewer.server):
        tab.page.goto(opened[0])
        tab.shown(batch.keys[1])
        assert tab.page.url == f"http://{reviewer.host}/"
        assert not Path(url2pathname(urlsplit(opened[0]).path)).exists()
        tab.page.reload()
        tab.shown(batch.keys[1])
        tab.page.go_back()
        assert "token" not in tab.page.url


def test_the_page_shows_reviewer_history_and_warnings_and_a_mask_that_was_not_decided_on(
    batch: Batch, tab: Tab, tmp_path: Path
) -> None:
    plain, flagged = batch.keys
    batch.decide(flagged, Decision.REJECTED, "<b>the tip</b>")
    with batch.store() as store:
        store.end(flagged, Outcome(CaseState.DONE, store.case(flagged).organs, warnings=("The table drifts.",)))
    with served(batch.outbox, reviewer="Bo Li") as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.shown(flagged)
        assert tab.text("#reviewer") == "Reviewer: Bo Li"
        assert tab.text("#warnings") == "The table drifts."
        assert tab.text("#decided") == "rejected"
        tab.page.fill("#note", "fine")
        tab.page.click("#accept")
        tab.wait("#decided:has-text('accepted')")
        later, earlier = tab.text("#history").splitlines()
        assert re.fullmatch(r"accepted \d{4}-\d\d-\d\d \d\d:\d\d UTC by Bo Li: fine", later)
        assert re.fullmatch(r"rejected .* UTC by Ada Lovelace: <b>the tip</b>", earlier)
    (tmp_path / "corrected").mkdir()
    shutil.copy(batch.mask(plain), tmp_path / "corrected" / f"{flagged}.nii.gz")
    with served(batch.outbox, corrected=tmp_path / "corrected") as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.shown(flagged)
        assert tab.text("#decided") == "accepted, but for another mask. Decide again."
        assert "This is the corrected mask." in tab.text("#warnings")
        tab.page.keyboard.press("a")
        tab.wait("#decided:text-is('accepted')")
    with batch.store() as store:
        assert store.case(flagged).review.mask_sha256 == hashlib.sha256(batch.mask(plain).read_bytes()).hexdigest()
    assert tab.problems == []


def test_a_wrong_token_shows_nothing(batch: Batch, tab: Tab) -> None:
    with served(batch.outbox) as reviewer:
        answer = tab.page.goto(reviewer.server.address + "x")
        assert answer.status == 403
        assert tab.page.goto(f"http://{reviewer.host}/").status == 403
        assert "case-" not in tab.page.content()


def test_a_page_of_another_server_can_neither_read_nor_decide(batch: Batch, tab: Tab) -> None:
    """For the browser another server on this machine is the same site, so it also gets the cookie."""
    with served(batch.outbox) as reviewer, open_review(batch.outbox) as other:
        tab.page.goto(reviewer.server.address)
        tab.shown(batch.keys[1])
        tab.page.route(f"http://127.0.0.1:{other.access.port}/*", lambda route: route.fulfill(body="<p>elsewhere</p>"))
        tab.page.goto(f"http://127.0.0.1:{other.access.port}/")
        outcome = tab.page.evaluate(
            """async ([host, key]) => {
              const tried = [];
              const decision = JSON.stringify({decision: "accepted", note: "", mask_sha256: "0".repeat(64)});
              for (const mode of ["cors", "no-cors"]) {
                try {
                  const answer = await fetch(`http://${host}/cases`, {credentials: "include", mode});
                  tried.push(await answer.text());
                } catch (error) { tried.push(error.name); }
              }
              try { await fetch(`http://${host}/cases/${key}/decision`,
                {method: "POST", mode: "no-cors", credentials: "include", body: decision}); }
              catch (error) { tried.push(error.name); }
              return tried;
            }""",
            [reviewer.host, batch.keys[0]],
        )
    assert not any("case-" in text for text in outcome)
    with batch.store() as store:
        assert store.case(batch.keys[0]).review is None


def test_a_decision_that_was_not_stored_is_reported(batch: Batch, tab: Tab) -> None:
    with served(batch.outbox) as reviewer:
        tab.page.goto(reviewer.server.address)
        tab.shown(batch.keys[1])
        with batch.store() as store:
            store.end(batch.keys[1], Outcome(CaseState.FAILED))
        tab.page.keyboard.press("a")
        tab.wait('#message:has-text("was not stored")')
        assert tab.text("#progress") == "0 of 2 decided"
