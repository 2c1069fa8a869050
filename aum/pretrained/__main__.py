"""Show what `load_pretrained` does with a checkpoint's weights, without training.

    python -m aum.pretrained vim_t_midclstok.pth                  # the model that wrote the file
    python -m aum.pretrained aum-base.pth --source_grid 8,64 --model aum_base --direction fo_bi --pos_embed True

Without --model, the shape is the file's, and flags override it. An unexpected file ends with one line and exit code 1.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

from aum.model import AudioMamba, AuMConfig, create_config, list_models
from aum.pretrained.layouts import PretrainedError
from aum.pretrained.source import UnknownGrid, read_source
from aum.pretrained.transfer import load_pretrained


def main(args: Sequence[str] | None = None) -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser("python -m aum.pretrained", description=__doc__.splitlines()[0])
    parser.add_argument(
        "path", help="checkpoint of Vim, AuM, the earlier code or a run (.pth, .ckpt, ...), or save_pretrained's folder"
    )
    parser.add_argument(
        "--source_grid", type=_pair, metavar="MEL,TIME", help="patches that its position embedding stands for"
    )
    parser.add_argument("--model", choices=list_models(), help="named size to load it into; without it, the file's")
    shape = parser.add_argument_group("the model's shape", "fields of aum.AuMConfig")
    for field in dataclasses.fields(AuMConfig):
        kind = type(field.default or ()) if field.name in ("strides", "stem") else type(field.default)
        read = _pair if field.name in ("strides", "patch_size") else _READ[kind]
        shape.add_argument(f"--{field.name}", type=read, metavar="N,N" if kind is tuple else kind.__name__.upper())
    given = {name: value for name, value in vars(parser.parse_args(args)).items() if value is not None}
    path, source_grid, name = given.pop("path"), given.pop("source_grid", None), given.pop("model", None)
    try:
        source = read_source(path)
        if name:
            config = create_config(name, **given)
        else:
            config = dataclasses.replace(source.config, **source.told(source_grid) | given)
        print(load_pretrained(AudioMamba(config), source, source_grid=source_grid))
    except UnknownGrid as error:
        return _fail(f"{error}: give --source_grid MEL,TIME")
    except PretrainedError as error:
        return _fail(str(error))
    except ValueError as error:  # its message begins with the field's name, which is the flag's
        return _fail(f"--{error}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(value) for value in text.split(",") if value)


def _pair(text: str) -> tuple[int, int]:
    values = _numbers(text)
    if len(values) != 2 or min(values) < 1:
        raise argparse.ArgumentTypeError(f"two whole numbers with a comma between them, not {text}")
    return values


def _bool(text: str) -> bool:
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"True or False, not {text}")
    return text == "True"


_READ = {int: int, float: float, str: str, bool: _bool, tuple: _numbers}


if __name__ == "__main__":
    sys.exit(main())
