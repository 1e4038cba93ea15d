"""Priors on organ sizes: how they come about, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fseft_edge.adaptation.size_priors import SizePrior, parse_size_priors, read_size_priors
from fseft_edge.runtime.errors import UnreadableFileError, UsageError


def test_the_prior_is_the_mean_of_the_volumes_less_outliers_from_five_on() -> None:
    four = SizePrior.from_volumes([10, 10, 10, 50], gamma=0.3)
    assert four.high_ml == pytest.approx(1.3 * 20)
    five = SizePrior.from_volumes([10, 10, 10, 10, 50], gamma=0.3)
    assert (five.low_ml, five.high_ml) == (pytest.approx(7.0), pytest.approx(13.0))


def test_a_prior_is_as_wide_as_the_volumes_say() -> None:
    alike = SizePrior.from_volumes([10.0, 10.0, 10.0])
    assert (alike.low_ml, alike.high_ml) == (pytest.approx(7.0), pytest.approx(13.0))
    unlike = SizePrior.from_volumes([6.0, 10.0, 14.0])  # standard deviation 4
    assert (unlike.low_ml, unlike.high_ml) == (pytest.approx(2.0), pytest.approx(18.0))
    few = SizePrior.from_volumes([8.0, 12.0])
    assert (few.low_ml, few.high_ml) == (pytest.approx(5.0), pytest.approx(15.0))
    wild = SizePrior.from_volumes([1.0, 1.0, 20.0])
    assert wild.low_ml == 0


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (0.0, 0.0), (-1.0, 2.0), (1.0, float("inf")), (1, float("nan"))])
def test_an_impossible_prior_is_refused(low: float, high: float) -> None:
    with pytest.raises(UsageError, match="prior"):
        SizePrior(low, high)


def test_no_volume_makes_no_prior() -> None:
    with pytest.raises(UsageError, match="prior"):
        SizePrior.from_volumes([])


def test_priors_given_by_hand() -> None:
    priors = parse_size_priors(["liver=1200..1800ml", "left_kidney=90.5..200"])
    assert priors == {"liver": SizePrior(1200, 1800), "left_kidney": SizePrior(90.5, 200)}
    assert parse_size_priors([]) == {}


@pytest.mark.parametrize(
    "text", ["liver", "liver=1200", "liver=..5ml", "liver=1..2l", "=1..2ml", "liver=1.2.3..4ml", "liver=5..1ml"]
)
def test_a_malformed_or_inverted_prior_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="prior"):
        parse_size_priors([text])


def test_an_organ_has_one_prior() -> None:
    with pytest.raises(UsageError, match="two size priors"):
        parse_size_priors(["liver=1..2ml", "liver=3..4ml"])


def test_a_table_of_volumes_makes_priors(tmp_path: Path) -> None:
    file = tmp_path / "volumes.csv"
    file.write_text("\ufeffcase,organ,volume_ml\na,liver,1000\nb,liver,2000\na,spleen,100\n")
    priors = read_size_priors(file)
    assert priors["liver"].low_ml == pytest.approx(0.5 * 1500)
    assert priors["spleen"].high_ml == pytest.approx(150)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "organ\nliver\n",
        "name,ml\n",
        "organ,volume_ml\nliver,big\n",
        "organ,volume_ml\nliver\n",
        "organ,volume_ml\nliver,-100\n",
        "organ,volume_ml\nliver,nan\n",
    ],
)
def test_what_is_no_table_of_volumes_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "volumes.csv"
    file.write_text(text)
    with pytest.raises(UnreadableFileError, match=r"volumes\.csv"):
        read_size_priors(file)
