"""A live last line on a terminal: bar, step, loss, speed and time left, below the notable lines."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.text import Text

from cluster.progress import Level, News, Status
from cluster.time_left import Left

_LEAST_BAR, _MOST_BAR = 8, 30
_REFRESH_HZ = 1.0
_GAP = "  "


class LiveConsole:
    """Lines above, the live line below.

    The cursor is never hidden, so that no way of ending can leave the terminal without one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._console = _Console(file=stream, markup=False, highlight=False, emoji=False)
        self._status: Status | None = None
        self._heard_s = self._began_s = time.monotonic()
        self._live = Live(
            get_renderable=self._line,
            console=self._console,
            refresh_per_second=_REFRESH_HZ,
            transient=True,
            # Standard output is for results, and the caller's to turn elsewhere.
            redirect_stdout=False,
            redirect_stderr=True,
        )

    def say(self, line: str, level: Level = "info") -> None:
        """A line above the live one."""
        style = {"info": None, "warning": "yellow", "error": "red"}[level]
        self._console.print(Text(line), style=style)

    def tell(self, news: News) -> None:
        """Renew the live line; whatever is not a step gets a line of its own."""
        if news.status.doing != (self._status or Status()).doing:
            self._began_s = time.monotonic()
        self._status, self._heard_s = news.status, time.monotonic()
        if news.line is not None and news.event.get("event") != "step":
            self.say(news.line, news.level)

    def name(self, run: str) -> None:
        """Nothing to do: the lines say it."""

    def begin(self) -> None:
        """Show the live line from now on."""
        self._status = self._status or Status()
        self._began_s = time.monotonic()
        self._live.start(refresh=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._live.stop()

    def _line(self) -> _Line:
        now_s = time.monotonic()
        status = self._status or Status()
        left = status.left
        if left is not None:  # of the last logged step; since then, time went on
            left = replace(left, seconds=max(0.0, left.seconds - (now_s - self._heard_s)))
        return _Line(replace(status, left=left), now_s - self._began_s)


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave it where it is."""
        return False


class _Line:
    def __init__(self, status: Status, doing_s: float) -> None:
        self._status, self._doing_s = status, doing_s

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width - 1  # where the cursor stands
        bar, text = live_line(self._status, width, doing_s=self._doing_s)
        if bar:
            yield from console.render(
                ProgressBar(total=1.0, completed=self._status.done, width=bar), options
            )
            yield Segment(_GAP)
        yield Text(text, no_wrap=True, overflow="ellipsis", end="")


def live_line(status: Status, width: int, *, doing_s: float = 0.0) -> tuple[int, str]:
    """The live line in ``width`` characters: the bar's own width (0: none), and the text after it.

    Args:
        doing_s: how long it has been doing what it does; shown while it does not train.
    """
    texts = [_GAP.join(parts) for parts in _layouts(status, doing_s)]
    for text in texts:
        room = width - len(text) - len(_GAP)
        if room >= _LEAST_BAR:
            return min(room, _MOST_BAR), text
        if len(text) <= width and width < 60:  # a narrow terminal has better use for the room
            return 0, text
    return 0, texts[-1][:width]


def _layouts(status: Status, doing_s: float) -> Iterator[list[str]]:
    """From the most that can be said to the least."""
    share = f"{status.done:4.0%}"
    number = f"step {status.step:,}"
    if status.doing != "training" or status.tokens_per_second is None:
        doing = f"{status.doing} {doing_s:.0f} s"
        yield from ([share, number, doing], [share, doing], [doing])
        return
    loss = f"loss {status.loss:.3f}" if status.loss is not None else "loss -"
    speed = f"{status.tokens_per_second:>6,.0f} tok/s"
    left = [_left(status.left)] if status.left is not None else []
    if status.max_steps is not None:
        yield [share, f"{number}/{status.max_steps:,}", loss, speed, *left]
    yield [share, number, loss, speed, *left]
    yield [share, number, loss, *left]
    yield [share, loss, *left]
    yield [share, *left]


def _left(left: Left) -> str:
    return f"{left} left"
