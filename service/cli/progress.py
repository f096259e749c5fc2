"""What a replay shows while it works: a bar with its rate and the time left, on stderr and only on a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from replay.run import Progress as Replayed


class _Bar:
    """One bar. `quiet` shows nothing."""

    def __init__(self, what: str, *, quiet: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
            transient=True,
        )
        self._what = what
        self._task = self._progress.add_task(what, total=None, visible=False, rate="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def _move(self, done: int, total: int, what: str | None = None) -> None:
        speed = self._progress.tasks[self._task].speed
        rate = "" if speed is None else f"{speed:,.0f}/s"
        self._progress.update(
            self._task, completed=done, total=total, description=what or self._what, visible=True, rate=rate
        )


class PlanningBar(_Bar):
    """How much of a window was read."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__("reading", quiet=quiet)

    def show(self, read: int, offsets: int) -> None:
        """So many records of so many offsets."""
        self._move(read, offsets)


class ReplayBar(_Bar):
    """How much of a plan was published."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__("publishing", quiet=quiet)

    def show(self, progress: Replayed) -> None:
        """So many of so many, or held back."""
        held = None if progress.behind is None else f"waiting, {progress.behind:,} records behind"
        self._move(progress.published, progress.planned, held)


class ComparisonBar(_Bar):
    """How many of the new queries have ended, and then how many were compared."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__("comparing", quiet=quiet)

    def show(self, done: int, total: int) -> None:
        """So many of so many."""
        self._move(done, total)
