"""The commands ``fseft-edge review`` and ``adapt --from-reviewed``."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from doubles.command_line import Run, assert_error_with_remedy, runner
from doubles.encoder import label_of, write_tiny_encoder
from doubles.reviewed import PATIENT, Batch, run_batch

from fseft_edge.adapters.file import read_adapter
from fseft_edge.outbox.records import Decision

SECONDS = 60


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    return run_batch(tmp_path)


def command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).with_name("fseft-edge")), *map(str, arguments)]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(monkeypatch, capsys)


@pytest.fixture
def reviewing(batch: Batch) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(  # noqa: S603 - our own command
        command("review", batch.outbox), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate()


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_review_prints_its_address_and_at_the_end_the_number_of_decisions(
    batch: Batch, reviewing: subprocess.Popen[str], stop: signal.Signals
) -> None:
    address = reviewing.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(), urllib.request.ProxyHandler({}))
    for path, content in ((address, b'content="0; url=/"'), (address.partition("?")[0], b'<ol id="cases">')):
        with opener.open(path, timeout=SECONDS) as page:
            assert content in page.read()
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    reviewing.send_signal(stop)
    out, err = reviewing.communicate(timeout=SECONDS)
    assert reviewing.returncode == 0
    assert out == "1 of 2 decided\n"
    assert address.partition("=")[2] not in err
    assert PATIENT not in err


def test_a_folder_without_a_batch_is_refused(tmp_path: Path, run: Run) -> None:
    outcome = run("review", tmp_path)
    assert outcome.code == 2
    assert str(tmp_path) in outcome.err
    assert_error_with_remedy(outcome)


def test_an_adapter_is_trained_on_accepted_masks(batch: Batch, tmp_path: Path, run: Run) -> None:
    write_tiny_encoder(tmp_path / "tiny.encoder")
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    adapt = ["adapt", "--encoder", tmp_path / "tiny.encoder", "-o", tmp_path / "a.adapter"]
    cheap = ["--organ", f"liver={label_of('liver')}", "--method", "linear", "--levels", "finest", "--no-validate"]
    for wrong in (["--corrected", tmp_path], ["--state", tmp_path / "s"], [], ["--images", tmp_path]):
        outcome = run(*adapt, *cheap, *wrong)
        assert (outcome.code, "--from-reviewed" in outcome.err) == (2, True)
        assert_error_with_remedy(outcome)
    outcome = run(*adapt, *cheap, "--from-reviewed", batch.outbox, "--device", "cpu", "--backend", "torch")
    assert outcome.code == 0, outcome.err
    assert read_adapter(tmp_path / "a.adapter").description.shots == 1
