"""Pages from templates/: each is one HTML file that contains its style and script and needs no network."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_context

from dcase.data.labels import Labels
from dcase.files import replace_file
from dcase.report import words
from dcase.report.bootstrap import FEW, FEWEST
from dcase.report.sounds import AUDIO_SECONDS

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals |= {"FEW": FEW, "FEWEST": FEWEST, "AUDIO_SECONDS": AUDIO_SECONDS}
ENVIRONMENT.filters |= {
    name: getattr(words, name)
    for name in "aside brackets count difference interval locations loss percent shown title with_unit".split()
}
for _name in ("group", "simulated"):  # these need the labels
    _write = getattr(words, _name)
    ENVIRONMENT.filters[_name] = pass_context(
        lambda page, name, *more, write=_write: write(name, page["LABELS"], *more)
    )


def write(template: str, path: Path, labels: Labels, **values: object) -> Path:
    """Render a page of data with these labels into ``path`` and return that. Raise `UserError` where that fails."""
    kinds = {device: group for group, devices in labels.device_groups.items() for device in devices}
    names = {"LABELS": labels, "SCENES": labels.scenes, "KINDS": kinds}
    text = ENVIRONMENT.get_template(template, globals=names).render(values)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path
