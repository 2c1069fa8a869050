"""A run's checkpoints as a W&B artifact (--log_checkpoints): upload from its folder, download on another machine."""

import tempfile
from pathlib import Path

from dcase.errors import one_line
from dcase.runs.folder import CROSS_FIT, Run

KIND = "checkpoints"  # type of the artifact
_FILES = ("config.json", "metrics.csv", f"{CROSS_FIT}/logits.npz")  # beside the checkpoints: what a run needs to go on


def name_of(run_id: str) -> str:
    return f"{KIND}-{run_id}"


def upload(experiment, run: Run) -> None:
    """Log the run's current files as its artifact's newest version; W&B does not send unchanged files again.

    ``experiment``: W&B's run.
    """
    import wandb

    artifact = wandb.Artifact(name_of(run.id), type=KIND)
    checkpoints = (path for path in sorted(run.checkpoints.rglob("*")) if path.is_file() and _is_kept(path))
    for path in (*(run.folder / name for name in _FILES), *checkpoints):
        if path.is_file():
            artifact.add_file(str(path), name=path.relative_to(run.folder).as_posix())
    experiment.log_artifact(artifact)


def _is_kept(path: Path) -> bool:
    half_written = path.name.startswith(".")
    return not half_written and path.suffix in (".ckpt", ".json") and path.name != "previous.ckpt"


def fetch(project_name: str, run_id: str, wandb_mode: str | None, logger: str | None = None) -> None:
    """Make the run's folder from its artifact, where it is missing here and W&B may be asked; print the outcome.

    A run that is here is never overwritten.
    """
    run = Run(Path(project_name) / run_id)
    may_ask = wandb_mode not in ("offline", "disabled") and logger in (None, "wandb") and Path(run_id).name == run_id
    if run.has_config() or not may_ask:
        return
    try:
        import wandb

        if not wandb.login(prompt=False, verify=False):
            return
        print(f"run {run_id} is not in {project_name}/: asking W&B for its checkpoints")
        artifact = wandb.Api(timeout=30).artifact(f"{Path(project_name).name}/{name_of(run_id)}:latest", type=KIND)
        _download(artifact, run)
    except Exception as error:  # no such artifact, no network, no space: `find_run` says what is missing
        print(f"W&B cannot give them ({type(error).__name__}: {one_line(error)})")
    else:
        print(f"fetched from W&B: {run.folder}/")


def _download(artifact, run: Run) -> None:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, then renamed: a partial download must not look like a run.
    with tempfile.TemporaryDirectory(prefix=f".{run.id}.", dir=run.folder.parent) as beside:
        whole = Path(beside) / run.id
        artifact.download(root=str(whole))
        if not (whole / "config.json").is_file():
            raise FileNotFoundError("the artifact holds no config.json")
        whole.rename(run.folder)  # fails where another process of the run was faster
