"""How far training is: Lightning's bars in a terminal, lines in a log file."""

import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from dcase.progress import on_terminal
from dcase.training import processes


class Bars(TQDMProgressBar):
    """Lightning's bars in a terminal; in a log file a line per epoch, in place of a line per step."""

    def __init__(self):
        super().__init__(refresh_rate=1 if on_terminal() else 0, leave=False)

    def print(self, *args, **kwargs) -> None:
        if on_terminal():
            super().print(*args, **kwargs)
        elif processes.is_main():
            print(*args, flush=True, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_start(trainer, *args)
        self._begin(trainer)  # a run that is resumed within an epoch does not start it

    def on_train_epoch_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self.began = time.monotonic()
        # Lightning's counts from 0, and every other line of ours from 1.
        self.train_progress_bar.set_description(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}")

    def tell(self, trainer: pl.Trainer, loss: float) -> None:
        """Of an epoch that is over."""
        if not on_terminal():
            seconds = time.monotonic() - self.began
            epoch = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            self.print(f"{epoch}: training loss {loss:.4f}, {seconds:.0f} s")
