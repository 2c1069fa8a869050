"""Progress of training and testing: Lightning's bars in a terminal, lines in a log file."""

import sys
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from dcase.machine import is_main
from dcase.progress import on_terminal

EVERY = 60  # seconds between two lines of a long epoch in a log file


class Bars(TQDMProgressBar):
    """Draws Lightning's bars where stdout is a terminal; otherwise prints a line per epoch, and one a minute within."""

    def __init__(self):
        self.on_terminal = on_terminal(sys.stdout)  # where Lightning draws
        super().__init__(refresh_rate=1 if self.on_terminal else 0, leave=False)
        self.said = time.monotonic()

    def print(self, *args, **kwargs) -> None:
        self.said = time.monotonic()
        if self.on_terminal:
            super().print(*args, **kwargs)
        elif is_main():
            print(*args, flush=True, **kwargs)

    def on_train_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_start(trainer, *args)
        self._begin(trainer)  # on_train_epoch_start is not called where a run resumes within an epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, *args) -> None:
        super().on_train_epoch_start(trainer, *args)
        self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self.began = time.monotonic()
        # Lightning's counts from 0, and every other line of ours from 1.
        self.train_progress_bar.set_description(_epoch(trainer), refresh=False)

    def on_train_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        self._still(_epoch(trainer), batch_idx + 1, self.total_train_batches)

    def on_validation_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int, *args) -> None:
        super().on_validation_batch_end(trainer, module, outputs, batch, batch_idx, *args)
        self._still("validation", batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int, *args) -> None:
        super().on_test_batch_end(trainer, module, outputs, batch, batch_idx, *args)
        self._still("test", batch_idx + 1, self.total_test_batches_current_dataloader)

    def _still(self, what: str, done: int, total: int | float) -> None:
        if not self.on_terminal and time.monotonic() > self.said + EVERY:
            self.print(f"{what}: {done} of {total} batches")

    def tell(self, trainer: pl.Trainer, loss: float) -> None:
        """Print the line of a finished epoch."""
        if not self.on_terminal:
            self.print(f"{_epoch(trainer)}: training loss {loss:.4f}, {time.monotonic() - self.began:.0f} s")


def _epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
