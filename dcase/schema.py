"""Plain values from files against the type that they must have: a dataclass, or a `Schema` of what a file must hold.

pydantic checks the types strictly: "12" is no number, True is no 1, and NaN and infinities are refused everywhere.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dcase.errors import UserError, one_line
from dcase.files import regular

Type = TypeVar("Type")
Count = Annotated[int, Field(ge=0, le=2**40)]
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(max_length=1000)]


class WrongType(UserError):
    """Values of a file are of a wrong type or out of range."""


class Schema(BaseModel):
    """What a file must hold. Further keys pass; a key that older files lack has a default here."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def checked(kind: type[Type], values: Any, what: str = "") -> Type:
    """Return ``values`` as ``kind``: a dataclass, which is made of them as JSON holds them, or a `Schema`.

    Raises `UserError`, which begins with ``what`` and names the place in the values: `WrongType`, or what the
    dataclass's own checks raise.
    """
    what = f"{what}: " if what else ""
    try:
        if issubclass(kind, BaseModel):
            return kind.model_validate(values)
        return _adapter(kind).validate_json(json.dumps(values, allow_nan=False), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:50] for part in first["loc"]) or "its content"
        raise WrongType(f"{what}{place}: {first['msg']}") from error
    except (TypeError, ValueError, RecursionError) as error:  # no JSON can hold them
        raise WrongType(f"{what}{one_line(error):.200}") from error
    except UserError as error:
        raise UserError(f"{what}{error}") from error


_adapter = lru_cache(TypeAdapter)


def read_json(kind: type[Schema], path: Path, advice: str) -> dict:
    """Return the content of a JSON file that must be a ``kind``. Raises `UserError`, naming it, where it is not."""
    try:
        content = json.loads(regular(path).read_text(encoding="utf-8"))
        checked(kind, content)
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error):.300}): {advice}") from error
    return content
