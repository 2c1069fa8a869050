"""Flat, underscored command-line flags from dataclasses: ``--n_mels 256``, never ``--logmel.n-mels``.

A field is a flag; the docstring under it is the flag's help; its default is the flag's default.
"""

import dataclasses
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable
from functools import partial
from typing import Annotated, TypeVar

import tyro

from dcase.errors import UserError

Config = TypeVar("Config")
NAMES = ("project_name", "experiment_name", "run_id", "resume", "ckpt_id", "label")  # flags whose value is a name

LONGEST = 255  # bytes in the name of a file or folder
_elsewhere: dict[str, str] = {}  # `parse`'s
_registry = tyro.constructors.ConstructorRegistry()
_TYROS = "by tyro's own rules"  # marks `_one_paragraph`'s question


@_registry.primitive_rule
def _integers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read ``tuple[int, int]`` and ``tuple[int, ...]`` as one argument: ``--patch_size 16,16``."""
    kinds = typing.get_args(info.type)
    if typing.get_origin(info.type) is not tuple or kinds not in ((int, int), (int, ...)):
        return None
    two = kinds == (int, int)

    def read(args: list[str]) -> tuple[int, ...]:
        values = tuple(int(value) for value in args[0].split(",") if value or two)
        if two and len(values) != 2:
            raise ValueError(f"two whole numbers separated by a comma, not {args[0]}")
        return values

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT" if two else "INT,...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and (len(value) == 2 or not two),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


@_registry.struct_rule
def _one_paragraph(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Take tyro's own reading of a dataclass, with each field's help as one paragraph: tyro keeps the source's line
    breaks."""
    if _TYROS in info.markers:
        return None
    spec = _registry.get_struct_spec(dataclasses.replace(info, markers=(*info.markers, _TYROS)))
    if not isinstance(spec, tyro.constructors.StructConstructorSpec):
        return None
    return dataclasses.replace(spec, fields=tuple(map(_shown, spec.fields)))


def _shown(field: tyro.constructors.StructFieldSpec) -> tyro.constructors.StructFieldSpec:
    """Return a field as --help shows it."""
    kind = field.type
    if field.name in _elsewhere:
        kind = Annotated[kind, tyro.conf.arg(help_behavior_hint=f"(default: {_elsewhere[field.name]})")]
    return dataclasses.replace(field, type=kind, helptext=partial(_unfolded, field.helptext))


def _unfolded(text: str | Callable[[], str | None] | None) -> str | None:
    """Return a help text in one line. It may be a function, since tyro reads docstrings only when it needs them."""
    text = text() if callable(text) else text
    return text and " ".join(text.split())


def flowing(text: str, width: int) -> str:
    """Return a docstring with its paragraphs wrapped to ``width``; indented ones, such as commands, stay."""
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    fill = partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)  # flags and paths
    return "\n\n".join(part if part.startswith(" ") else fill(part) for part in paragraphs)


def _module() -> str | None:
    """Return how the usage names a module that `python -m` runs; None for a script, whose path it shows."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec and f"python -m {spec.name.removesuffix('.__main__')}"


def flags_of(config, parts: tuple[str, ...] | None = None) -> dict:
    """Return flag -> value of a configuration, or of some of its parts."""
    flags = {}
    for name, value in vars(config).items():
        if parts is None or name in parts:
            flags |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    return flags


def check_text(flag: str, value: object) -> None:
    """Raise `UserError` where a flag's text cannot be a name or a path, or would be taken for a flag or obeyed by the
    terminal where it is printed."""
    if not isinstance(value, str):
        return
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", value):
        raise UserError(f"--{flag} has a control character or a line break in it: {value[:200]}")
    if flag in NAMES and value.startswith("-"):
        raise UserError(f"--{flag} {value[:200]} begins with -, as flags do: give another name")
    for part in re.split("[/,]", value):
        if len(os.fsencode(part)) > LONGEST:
            raise UserError(f"--{flag}: {part[:20]}... has {len(part)} characters: names have at most {LONGEST} bytes")


def parse(
    config: type[Config],
    description: str,
    default: Config | None = None,
    args: list[str] | None = None,
    elsewhere: dict[str, str] | None = None,
) -> Config:
    """Read ``config`` (a dataclass, its parts nested dataclasses) from the command line.

    ``default`` replaces the dataclass's own defaults; ``args`` replaces ``sys.argv[1:]``. ``elsewhere`` is for --help:
    flags whose default is another than the dataclass's, and how to describe it.
    A flag that does not exist, or whose value does not fit its type, ends the program with exit code 2.
    Raises `UserError` where a dataclass's own check does, and `check_text`.
    """
    options = {} if default is None else {"default": default}
    if {"-h", "--help"} & set(sys.argv[1:] if args is None else args):
        # tyro would print it after the usage, in lines as long as its paragraphs.
        print(flowing(description, shutil.get_terminal_size().columns), end="\n\n")
    _elsewhere.clear()
    _elsewhere.update(elsewhere or {})
    parsed = tyro.cli(
        config,
        prog=_module(),
        description="",
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        registry=_registry,
        **options,
    )
    for flag, value in flags_of(parsed).items():
        check_text(flag, value)
    return parsed
