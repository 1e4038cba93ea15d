"""Size priors: computation from volumes, options and tables, and refused values."""

from __future__ import annotations

from pathlib import Path

import pytest
from doubles.errors import refused

from fseft_edge.adaptation.size_priors import SizePrior, parse_size_priors, read_size_priors
from fseft_edge.runtime.errors import UnreadableFileError, UsageError


def test_the_prior_is_around_the_mean_volume_and_excludes_outliers_of_five_or_more_volumes() -> None:
    four = SizePrior.from_volumes([10, 10, 10, 50], gamma=0.3)
    assert four.high_ml == pytest.approx(1.3 * 20)
    five = SizePrior.from_volumes([10, 10, 10, 10, 50], gamma=0.3)
    assert (five.low_ml, five.high_ml) == (pytest.approx(7.0), pytest.approx(13.0))


def test_the_width_of_a_prior_depends_on_the_spread_of_the_volumes() -> None:
    equal = SizePrior.from_volumes([10.0, 10.0, 10.0])
    assert (equal.low_ml, equal.high_ml) == (pytest.approx(7.0), pytest.approx(13.0))
    spread = SizePrior.from_volumes([6.0, 10.0, 14.0])  # standard deviation 4
    assert (spread.low_ml, spread.high_ml) == (pytest.approx(2.0), pytest.approx(18.0))
    few = SizePrior.from_volumes([8.0, 12.0])
    assert (few.low_ml, few.high_ml) == (pytest.approx(5.0), pytest.approx(15.0))
    wide = SizePrior.from_volumes([1.0, 1.0, 20.0])
    assert wide.low_ml == 0


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (0.0, 0.0), (-1.0, 2.0), (1.0, float("inf")), (1, float("nan"))])
def test_a_range_that_is_not_valid_is_refused(low: float, high: float) -> None:
    with refused(UsageError, "prior", f"{low:g}", f"{high:g}"):
        SizePrior(low, high)


def test_an_empty_list_of_volumes_is_refused() -> None:
    with refused(UsageError, "prior"):
        SizePrior.from_volumes([])


def test_priors_from_option_values() -> None:
    priors = parse_size_priors(["liver=1200..1800ml", "left_kidney=90.5..200"])
    assert priors == {"liver": SizePrior(1200, 1800), "left_kidney": SizePrior(90.5, 200)}
    assert parse_size_priors([]) == {}


@pytest.mark.parametrize(
    "text", ["liver", "liver=1200", "liver=..5ml", "liver=1..2l", "=1..2ml", "liver=1.2.3..4ml", "liver=5..1ml"]
)
def test_a_malformed_or_inverted_prior_is_refused(text: str) -> None:
    with refused(UsageError, "prior"):
        parse_size_priors([text])


def test_a_second_prior_of_an_organ_is_refused() -> None:
    with refused(UsageError, "liver", "--size-prior"):
        parse_size_priors(["liver=1..2ml", "liver=3..4ml"])


def test_priors_from_a_table_of_volumes(tmp_path: Path) -> None:
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
def test_a_file_that_is_not_a_table_of_volumes_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "volumes.csv"
    file.write_text(text)
    with refused(UnreadableFileError, file):
        read_size_priors(file)
