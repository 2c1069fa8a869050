"""How figures and names are written in tables, charts and pages."""

from dcase.data.labels import TAU22_LABELS, Labels
from dcase.report.bootstrap import Estimate


def percent(fraction: float | None) -> str:
    """0.81623 -> 81.62; "-" for None."""
    return "-" if fraction is None else points(100 * fraction)


def with_unit(fraction: float | None) -> str:
    return "-" if fraction is None else f"{percent(fraction)} %"


def points(number: float) -> str:
    return f"{number:.2f}"


def loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def difference(fraction: float | None) -> str:
    """Return percentage points with their sign."""
    return "-" if fraction is None else f"{100 * fraction:+.2f}"


def count(n: int) -> str:
    return f"{n:,}"


def title(name: str) -> str:
    """metro_station -> Metro Station."""
    return name.replace("_", " ").title()


def group(name: str, labels: Labels, devices: str = "") -> str:
    """real -> Real (A, B, C); ``devices``: a word behind the name, as "devices"."""
    members = ", ".join(device.upper() for device in labels.device_groups.get(name, ()))
    return f"{' '.join(filter(None, (title(name), devices)))} ({members})"


def simulated(name: str, labels: Labels) -> str:
    """Return "simulated, " for a group of TAU22's simulated devices, else ""."""
    return "simulated, " if labels == TAU22_LABELS and name != "real" else ""


def locations(n: int) -> str:
    return f"{n:,} recording {'location' if n == 1 else 'locations'}"


def shown(value: object) -> str:
    """Return a flag's value as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def interval(estimate: Estimate | None, write=percent) -> str:
    """Return "78.10 to 84.90"; "-" where there is no interval."""
    if estimate is None or estimate.low is None:
        return "-"
    return f"{write(estimate.low)} to {write(estimate.high)}"


def brackets(estimate: Estimate) -> str:
    """Return " (95 %: 78.10 to 84.90)", to follow a figure; "" where there is no interval."""
    return "" if estimate.low is None else f" (95 %: {interval(estimate)})"


def aside(estimate: Estimate) -> str:
    """Return a difference as "3.20 points above"."""
    return f"{abs(100 * estimate.value):.2f} points {'above' if estimate.value >= 0 else 'below'}"
