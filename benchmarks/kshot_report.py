"""The k-shot results as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import headneck
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

Result = dict[str, Any]
_DRAWS = 3
_NAMES = [organ.name for organ in headneck.ORGANS]
_GROUPS = {
    **{name: [name] for name in _NAMES},
    "base": [organ.name for organ in headneck.BASE],
    "novel": [organ.name for organ in headneck.NOVEL],
}


def markdown(results: Sequence[Result], on: str) -> str:
    """Return the table: mean DSC over cases and draws ± the standard deviation of the draws' means.

    If draws were trained with several seeds, the table contains the results of the first one, and the spread of the
    seeds: the mean over the draws of the difference between the best and the worst seed, on base and novel organs.
    """
    columns = [*_GROUPS, "seeds, base", "seeds, novel", "parameters", "training s", "peak MiB", "s a case"]
    lines = [f"| method | k | draws | {' | '.join(columns)} |", f"|---|---|---|{'---|' * len(columns)}"]
    of_all_seeds = _grouped(results, on, all_seeds=True)
    for (method, shots), draws in sorted(_grouped(results, on).items(), key=lambda item: item[0][1]):
        spreads = [_spread_of_seeds(of_all_seeds[method, shots], _GROUPS[group]) for group in ("base", "novel")]
        cells = [_cell(_draw_means(draws, names)) for names in _GROUPS.values()]
        lines.append(
            f"| {method} | {shots} | {len(draws)} | {' | '.join(cells + spreads)} | {draws[0]['parameters']} | "
            f"{_cost(draws)} | {_mean(draws, 'seconds_a_case', 1)} |"
        )
    return "\n".join(lines)


def tuning_markdown(results: Sequence[Result], on: str, beside: Sequence[str], methods: Sequence[str]) -> str:
    """Return the table of fine-tuning: one row per method, with the mean DSC of novel and base organs for each k.

    If a mean is not over three draws, the number of draws follows the mean. The table also contains the training loss
    for each k.

    Args:
        results: all results.
        on: split that was scored.
        beside: methods for comparison.
        methods: methods of fine-tuning; their values of k are the columns.
    """
    grouped = _grouped(results, on)
    shots = sorted({k for method, k in grouped if method in methods})
    lines = [
        f"| method | parameters | {' | '.join(f'{group}, k = {k}' for group in ('novel', 'base') for k in shots)} | "
        "training loss | training s | peak MiB |",
        f"|---|---|{'---|' * (2 * len(shots) + 3)}",
    ]
    for method in (*beside, *methods):
        rows = [draws for (name, k), draws in grouped.items() if name == method and k in shots]
        if not rows:
            continue
        cells = []
        for group in ("novel", "base"):
            for k in shots:
                means = _draw_means(grouped.get((method, k), []), _GROUPS[group])
                cells.append(_cell(means) + ("" if len(means) in (0, _DRAWS) else f" ({len(means)})"))
        loss = ", ".join(_mean(grouped.get((method, k), []), "loss", 3) for k in shots)
        cost = _cost([draw for draws in rows for draw in draws])
        lines.append(f"| {method} | {rows[0][0]['parameters']} | {' | '.join(cells)} | {loss} | {cost} |")
    return "\n".join(lines)


def plot(results: Sequence[Result], on: str, path: Path) -> None:
    """Draw the DSC as a function of k, for base organs and for novel organs."""
    mpl.use("Agg")
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    grouped = _grouped(results, on)
    for panel, group in zip(panels, ("base", "novel"), strict=True):
        for method in dict.fromkeys(method for method, _ in grouped):
            points = sorted(
                (shots, means)
                for (name, shots), draws in grouped.items()
                if name == method and (means := _draw_means(draws, _GROUPS[group]))
            )
            if not points:
                continue
            centre = [float(np.mean(means)) for _, means in points]
            if method == "zero-shot":
                panel.axhline(centre[0], color="grey", linestyle=":", label=method)
                continue
            spread = [float(np.std(means)) for _, means in points]
            panel.errorbar([shots for shots, _ in points], centre, spread, marker="o", capsize=2, label=method)
        panel.set(xscale="log", xlabel="annotated scans k", ylabel="mean DSC", title=f"{group} organs")
        panel.set_xticks([1, 5, 10, 30], ["1", "5", "10", "30"])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spread_of_seeds(trained: Sequence[Result], names: Sequence[str]) -> str:
    """Return the mean over the draws of the difference between the best and the worst seed; "–" for one seed."""
    spreads = []
    for draw in {result["draw"] for result in trained}:
        means = _draw_means([result for result in trained if result["draw"] == draw], names)
        if len(means) > 1:
            spreads.append(max(means) - min(means))
    return f"{np.mean(spreads):.3f}" if spreads else "–"


def _mean(draws: Sequence[Result], key: str, digits: int) -> str:
    values = _measured(draws, key)
    return f"{np.mean(values):.{digits}f}" if values else "–"


def _cost(draws: Sequence[Result]) -> str:
    return f"{_mean(draws, 'seconds', 0)} | {max(_measured(draws, 'peak_mib'), default='–')}"


def _measured(draws: Sequence[Result], key: str) -> list[float]:
    """Return the values of one key in the results; a value is null if other work on the machine disturbed the run."""
    return [draw[key] for draw in draws if draw.get(key) is not None]


def _grouped(results: Sequence[Result], on: str, *, all_seeds: bool = False) -> dict[tuple[str, int], list[Result]]:
    """Return the results on a split by method and k, those of the first seed or of all seeds."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if result["on"] == on and (all_seeds or not result.get("repeat")):
            groups.setdefault((result["method"], result["shots"]), []).append(result)
    return groups


def _draw_means(draws: Sequence[Result], names: Sequence[str]) -> list[float]:
    means = []
    for draw in draws:
        cases = list(draw["scores"].values())
        if all(name in cases[0] for name in names):
            means.append(float(np.mean([case[name] for case in cases for name in names])))
    return means


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values):.3f}" if len(values) > 1 else "")
