"""The pictures of the README and of docs/, from what the repository makes itself: `make pictures`, after `make demo`.

log_mels, devices, patches, directions    figures of examples/first_steps.ipynb, which is executed
report, device                            the page of the demo's last test, in headless Chromium
"""

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
# Pictures, and the cells of the notebook that draw them.
CELLS = {"log_mels": "cell-10", "devices": "cell-12", "patches": "cell-18", "directions": "cell-20"}
WIDTH, HEIGHT = 1180, 860  # CSS pixels of a screenshot

sys.path.insert(0, str(ROOT / "tests"))
from browser import Browser, find_browser  # noqa: E402


def save(name: str, png: bytes) -> None:
    """With 256 colours: a third of the bytes, and no eye sees it."""
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(IMAGES / f"{name}.png", optimize=True)


def from_notebook() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    cells = {cell.id: cell for cell in notebook.cells}
    for name, cell in CELLS.items():
        (png,) = [output.data["image/png"] for output in cells[cell].outputs if "image/png" in output.get("data", {})]
        save(name, base64.b64decode(png))


def from_report(page: Path) -> None:
    browser = find_browser()
    if browser is None:
        sys.exit("no Chromium is here: make browser")
    with Browser(browser) as tab, tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        tab.screen((WIDTH, HEIGHT))
        tab.open(page.resolve().as_uri())
        tab.screenshot(shot)
        save("report", shot.read_bytes())
        tab.click("p.lead a")  # the weakest device
        tab.screenshot(shot)
        save("device", shot.read_bytes())


def main(project: str = "demo_runs") -> None:
    pages = sorted(Path(project).glob("*/report/index.html"), key=lambda path: path.stat().st_mtime)
    if not pages:
        sys.exit(f"{project} has no report: make demo")
    from_report(pages[-1])
    from_notebook()


if __name__ == "__main__":
    main(*sys.argv[1:])
