"""Pages from templates/: each is one HTML file that contains its style and script and needs no network."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dcase.data.tau22 import DEVICE_GROUPS, DEVICES, SCENES
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
ENVIRONMENT.globals |= {"SCENES": SCENES, "DEVICES": DEVICES, "DEVICE_GROUPS": DEVICE_GROUPS}
ENVIRONMENT.globals |= {"KINDS": {device: group for group, devices in DEVICE_GROUPS.items() for device in devices}}
ENVIRONMENT.filters |= {
    name: getattr(words, name)
    for name in "aside brackets count difference group interval locations loss percent shown title with_unit".split()
}


def write(template: str, path: Path, **values: object) -> Path:
    """Render a page into ``path`` and return that. Raise `UserError` where it cannot be written."""
    text = ENVIRONMENT.get_template(template).render(values)
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path
