"""Progress of training and testing: Lightning's bars in a terminal, lines in a log file."""

import sys
import time

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from dcase.machine import is_main
from dcase.progress import on_terminal
from dcase.training.pace import TimeLeft, spoken

EVERY = 60  # seconds between two lines of a long epoch in a log file


class Bars(TQDMProgressBar):
    """Draws Lightning's bars where stdout is a terminal; otherwise prints a line per epoch, and one a minute within.

    Both show the time that is left; a line after the first steps says how long an epoch takes.
    """

    def __init__(self):
        self.on_terminal = on_terminal(sys.stdout)  # where Lightning draws
        super().__init__(refresh_rate=1 if self.on_terminal else 0, leave=False)
        self.said = time.monotonic()
        self.time_left: TimeLeft | None = None  # of training; `fit.train` sets it
        self.said_how_long = False

    def setup(self, trainer: pl.Trainer, *args, **kwargs) -> None:
        super().setup(trainer, *args, **kwargs)
        if self.on_terminal and trainer.strategy.root_device.type == "cuda":
            self._refresh_rate = trainer.log_every_n_steps  # to show the loss, the host waits for the GPU

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
        self.time_left.batch_ends(is_first=batch_idx == 0)
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)
        done = batch_idx + 1
        if not self.said_how_long and self.time_left.is_known():
            self.said_how_long = True
            self.print(f"an epoch takes about {spoken(self.time_left.of_epoch())}{self._left(trainer, done)}")
        self._still(_epoch(trainer), done, self.total_train_batches, self._left(trainer, done))

    def _left(self, trainer: pl.Trainer, done: int) -> str:
        """Return the words for what is left, behind a comma, where there is something to say."""
        words = self.time_left.in_words(trainer.current_epoch + 1, done)
        return words and f", {words}"

    def get_metrics(self, trainer: pl.Trainer, *args) -> dict:
        """Return what stands behind the bar of training."""
        shown = super().get_metrics(trainer, *args)
        if self.time_left is not None and self.time_left.is_known():
            done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
            shown["left"] = spoken(self.time_left.of_run(trainer.current_epoch + 1, done))
        return shown

    def on_validation_start(self, *args) -> None:
        super().on_validation_start(*args)
        self.validation_began = time.monotonic()

    def on_validation_end(self, *args) -> None:
        super().on_validation_end(*args)
        if self.time_left is not None:
            self.time_left.validation_ends(time.monotonic() - self.validation_began)

    def on_validation_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int, *args) -> None:
        super().on_validation_batch_end(trainer, module, outputs, batch, batch_idx, *args)
        self._still("validation", batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, trainer: pl.Trainer, module, outputs, batch, batch_idx: int, *args) -> None:
        super().on_test_batch_end(trainer, module, outputs, batch, batch_idx, *args)
        self._still("test", batch_idx + 1, self.total_test_batches_current_dataloader)

    def _still(self, what: str, done: int, total: int | float, left: str = "") -> None:
        if not self.on_terminal and time.monotonic() > self.said + EVERY:
            self.print(f"{what}: {done} of {total} batches{left}")

    def tell(self, trainer: pl.Trainer, loss: float) -> None:
        """Print the line of a finished epoch."""
        if not self.on_terminal:
            seconds, left = time.monotonic() - self.began, self._left(trainer, self.time_left.plan.batches)
            self.print(f"{_epoch(trainer)}: training loss {loss:.4f}, {seconds:.0f} s{left}")


def _epoch(trainer: pl.Trainer) -> str:
    return f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
