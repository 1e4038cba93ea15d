"""A small drawing of a value against the range that it is expected in."""

from __future__ import annotations

from html import escape
from typing import Final

STYLE: Final = """\
.bar { display: block; overflow: visible; }
.bar .axis { stroke: var(--line); }
.bar .within { fill: var(--soft); opacity: .45; }
.bar .margin { stroke: var(--soft); }
.bar .value { fill: var(--ink); }
.bar.outside .value { fill: var(--warn); }
"""
"""CSS of the bars; colours are the page's."""

_WIDTH, _HEIGHT = 150, 16
_ROOM = 1.08


def range_bar(value: float, low: float, high: float, *, margin: float, text: str) -> str:
    """Return an inline SVG: the range as a band, its margin as a line, the value as a mark.

    Args:
        value: what was found.
        low: lower end of the range, not negative.
        high: upper end of it.
        margin: share by which a value may lie beyond either end before it is out of the ordinary.
        text: the same in words, for those who do not see the drawing, and on hover.
    """
    least, most = (1 - margin) * low, (1 + margin) * high
    end = _ROOM * max(value, most) or 1.0

    def at(amount: float) -> float:
        return round(_WIDTH * amount / end, 1)

    outside = "" if least <= value <= most else " outside"
    middle, mark = _HEIGHT / 2, at(value)
    return (
        f'<svg class="bar{outside}" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(text)}"><title>{escape(text)}</title>'
        f'<line class="axis" x1="0" x2="{_WIDTH}" y1="{middle}" y2="{middle}"/>'
        f'<line class="margin" x1="{at(least)}" x2="{at(most)}" y1="{middle}" y2="{middle}"/>'
        f'<rect class="within" x="{at(low)}" width="{max(round(at(high) - at(low), 1), 1.0)}" y="4" height="8" rx="2"/>'
        f'<rect class="value" x="{round(mark - 1.5, 1)}" width="3" y="0" height="{_HEIGHT}" rx="1"/></svg>'
    )
