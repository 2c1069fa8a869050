"""Make a model by its name, untrained or with trained weights."""

import logging
from pathlib import Path

from aum.model import AudioMamba, create_config
from aum.pretrained import PretrainedError, load_pretrained
from aum.pretrained.source import ENDINGS, read_saved, read_source
from aum.pretrained.transfer import MUST_FIT

log = logging.getLogger(__name__)


def create_model(
    name: str,
    *,
    pretrained: Path | str | None = None,
    source_grid: tuple[int, int] | None = None,
    **overrides,
) -> AudioMamba:
    """Return an `AudioMamba` of a named size, with ``overrides`` of `AuMConfig` fields, in training mode.

    ``pretrained`` gives it the weights of a folder of `save_pretrained`, of such a repository of the Hugging Face Hub,
    "user/name", or of a file that `load_pretrained` reads. Fields that are not given are then those of the weights;
    what the weights do not say comes from the name. Where ``n_classes`` or ``head`` differs, the head is new. Patches
    and position embeddings of another size are resized. The log says what became of every tensor.

    Raises ValueError as `create_config`; `UnknownGrid` where ``source_grid`` is needed; `PretrainedError` where weights
    cannot be read, or, naming the field, where they are of another shape than the name.
    """
    named = create_config(name, **({} if pretrained else overrides))
    if pretrained is True:
        raise ValueError("pretrained is a folder, a file or a repository: this package brings no weights")
    if not pretrained:
        return AudioMamba(named)
    path = Path(pretrained)
    source = read_source(path) if path.exists() or path.suffix in ENDINGS else read_saved(str(pretrained))
    for field in MUST_FIT:
        theirs, ours = getattr(source.config, field), overrides.get(field, getattr(named, field))
        if theirs != ours:
            raise PretrainedError(
                f"{source.path} ({source.kind}) has {field}={theirs!r}, and {name} {ours!r} here: give "
                f"{field}={theirs!r}, or another name"
            )
    model = AudioMamba(create_config(name, **{**source.told(source_grid), **overrides}))
    log.info("%s", load_pretrained(model, source, source_grid=source_grid))
    model.front_end = source.front_end
    return model
