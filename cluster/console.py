"""How ``babelray train`` tells of a run: to a person at a terminal, to a file, to a log collector.

All of it goes to standard error: standard output is for results.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TextIO

if TYPE_CHECKING:
    from cluster.console_live import LiveConsole
    from cluster.progress import Level, News

LogFormat = Literal["auto", "text", "json"]
LOG_FORMATS: tuple[LogFormat, ...] = ("auto", "text", "json")
LOG_FORMAT_VARIABLE = "BABELRAY_LOG_FORMAT"

# Lines of steps in a log that nobody watches; all steps are in events.jsonl.
_STEP_LINE_EVERY_S = 30.0


class Console(Protocol):
    """What a command tells of a run; a context, at whose end nothing stays on the terminal."""

    def say(self, line: str, level: Level = "info") -> None:
        """A line for the person who watches."""

    def tell(self, news: News) -> None:
        """An event of the run."""

    def name(self, run: str) -> None:
        """Which run it is."""

    def begin(self) -> None:
        """It starts now."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_console(log_format: LogFormat, stream: TextIO | None = None) -> Console:
    """The console for a format; ``auto`` shows a live line on a terminal that can, else text.

    Args:
        stream: by default standard error.
    """
    stream = sys.stderr if stream is None else stream
    if log_format == "json":
        return JsonConsole(stream)
    if log_format == "auto" and stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return _live(stream)
    return TextConsole(stream)


def _live(stream: TextIO) -> LiveConsole:
    from cluster.console_live import LiveConsole  # rich takes a moment to import

    return LiveConsole(stream)


class TextConsole:
    """Lines without escape codes; those of steps only now and then, but the first and the last.

    Args:
        stream: takes the lines.
        clock: seconds that only grow.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._next_step_s: float | None = None
        self._held: str | None = None  # the newest line of a step that was not written

    def say(self, line: str, level: Level = "info") -> None:
        """Write a line."""
        self._stream.write(line + "\n")
        self._stream.flush()

    def tell(self, news: News) -> None:
        """Write an event's line, unless it is a step's and another was written shortly before."""
        if news.event.get("event") == "step":
            self._held = news.line
            now_s = self._clock()
            if self._next_step_s is None or now_s >= self._next_step_s:
                self._next_step_s = now_s + _STEP_LINE_EVERY_S
                self._release()
            return
        if news.event.get("event") in {"finished", "worker_failed"}:
            self._release()  # the last step before it
        if news.line is not None:
            self.say(news.line)

    def _release(self) -> None:
        if self._held is not None:
            self.say(self._held)
        self._held = None

    def name(self, run: str) -> None:
        """Nothing to do."""

    def begin(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()


class JsonConsole:
    """One JSON object a line for each event and each line, as log collectors take them.

    Every object has ``time`` (ISO 8601, UTC), ``level`` (info, warning, error), ``run`` and
    ``message``; an event also ``event`` and its fields. In its context, what the process logs is
    written so, too (``logger`` says by whom).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._run: str | None = None
        self._handler = _JsonHandler(self)

    def say(self, line: str, level: Level = "info") -> None:
        """Write a line as an object's message."""
        self.write(time.time(), level, line)

    def tell(self, news: News) -> None:
        """Write an event, whole."""
        fields = dict(news.event)
        written_at = fields.pop("time", None)
        if fields.get("event") == "step" and news.status.left is not None:
            fields["seconds_left"] = round(news.status.left.seconds)
        message = fields.pop("message", None) or str(fields.get("event")).replace("_", " ")
        self.write(
            written_at if isinstance(written_at, int | float) else time.time(),
            news.level,
            " ".join(news.line.split()) if news.line is not None else message,
            **fields,
        )

    def write(self, at: float, level: str, message: str, **fields: Any) -> None:
        """Write one object; ``at`` in Unix seconds."""
        moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        values = {
            "time": moment.replace("+00:00", "Z"),
            "level": level,
            "run": self._run,
            "message": message,
        }
        line = json.dumps({**values, **fields, **values}, default=str)
        self._stream.write(line + "\n")  # in one piece: others write here, too
        self._stream.flush()

    def name(self, run: str) -> None:
        """Which run all further objects are of."""
        self._run = run

    def begin(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> Self:
        logging.getLogger().addHandler(self._handler)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.captureWarnings(False)
        logging.getLogger().removeHandler(self._handler)


class _JsonHandler(logging.Handler):
    """What the process logs from warnings on."""

    def __init__(self, console: JsonConsole) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        trace = {}
        if record.exc_info:
            trace["exception"] = logging.Formatter().formatException(record.exc_info)
        self._console.write(record.created, level, record.getMessage(), logger=record.name, **trace)


@contextmanager
def errors_told(console: Console) -> Iterator[None]:
    """Where machines read along, let the console tell of what ends the command."""
    import click

    from data_shards.errors import UserError

    if not isinstance(console, JsonConsole):
        yield
        return
    try:
        yield
    except UserError as error:
        console.say(str(error), "error")
        raise click.exceptions.Exit(error.exit_status) from None
    except KeyboardInterrupt:
        console.say("interrupted", "error")
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
