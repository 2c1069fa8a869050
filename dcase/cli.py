"""Flat, underscored command-line flags from dataclasses: ``--n_mels 256``, never ``--logmel.n-mels``.

A field is a flag; the docstring under it is the flag's help; its default is the flag's default.
"""

import typing
from typing import TypeVar

import tyro

Config = TypeVar("Config")

_registry = tyro.constructors.ConstructorRegistry()


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
            raise ValueError(f"two whole numbers with a comma between them, not {args[0]}")
        return values

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT" if two else "INT,...",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and (len(value) == 2 or not two),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )


def parse(
    config: type[Config], description: str, default: Config | None = None, args: list[str] | None = None
) -> Config:
    """Read ``config`` (a dataclass, its parts nested dataclasses) from the command line.

    ``default`` replaces the dataclass's own defaults; ``args`` replaces ``sys.argv[1:]``.
    A flag that does not exist, or whose value does not fit its type, ends the program with exit code 2.
    Raises `UserError` where a dataclass's own check does.
    """
    options = {} if default is None else {"default": default}
    with _registry:
        return tyro.cli(
            config,
            description=description,
            args=args,
            config=(tyro.conf.OmitArgPrefixes,),
            use_underscores=True,
            **options,
        )
