"""Line charts as inline SVG. Series are told apart by dashes and marks as well as by colour."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dcase.report.html import Html, el, join

MOST_POINTS = 200  # of a series
STYLES = 6  # of lines, in page.css


class Frame(NamedTuple):
    """A drawing's size and margins, in its own units, and the radius of a mark."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    radius: float


LARGE = Frame(440, 270, left=64, right=18, top=14, bottom=42, radius=3)
SMALL = Frame(176, 130, left=36, right=14, top=8, bottom=20, radius=2)  # no room for the axes' labels


class Series(NamedTuple):
    """Without a point it is not drawn, and those behind it keep their styles."""

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
    chart = _drawing(name, title, x, y, series, LARGE, behind)
    return el("figure", el("figcaption", title), chart, legend(series), id=name, class_="chart")


def small(name: str, title: str, caption: str, x: Axis, y: Axis, series: Sequence[Series]) -> Html:
    """One of several charts that share their legend; ``title`` says it all, to those who do not see the others."""
    chart = _drawing(name, title, x, y, series, SMALL)
    return el("figure", el("figcaption", caption), chart, id=name, class_="chart")


def legend(series: Sequence[Series]) -> Html:
    """Nothing where there is only one series to be drawn."""
    entries = (_entry(i, line.name) for i, line in enumerate(series) if len(line.y))
    return Html("") if len(series) < 2 else el("ul", *entries, class_="legend")


def _drawing(
    name: str, title: str, x: Axis, y: Axis, series: Sequence[Series], frame: Frame, behind: Sequence[Html] = ()
) -> Html:
    drawn = [_line(i, line, x, y, frame) for i, line in enumerate(series) if len(line.y)]
    parts = ", ".join(_spoken(line, y) for line in series if len(line.y))
    text = el("title", f"{title}. {parts}", id=f"{name}-svg")
    size = {"viewBox": f"0 0 {frame.width} {frame.height}"}
    return el("svg", text, _grid(x, y, frame), *behind, *drawn, role="img", aria_labelledby=f"{name}-svg", **size)


def _spoken(series: Series, y: Axis) -> str:
    """What is said of a line in place of its picture: where it begins and ends, with four digits."""
    first, last = (y.text(float(f"{value:.4g}")) for value in (series.y[0], series.y[-1]))
    return f"{series.name}: {first} to {last}" if series.name else f"{first} to {last}"


def place(x: Axis, y: Axis, at_x: float, at_y: float, frame: Frame = LARGE) -> tuple[float, float]:
    """Values -> coordinates in the drawing."""
    across = (at_x - x.low) / (x.high - x.low)
    up = (at_y - y.low) / (y.high - y.low)
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    return left + across * (right - left), bottom - up * (bottom - frame.top)


def _grid(x: Axis, y: Axis, frame: Frame) -> Html:
    drawn = []
    left, right, bottom = frame.left, frame.width - frame.right, frame.height - frame.bottom
    for tick in y.ticks:
        _, at = place(x, y, x.low, tick, frame)
        drawn.append(el("path", d=f"M{left} {at:.1f}H{right}", class_="grid"))
        drawn.append(el("text", y.text(tick), x=left - 6, y=f"{at + 4:.1f}", text_anchor="end"))
    for tick in x.ticks:
        at, _ = place(x, y, tick, y.low, frame)
        drawn.append(el("path", d=f"M{at:.1f} {bottom}v4", class_="axis"))
        drawn.append(el("text", x.text(tick), x=f"{at:.1f}", y=bottom + 17, text_anchor="middle"))
    drawn.append(el("path", d=f"M{left} {bottom}H{right}", class_="axis"))
    if frame is LARGE:
        across, up = f"{(left + right) / 2:.0f}", f"{(frame.top + bottom) / 2:.0f}"
        drawn.append(el("text", x.label, x=across, y=frame.height - 6, text_anchor="middle", class_="label"))
        turned = {"transform": f"translate(13 {up}) rotate(-90)"}
        drawn.append(el("text", y.label, text_anchor="middle", class_="label", **turned))
    return join(*drawn)


def _line(number: int, series: Series, x: Axis, y: Axis, frame: Frame) -> Html:
    step = max(1, math.ceil(len(series.x) / MOST_POINTS))
    pairs = list(zip(series.x, series.y, strict=True))
    shown = [*pairs[:-1:step], *pairs[-1:]]
    points = [place(x, y, *pair, frame) for pair in shown]
    style = f"line{number % STYLES}"
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py in points)
    marks = []
    if len(points) <= 30:
        marks = [el("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=frame.radius, class_=style) for px, py in points]
    return join(el("path", d=path, class_=style) if len(points) > 1 else "", *marks)


def _entry(number: int, name: str) -> Html:
    path = el("path", d="M1 6H33", class_=f"line{number % STYLES}")
    sample = el("svg", path, viewBox="0 0 34 12", aria_hidden="true", class_="sample")
    return el("li", sample, f" {name}")
