"""What a replay shows while it works: a bar with its rate and the time left, on stderr and only on a terminal."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Bar:
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

    def show(self, done: int, total: int, behind: int | None = None) -> None:
        """Show the progress; `behind` is how many records of live traffic wait while the replay waits for them."""
        what = self._what if behind is None else f"waiting, {behind:,} records behind"
        speed = self._progress.tasks[self._task].speed
        rate = "" if speed is None else f"{speed:,.0f}/s"
        self._progress.update(self._task, completed=done, total=total, description=what, visible=True, rate=rate)
