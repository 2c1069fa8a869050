"""How figures and names are written, in tables and charts."""

from typing import Protocol

from dcase.data.tau22 import DEVICE_GROUPS


def percent(fraction: float | None) -> str:
    """0.81623 -> 81.62; "-" where there is nothing to tell."""
    return "-" if fraction is None else points(100 * fraction)


def with_unit(fraction: float | None) -> str:
    return "-" if fraction is None else f"{percent(fraction)} %"


def points(number: float) -> str:
    return f"{number:.2f}"


def difference(fraction: float | None) -> str:
    """In points of percent, with its sign."""
    return "-" if fraction is None else f"{100 * fraction:+.2f}"


def title(name: str) -> str:
    """metro_station -> Metro Station."""
    return name.replace("_", " ").title()


def members(group: str) -> str:
    return ", ".join(device.upper() for device in DEVICE_GROUPS[group])


def locations(n: int) -> str:
    return f"{n:,} recording {'location' if n == 1 else 'locations'}"


class Interval(Protocol):
    """`bootstrap.Estimate`."""

    value: float | None
    low: float | None
    high: float | None


def interval(estimate: Interval | None, plain: bool = False) -> str:
    """In percent, "78.10 to 84.90"; ``plain``: as it is, with four decimals. "-" where there is none."""
    if estimate is None or estimate.low is None:
        return "-"
    return " to ".join(f"{end:.4f}" if plain else percent(end) for end in (estimate.low, estimate.high))


def brackets(estimate: Interval) -> str:
    """ " (95 %: 78.10 to 84.90)" behind a figure; nothing where it has no interval."""
    return "" if estimate.low is None else f" (95 %: {interval(estimate)})"


def aside(estimate: Interval) -> str:
    """ "3.20 points above" what a difference is to."""
    return f"{abs(100 * estimate.value):.2f} points {'above' if estimate.value >= 0 else 'below'}"


def shown(value: object) -> str:
    """Return a flag's value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
