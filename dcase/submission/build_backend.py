"""Makes a wheel of the folder it lies in, so that pip installs a submission without fetching a build tool first.

`dcase.submit` puts a copy beside the package's ``pyproject.toml``, which names it as the build backend; that has the
distribution's name, version, required Python and dependencies. Python's own library is all it needs.
Source of the hooks: PEP 517 and 660; of the wheel: packaging.python.org/specifications/binary-distribution-format.
"""

import base64
import hashlib
import tomllib
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = ("__pycache__",)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """pip's hook: write the wheel into a folder and return its name."""
    package = HERE / _project()["name"]
    files = sorted(path for path in package.rglob("*") if path.is_file() and not set(LEFT_OUT) & set(path.parts))
    return _write(wheel_directory, {path.relative_to(HERE).as_posix(): path.read_bytes() for path in files})


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    """pip's hook for ``pip install -e``: a wheel that only says where the package is."""
    return _write(wheel_directory, {f"{_project()['name']}.pth": f"{HERE}\n".encode()})


def _project() -> dict:
    return tomllib.loads((HERE / "pyproject.toml").read_text())["project"]


def _write(folder, files: dict[str, bytes]) -> str:
    project = _project()
    stem = f"{project['name']}-{project['version']}"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {dependency}" for dependency in project["dependencies"]),
    ]
    wheel = [
        "Wheel-Version: 1.0",
        "Generator: dcase.submission.build_backend",
        "Root-Is-Purelib: true",
        "Tag: py3-none-any",
    ]
    files |= {f"{stem}.dist-info/METADATA": _text(metadata), f"{stem}.dist-info/WHEEL": _text(wheel)}
    record = [f"{name},sha256={_hash(content)},{len(content)}" for name, content in files.items()]
    files[f"{stem}.dist-info/RECORD"] = _text([*record, f"{stem}.dist-info/RECORD,,"])
    name = f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return name


def _text(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
