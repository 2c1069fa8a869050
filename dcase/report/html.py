"""Elements of HTML as text: whatever is not `Html` already is escaped."""

import html
from collections.abc import Iterable, Sequence
from typing import Protocol


class Html(str):
    """Text that is HTML."""


class Ends(Protocol):
    """Of an interval: `bootstrap.Estimate`."""

    low: float | None
    high: float | None


def escape(content: object) -> Html:
    return content if isinstance(content, Html) else Html(html.escape(str(content)))


def join(*content: object) -> Html:
    return Html("".join(escape(part) for part in content))


def el(name: str, *content: object, **attributes: object) -> Html:
    """el("td", "a < b", class_="number") -> <td class="number">a &lt; b</td>. An attribute that is None is left out,
    one that is True has no value; data_x is data-x."""
    shown = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            shown.append(f" {key}")
        elif value is not None and value is not False:
            shown.append(f' {key}="{html.escape(str(value))}"')
    return Html(f"<{name}{''.join(shown)}>{join(*content)}</{name}>")


def void(name: str, **attributes: object) -> Html:
    """An element that has no content, as <img>."""
    return Html(el(name, **attributes).removesuffix(f"</{name}>"))


def link(to: str, *content: object) -> Html:
    """To a place on the page."""
    return el("a", *content, href=f"#{to}")


def cell(*content: object, sort: float | None = None, **attributes: object) -> Html:
    """Of a table's body; ``sort``: what the column is sorted by, where it is not the text."""
    return el("td", *content, data_sort=None if sort is None else f"{sort:.6g}", **attributes)


def table(name: str, caption: object, header: Sequence[object], rows: Iterable[Sequence[object]], **attributes) -> Html:
    """A table in a box of its own, which scrolls where the screen is narrower; the first column names the row. Cells
    that are not `cell` are made so."""
    head = el("tr", *(el("th", column, scope="col") for column in header))
    body = []
    for first, *others in rows:
        cells = (other if isinstance(other, Html) and other.startswith("<td") else cell(other) for other in others)
        body.append(el("tr", el("th", first, scope="row"), *cells))
    caption = el("caption", el("span", caption), id=f"{name}-caption")
    shown = el("table", caption, el("thead", head), el("tbody", *body), id=name, **attributes)
    return el("div", shown, class_="scroll", role="region", aria_labelledby=f"{name}-caption", tabindex=0)


def section(name: str, title: object, *content: object, level: int = 2, **attributes: object) -> Html:
    heading = el(f"h{level}", title, id=f"{name}-title")
    return el("section", heading, *content, id=name, aria_labelledby=f"{name}-title", **attributes)


def bar_cell(value: float | None, interval: Ends | None = None, kind: str = "") -> Html:
    """A bar from 0 to 1 with an interval over it. It is decoration: the table that it stands in prints the figures."""
    parts = []
    if value is not None:
        parts.append(el("i", class_=f"fill {kind}".strip(), style=f"--v:{100 * value:.2f}%"))
    if value is not None and interval is not None and interval.low is not None:
        low, high = 100 * interval.low, 100 * interval.high
        parts.append(el("i", class_="whisker", style=f"left:{low:.2f}%;width:{high - low:.2f}%"))
    return cell(el("span", *parts, class_="bar", aria_hidden="true"), class_="chart-cell")
