"""Plots as SVG in a page: text keeps its size at any width, and colours follow the page's theme.

A plot is an SVG element as wide as its place: percentages place text and points, ticks stand in margins around it, and
lines are drawn in a square of 1000 units that is stretched, with strokes that are not. The style sheet has the classes.
"""

import html
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

UNITS = 1000
MOST_POINTS = 400
"""Of a line; longer ones are thinned, with their last point kept."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a plot.

    Attributes:
        name: In the legend.
        x: Places of its points, of one length with `y`; points that are not finite are left out.
        y: Heights.
        colour: CSS class: c0, c1, .., `ensemble`, `fused` or `ink`.
        dash: Pattern: "" solid, "dashed" or "dotted".
        low: Lower edge of its band, where it has one; of one length with `y`.
        high: Upper edge.
        thin: Whether it stands behind the others.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = "ink"
    dash: str = ""
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    thin: bool = False


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a scatter plot: where, what it is called, and what is told of it."""

    name: str
    x: float
    y: float
    colour: str
    best: bool = False  # on the Pareto front
    low: float | None = None  # of the error bar
    high: float | None = None


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round numbers, a step of 1, 2 or 5 times a power of ten apart, from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis from low to high, both above 0; two at least, unless they are one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, (last - first) // 5)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) > 2:
            break
    return ticks if len(ticks) > 1 else nice_ticks(low, high)


def number(value: float) -> str:
    """Write a number of an axis briefly: 0.05, 5, 1,000, 1e-06."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.0e}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """A direction of a plot: its range, and whether it is logarithmic, or of whole numbers alone."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @classmethod
    def around(cls, values: Iterable[float], log: bool = False, zero: bool = False) -> "Axis":
        """Return the axis on which finite values lie; of a logarithmic one those above 0.

        Args:
            values: What has to be on it.
            log: Whether it is logarithmic.
            zero: Whether it begins at 0 where the least value is below 0.6 of the largest.
        """
        found = [each for each in values if math.isfinite(each) and (each > 0 or not log)]
        low, high = (min(found), max(found)) if found else (1.0, 1.0)
        if zero and not log and 0 <= low < 0.6 * high:
            low = 0.0
        if math.isclose(low, high):  # means of equal values differ in their last digits
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        elif not log:
            # A whole step on either side, so that no line lies on the frame.
            ticks = nice_ticks(low, high)
            step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, log)

    def share(self, value: float) -> float:
        """Return where a value lies, from 0 at the low end to 1; beyond the ends, the end."""
        change: Callable[[float], float] = math.log if self.log else float
        if self.log and value <= 0:
            return 0.0
        low, high = change(self.low), change(self.high)
        return min(1.0, max(0.0, (change(value) - low) / (high - low)))

    def ticks(self) -> list[float]:
        """Return the values that are written beside it."""
        if self.log:
            return log_ticks(self.low, self.high)
        return nice_ticks(self.low, self.high, min(6, int(self.high - self.low) + 1) if self.whole else 6)


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _frame(title: str, description: str, x: Axis, y: Axis, x_label: str, content: str, height: int, names: str) -> str:
    """Return an SVG with grid, ticks and content, whose coordinates are those of its inner square."""
    lines, texts = [], []
    for tick in y.ticks():
        at = _percent(1 - y.share(tick))
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        texts.append(f'<text class="tick end" x="-8" y="{at}" dy="4">{number(tick)}</text>')
    for tick in x.ticks():
        share = x.share(tick)
        anchor = " start" if share < 0.02 else " end" if share > 0.98 else " middle"
        texts.append(f'<text class="tick{anchor}" x="{_percent(share)}" y="100%" dy="18">{number(tick)}</text>')
    axis = f'<text class="label end" x="100%" y="100%" dy="36">{html.escape(x_label)}</text>'
    what = html.escape(f"{title}. {description}")
    return (
        f'<svg class="plot" role="img" height="{height}"><title>{html.escape(title)}</title><desc>{what}</desc>'
        f"{''.join(lines)}{''.join(texts)}{axis}"
        f'<svg width="100%" height="100%" viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none">{content}</svg>'
        f"{names}</svg>"
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{UNITS * x:.0f} {UNITS * (1 - y):.0f}" for x, y in points)


def _kept(count: int) -> list[int]:
    """Return the positions of the points that are drawn of so many."""
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(each * (count - 1) / (MOST_POINTS - 1)) for each in range(MOST_POINTS)})


def line_plot(
    title: str,
    description: str,
    lines: Sequence[Line],
    x_label: str,
    *,
    log: bool = False,
    zero: bool = True,
    height: int = 300,
) -> str:
    """Draw lines, with bands where they have edges, as an SVG element.

    Args:
        title: What is drawn, for those who cannot see it.
        description: What it shows, likewise.
        lines: In order of drawing; at least one with a finite point.
        x_label: Below the axis.
        log: Whether the vertical axis is logarithmic; what is not above 0 is then left out.
        zero: Whether the vertical axis begins at 0, where that is not far below.
        height: Pixels.
    """
    places = [each for line in lines for each in line.x]
    around = 0.0 if max(places) > min(places) else 0.5
    x = Axis(min(places) - around, max(places) + around, whole=all(float(each).is_integer() for each in places))
    edges = [each for line in lines for edge in (line.low, line.high) if edge for each in edge]
    y = Axis.around([*(each for line in lines for each in line.y), *edges], log, zero)
    bands, drawn = [], []
    for line in lines:
        seen = [i for i in range(len(line.x)) if math.isfinite(line.y[i]) and (line.y[i] > 0 or not log)]
        seen = [seen[each] for each in _kept(len(seen))]
        if not seen:
            continue
        if line.low is not None and line.high is not None:
            there = [(x.share(line.x[i]), y.share(line.high[i])) for i in seen]
            back = [(x.share(line.x[i]), y.share(line.low[i])) for i in reversed(seen)]
            bands.append(f'<path class="band {line.colour}" d="{_path(there + back)}Z"/>')
        points = [(x.share(line.x[i]), y.share(line.y[i])) for i in seen]
        path = _path(points) if len(points) > 1 else _path(points) + "h0"
        style = " ".join(
            each for each in ("line", line.colour, line.dash, "thin" * line.thin, "dot" * (len(points) == 1)) if each
        )
        drawn.append(f'<path class="{style}" d="{path}"><title>{html.escape(line.name)}</title></path>')
    return _frame(title, description, x, y, x_label, "".join(bands + drawn), height, "")


def reliability_plot(title: str, description: str, lines: Sequence[Line]) -> str:
    """Draw accuracy against confidence, both 0 to 1, with the diagonal on which a calibrated predictor lies."""
    drawn = ['<path class="line muted dashed" d="M0 1000L1000 0"/>']
    for line in lines:
        points = list(zip(line.x, line.y, strict=True))
        if not points:
            continue
        name = f"<title>{html.escape(line.name)}</title>"
        drawn.append(f'<path class="line {line.colour}" d="{_path(points)}">{name}</path>')
        drawn += [f'<path class="line dot {line.colour}" d="{_path([point])}h0">{name}</path>' for point in points]
    return _frame(title, description, Axis(0, 1), Axis(0, 1), "confidence", "".join(drawn), 320, "")


def scatter_plot(title: str, description: str, points: Sequence[Point], x_label: str) -> str:
    """Draw named points with error bars over a logarithmic axis; those on the Pareto front are filled and joined."""
    x = Axis.around((each.x for each in points), log=True)
    x = Axis(x.low / 1.3, x.high * 1.3, log=True)  # room for names
    y = Axis.around([edge for each in points for edge in (each.y, each.low, each.high) if edge is not None], zero=True)
    names, steps = [], []
    front = sorted((each for each in points if each.best), key=lambda each: (each.x, each.y))
    for before, after in itertools.pairwise(front):
        corner = [(before.x, before.y), (after.x, before.y), (after.x, after.y)]
        steps.append(f'<path class="line muted thin" d="{_path([(x.share(a), y.share(b)) for a, b in corner])}"/>')
    for each in points:
        across, up = _percent(x.share(each.x)), _percent(1 - y.share(each.y))
        if each.low is not None and each.high is not None:
            ends = f'y1="{_percent(1 - y.share(each.high))}" y2="{_percent(1 - y.share(each.low))}"'
            names.append(f'<line class="bar {each.colour}" x1="{across}" x2="{across}" {ends}/>')
        kind = "best" if each.best else "other"
        label = html.escape(each.name)
        names.append(
            f'<circle class="point {kind} {each.colour}" cx="{across}" cy="{up}" r="5"><title>{label}</title></circle>'
        )
        right = x.share(each.x) > 0.55
        place = 'class="name end" dx="-7"' if right else 'class="name" dx="7"'
        names.append(f'<text {place} x="{across}" y="{up}" dy="-8">{label}</text>')
    return _frame(title, description, x, y, x_label, "".join(steps), 340, "".join(names))
