"""Line charts as inline SVG. Series are told apart by dashes and marks as well as by colour."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dcase.report.html import Html, el, join

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 18, 14, 42
MOST_POINTS = 200  # of a series
STYLES = 6  # of lines, in page.css


class Series(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]


class Axis(NamedTuple):
    """From ``low`` to ``high``, on a straight scale."""

    label: str
    low: float
    high: float
    ticks: Sequence[float]
    text: Callable[[float], str] = lambda value: f"{value:g}"


def axis(label: str, values: Sequence[float], text: Callable[[float], str] | None = None, n: int = 5) -> Axis:
    """An axis with about ``n`` round ticks that has room for all of the values."""
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
    step = _round_up((high - low) / n)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    ticks = [low + i * step for i in range(round((high - low) / step) + 1)]
    return Axis(label, low, high, ticks, text or _thousands)


def _round_up(step: float) -> float:
    """To 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _thousands(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.10g}"


def lines(name: str, title: str, x: Axis, y: Axis, series: Sequence[Series], *behind: Html) -> Html:
    """A chart with its legend below; ``behind``: drawn first, in the places of `place`."""
    drawn = [_line(i, line, x, y) for i, line in enumerate(series)]
    parts = ", ".join(f"{line.name}: {y.text(line.y[0])} to {y.text(line.y[-1])}" for line in series if len(line.y))
    text = el("title", f"{title}. {parts}", id=f"{name}-svg")
    chart = el(
        "svg",
        text,
        _grid(x, y),
        *behind,
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-svg",
    )
    legend = "" if len(series) < 2 else el("ul", *(_entry(i, s.name) for i, s in enumerate(series)), class_="legend")
    return el("figure", el("figcaption", title), chart, legend, id=name, class_="chart")


def place(x: Axis, y: Axis, at_x: float, at_y: float) -> tuple[float, float]:
    """Values -> coordinates in the drawing."""
    across = (at_x - x.low) / (x.high - x.low)
    up = (at_y - y.low) / (y.high - y.low)
    return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _grid(x: Axis, y: Axis) -> Html:
    drawn = []
    bottom = HEIGHT - BOTTOM
    for tick in y.ticks:
        _, at = place(x, y, x.low, tick)
        drawn.append(el("path", d=f"M{LEFT} {at:.1f}H{WIDTH - RIGHT}", class_="grid"))
        drawn.append(el("text", y.text(tick), x=LEFT - 6, y=f"{at + 4:.1f}", text_anchor="end"))
    for tick in x.ticks:
        at, _ = place(x, y, tick, y.low)
        drawn.append(el("path", d=f"M{at:.1f} {bottom}v4", class_="axis"))
        drawn.append(el("text", x.text(tick), x=f"{at:.1f}", y=bottom + 17, text_anchor="middle"))
    drawn.append(el("path", d=f"M{LEFT} {bottom}H{WIDTH - RIGHT}", class_="axis"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    drawn.append(el("text", x.label, x=f"{middle:.0f}", y=HEIGHT - 6, text_anchor="middle", class_="label"))
    up = (TOP + bottom) / 2
    turned = {"transform": f"translate(13 {up:.0f}) rotate(-90)"}
    drawn.append(el("text", y.label, text_anchor="middle", class_="label", **turned))
    return join(*drawn)


def _line(number: int, series: Series, x: Axis, y: Axis) -> Html:
    step = max(1, math.ceil(len(series.x) / MOST_POINTS))
    pairs = list(zip(series.x, series.y, strict=True))
    shown = [*pairs[:-1:step], *pairs[-1:]]
    points = [place(x, y, *pair) for pair in shown]
    style = f"line{number % STYLES}"
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    marks = [el("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=3, class_=style) for px, py in points if len(points) <= 30]
    return join(el("path", d=path, class_=style) if len(points) > 1 else "", *marks)


def _entry(number: int, name: str) -> Html:
    path = el("path", d="M1 6H33", class_=f"line{number % STYLES}")
    sample = el("svg", path, viewBox="0 0 34 12", aria_hidden="true", class_="sample")
    return el("li", sample, f" {name}")
