"""``fseft-edge review`` and ``adapt --from-reviewed`` as a user runs them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
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


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(  # noqa: S603 - our own command
        command(*arguments), capture_output=True, text=True, timeout=SECONDS, check=False, env=environment
    )


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
def test_it_prints_its_address_serves_and_ends_with_what_was_decided(
    batch: Batch, reviewing: subprocess.Popen[str], stop: signal.Signals
) -> None:
    address = reviewing.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{43}", address)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(), urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=SECONDS) as page:
        assert b"<title>fseft-edge review</title>" in page.read()
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    reviewing.send_signal(stop)
    out, err = reviewing.communicate(timeout=SECONDS)
    assert reviewing.returncode == 0
    assert out == "1 of 2 decided\n"
    assert address.partition("=")[2] not in err
    assert PATIENT not in err


def test_without_a_batch_it_says_what_to_name(tmp_path: Path) -> None:
    ended = run("review", tmp_path)
    assert ended.returncode == 2
    assert "Name the OUTBOX" in ended.stderr


def test_an_adapter_is_made_from_what_was_accepted(batch: Batch, tmp_path: Path) -> None:
    write_tiny_encoder(tmp_path / "tiny.encoder")
    batch.decide(batch.keys[0], Decision.ACCEPTED)
    adapt = ["adapt", "--encoder", tmp_path / "tiny.encoder", "-o", tmp_path / "a.adapter"]
    cheap = ["--organ", f"liver={label_of('liver')}", "--method", "linear", "--levels", "finest", "--no-validate"]
    for wrong in (["--corrected", tmp_path], ["--state", tmp_path / "s"], [], ["--images", tmp_path]):
        ended = run(*adapt, *cheap, *wrong)
        assert (ended.returncode, "--from-reviewed" in ended.stderr) == (2, True)
    ended = run(*adapt, *cheap, "--from-reviewed", batch.outbox, "--device", "cpu", "--backend", "torch")
    assert ended.returncode == 0, ended.stderr
    assert read_adapter(tmp_path / "a.adapter").description.shots == 1
