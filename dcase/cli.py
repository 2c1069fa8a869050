"""Flat, underscored command-line flags from dataclasses: ``--n_mels 256``, never ``--logmel.n-mels``.

A field is a flag; the docstring under it is the flag's help; its default is the flag's default.
"""

import typing
from typing import TypeVar

import tyro

Config = TypeVar("Config")

_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _pair(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Read ``tuple[int, int]`` as one argument: ``--patch_size 16,16``."""
    if typing.get_args(info.type) != (int, int):
        return None

    def read(args: list[str]) -> tuple[int, int]:
        first, second = args[0].split(",")
        return int(first), int(second)

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple) and len(value) == 2,
        str_from_instance=lambda value: [f"{value[0]},{value[1]}"],
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
