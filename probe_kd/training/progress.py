"""The progress of a run: a bar in a terminal, lines in a log."""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from probe_kd.console import PlainConsole, duration
from probe_kd.measures import MEASURES, not_losses
from probe_kd.training.state import Row

LOG_EVERY = 30.0  # seconds between two lines of a log


@contextmanager
def unread() -> Iterator[None]:
    """Let the run continue if its output cannot be written, as in `train ... | head`, or to a full disk.

    rich would exit on a closed pipe.
    """
    with suppress(OSError, SystemExit):
        yield


class Progress:
    """Shows the progress of a run: a bar per stage in a terminal, elsewhere a line at least every half minute."""

    def __init__(self, console: Console, *, quiet: bool = False, bars: bool = True) -> None:
        self.console = console
        self.bars = bars and console.is_terminal and not quiet
        self.quiet = quiet
        self.bar: Bar | None = None
        self.task = TaskID(0)
        self.shown = 0.0  # when something was last shown
        self.title, self.epochs, self.images, self.started = "", 0, 0, 0.0
        self.steps = self.before = self.done = 0  # batches of an epoch, in former epochs, and in this one
        self.steps_before = 0
        self.text = ""
        self.measures = ""
        self.unit = "epoch"
        self.other_columns: Collection[str] = not_losses(())

    def begin(
        self,
        title: str,
        epochs: int,
        steps: int,
        done: int,
        first: int = 0,
        *,
        losses: Collection[str] = (),
        unit: str = "epoch",
    ) -> None:
        """Begin a stage of `epochs` epochs with `steps` steps each.

        `done` epochs are done already, and `first` steps of the epoch after them. `losses` are the names of its losses.
        `unit` is what an epoch is called.
        """
        self.unit = unit
        self.title, self.epochs, self.images = title, epochs, 0
        self.other_columns = not_losses(losses)
        self.steps, self.before, self.done = steps, done * steps, first
        self.steps_before = done * steps + first  # those of a run that was resumed took no time here
        self.started = self.shown = time.monotonic()
        self.text = self.measures = ""
        if self.bars:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[epoch]}/{task.fields[epochs]}"),
                TextColumn("{task.fields[losses]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.bar = Bar(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(
                title, total=epochs * steps, completed=done * steps, epochs=epochs, epoch=done, losses=""
            )

    def step(self, done: int, images: int) -> bool:
        """Show that `done` batches of the epoch are done, of `images` images each.

        Return whether the losses should be shown too, for which the caller has to wait for the GPU.
        """
        self.images += (done - self.done) * images
        self.done = done
        if self.bar is not None:
            self.bar.update(self.task, completed=self.before + done)
        return not self.quiet and time.monotonic() - self.shown > (LOG_EVERY if self.bar is None else 0.5)

    def say(self, text: str) -> None:
        """Print a message to stderr, even if the run is quiet."""
        with unread():
            PlainConsole(stderr=True, soft_wrap=True).print(text, highlight=False, markup=False)

    def tell(self, text: str) -> None:
        """Print a message unless the run is quiet."""
        if not self.quiet:
            with unread():
                self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def losses(self, terms: Mapping[str, float]) -> None:
        """Show the mean losses of the current epoch."""
        self.text = _text(terms)
        self.shown = time.monotonic()
        if self.bar is not None:
            self.bar.update(self.task, losses=self._status())
        elif not self.quiet:
            self._print(f"step {self.done}/{self.steps} of {self.unit} {self._epochs_done() + 1}/{self.epochs}")

    def epoch(self, row: Row) -> None:
        """Show the results of an epoch."""
        self.before, self.done = self.before + self.steps, 0
        shown = [name for name in MEASURES if name in self.other_columns and name in row]
        shown = [name for name in shown if name != "agreement" or len(shown) == 1]
        texts = [f"{MEASURES[name].title} {MEASURES[name].brief(row[name])}" for name in shown]
        self.measures = f"[green]{'  '.join(texts)}[/]" if texts else self.measures
        self.text = _text({name: value for name, value in row.items() if name not in self.other_columns})
        if self.bar is not None:
            self.bar.update(self.task, epoch=row["epoch"], losses=self._status())
        elif not self.quiet and self.is_shown(row):
            self.shown = time.monotonic()
            self._print(f"{row['epoch']}/{self.epochs}")

    def is_shown(self, row: Row) -> bool:
        """Whether an epoch has a line of its own in a log."""
        return bool(row["epoch"] == self.epochs or time.monotonic() - self.shown > 5)

    def _print(self, position: str) -> None:
        """Print one line of a log: the stage, how far it is, the losses, and the time that is left of it."""
        left = self._seconds_left()
        remaining = f"  {duration(left)} left" if left else ""
        with unread():
            self.console.print(f"{self.title}  {position}  {self._status()}{remaining}", highlight=False)

    def _epochs_done(self) -> int:
        return self.before // self.steps

    def _seconds_left(self) -> float:
        """Return the time that the rest of the stage will take at the pace so far, 0.0 if nothing is left or known."""
        steps_done = self.before + self.done - self.steps_before
        steps_left = self.epochs * self.steps - self.before - self.done
        return (time.monotonic() - self.started) * steps_left / steps_done if steps_done else 0.0

    def _status(self) -> str:
        rate = self.images / max(time.monotonic() - self.started, 1e-9)
        return "  ".join(part for part in (self.text, self.measures, f"{rate:,.0f} images/s") if part)

    def end(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _text(terms: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in terms.items())
