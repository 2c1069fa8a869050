"""Charts of lines and bars as plain values; `templates/macros.html` draws them as inline SVG.

matplotlib chooses the ticks but does not draw: its SVG is three to five times the size, has fixed colours, which a dark
page cannot change, repeats its ids from chart to chart, and has no title for screen readers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import nonsingular

MOST_POINTS = 200  # of a series
STYLES = 6  # of lines, in page.css: they differ in dashes as well as in colour


class Frame(NamedTuple):
    """A drawing's size and the edges of its axes, in its own units, and the radius of a mark."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    radius: float


LARGE = Frame(440, 270, left=64, right=422, top=14, bottom=228, radius=3)
SMALL = Frame(176, 130, left=36, right=162, top=8, bottom=110, radius=2)  # no room for the axes' labels


class Series(NamedTuple):
    """A line. Without a point it is not drawn, but it keeps its style for itself."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


class Axis(NamedTuple):
    """A linear scale from ``low`` to ``high``."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str]

    def place(self, value: float, start: float, end: float) -> float:
        return start + (value - self.low) / (self.high - self.low) * (end - start)


def axis(label: str, values: Sequence[float], n: int = 5) -> Axis:
    """Return an axis with about ``n`` round ticks that has room for all of the values."""
    low, high = nonsingular(min(values), max(values), expander=0.1, tiny=1e-6)  # else equal values' ticks read the same
    ticks = MaxNLocator(n, steps=[1, 2, 5, 10]).tick_values(low, high).tolist()
    if label.endswith("(%)"):
        ticks = [tick for tick in ticks if 0 <= tick <= 100]
    return Axis(label, ticks[0], ticks[-1], ticks, _thousands)


def shares(label: str) -> Axis:
    """Return an axis of fractions, in percent."""
    return Axis(label, 0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1], lambda value: f"{100 * value:.0f}")


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.10g}"


class Bar(NamedTuple):
    low: float
    high: float
    height: float
    text: str
    strength: float  # of its colour, 0 to 1


class Line(NamedTuple):
    """A series as it is drawn."""

    style: int
    name: str
    path: str
    marks: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Chart:
    id: str
    title: str  # of the chart by itself, for screen readers too
    x: Axis
    y: Axis
    series: Sequence[Series] = ()
    caption: str = ""  # above the chart, where it is not the title
    bars: Sequence[Bar] = ()
    rule: tuple[str, tuple[float, float], tuple[float, float]] | None = None  # a straight line: its class and two ends
    frame: Frame = LARGE

    def at(self, x: float, y: float) -> tuple[str, str]:
        """Return the coordinates of a point in the drawing."""
        frame = self.frame
        across, up = self.x.place(x, frame.left, frame.right), self.y.place(y, frame.bottom, frame.top)
        return f"{across:.1f}", f"{up:.1f}"

    @property
    def lines(self) -> list[Line]:
        return [self._line(i, series) for i, series in enumerate(self.series) if len(series.y)]

    def _line(self, number: int, series: Series) -> Line:
        step = max(1, math.ceil(len(series.x) / MOST_POINTS))
        pairs = list(zip(series.x, series.y, strict=True))
        points = [self.at(*pair) for pair in (*pairs[:-1:step], *pairs[-1:])]
        path = "M" + "L".join(f"{x} {y}" for x, y in points) if len(points) > 1 else ""
        return Line(number % STYLES, series.name, path, points if len(points) <= 30 else [])

    @property
    def spoken(self) -> str:
        """What a screen reader says instead of the picture: where each line begins and ends, with four digits."""
        said = []
        for series in self.series:
            if len(series.y):
                first, last = (self.y.text(float(f"{value:.4g}")) for value in (series.y[0], series.y[-1]))
                said.append(f"{series.name}: {first} to {last}" if series.name else f"{first} to {last}")
        return f"{self.title}. {', '.join(said)}"
