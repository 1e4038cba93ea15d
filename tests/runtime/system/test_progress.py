"""Progress displays: lines, bars, silence, and the choice between them."""

from __future__ import annotations

import io

import pytest

from fseft_edge.runtime.system.progress import RichProgress, open_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def run(total: int, seconds_each: float) -> list[str]:
    clock, stream = Clock(), io.StringIO()
    with RichProgress(stream, clock=clock).task("encode hn_002", total=total) as task:
        for _ in range(total):
            clock.now += seconds_each
            task.advance()
    return stream.getvalue().splitlines()


def test_short_work_is_one_plain_line() -> None:
    assert run(total=200, seconds_each=0.02) == ["encode hn_002: done (4.0 s)"]


def test_long_work_prints_a_line_for_each_tenth() -> None:
    lines = run(total=1000, seconds_each=0.1)
    assert lines[:2] == ["encode hn_002: 10 % (10.0 s)", "encode hn_002: 20 % (20.0 s)"]
    assert len(lines) == 10
    assert lines[-1] == "encode hn_002: done (100.0 s)"


def test_plain_lines_are_at_least_five_seconds_apart() -> None:
    assert len(run(total=20, seconds_each=1.0)) == 4  # after 5, 10 and 15 s, and at the end


def test_very_long_work_prints_a_line_at_least_every_30_seconds() -> None:
    lines = run(total=100, seconds_each=10.0)
    assert lines[0] == "encode hn_002: 3 % (30.0 s)"
    assert len(lines) == 34


def test_failing_work_ends_with_the_line_stopped() -> None:
    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError), RichProgress(stream).task("adapt", total=10) as task:
        task.advance(1 / 0)
    assert stream.getvalue().startswith("adapt: stopped")


def test_bars_are_for_terminals_and_lines_for_files() -> None:
    assert RichProgress(Terminal()).bars
    assert not RichProgress(io.StringIO()).bars


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_quiet_writes_nothing(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress(quiet=True, stream=stream) as progress, progress.task("encode", total=2) as task:
        task.advance(2)
    assert stream.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    with open_progress() as progress, progress.task("encode", total=1) as task:
        task.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "encode: done" in err


def test_bar_shows_the_name_and_fills_when_work_succeeds_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with open_progress(stream=stream) as progress, progress.task("adapt [left]", total=200) as task:
        task.advance(40)
    assert "adapt [left]" in stream.getvalue()
    assert "100 %" in stream.getvalue()


def test_bar_of_failing_work_is_not_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()

    def adapt() -> None:
        with open_progress(stream=stream) as progress, progress.task("adapt", total=200) as task:
            task.advance(40)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        adapt()
    assert "20 %" in stream.getvalue()
    assert "100 %" not in stream.getvalue()
