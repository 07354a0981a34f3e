"""The lines that a job writes, read through kubectl: none twice, none left out, also when the
connection was cut, the pod that hands the job in was replaced, or a new attempt began.
"""

from __future__ import annotations

import queue
import re
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.launch.kubectl import Kubectl, ending

# Kubernetes puts it before each line when asked for.
_STAMPED = re.compile(r"(\d{4}-\d\d-\d\dT[0-9:.]+(?:Z|[+-]\d\d:\d\d)) ?(.*)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """Where the lines of one attempt come from.

    Attributes:
        job_id: of the attempt; a new one has new lines.
        pod: the submitter's, or the head's.
        uid: the pod's: a new pod of the same attempt begins from the attempt's first line.
        by_exec: the head is asked for the job's log, since no pod hands the job in (HTTPMode).
    """

    job_id: str
    pod: str
    uid: str
    by_exec: bool = False

    def command(self, since: str | None, *, follow: bool) -> list[str]:
        """The kubectl call."""
        if self.by_exec:
            ray = ["ray", "job", "logs", "--address", "http://127.0.0.1:8265"]
            ray += ["--follow"] if follow else []
            return ["exec", self.pod, "--container=ray-head", "--", *ray, self.job_id]
        words = ["logs", self.pod, "--timestamps"]
        words += ["--follow"] if follow else []
        words += [f"--since-time={since}"] if since else []
        return words


class JobLog:
    """The log of one job through all its attempts; ``take`` says what is new in a line."""

    def __init__(self) -> None:
        self._job_id: str | None = None
        self._uid: str | None = None
        self._said: Counter[int] = Counter()
        self._again: Counter[int] = Counter()
        self._last: str | None = None
        self._at_last = 0
        self._skip = 0

    def begin(self, source: Source) -> list[str]:
        """Before a connection is made: the arguments that leave out most of what is known."""
        if source.job_id != self._job_id:
            self._job_id, self._said = source.job_id, Counter()
        if source.uid != self._uid or source.by_exec:
            # From the beginning once more: what was said is dropped as often as it was said.
            self._uid, self._last, self._at_last = source.uid, None, 0
            self._again = self._said.copy()
        self._skip = self._at_last
        return source.command(self._last, follow=True)

    def take(self, source: Source, line: str) -> str | None:
        """The text of a line, None if it was had before."""
        text = line
        if not source.by_exec and (found := _STAMPED.fullmatch(line)):
            stamp, text = found[1], found[2]
            if self._last is not None and _key(stamp) < _key(self._last):
                return None
            if stamp == self._last:
                if self._skip > 0:
                    self._skip -= 1
                    return None
                self._at_last += 1
            else:
                self._last, self._at_last, self._skip = stamp, 1, 0
        mark = hash(text)
        if self._again[mark] > 0:
            self._again[mark] -= 1
            return None
        self._said[mark] += 1
        return text


def _key(stamp: str) -> tuple[str, str]:
    """A time stamp in an order; its fraction comes without trailing zeros."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return whole, fraction.ljust(9, "0")


class Stream:
    """One connection: lines arrive in a thread, so that the job's state can be watched as well."""

    def __init__(self, kubectl: Kubectl, source: Source, arguments: list[str]) -> None:
        self.source = source
        self._process = kubectl.lasting(*arguments, split=True)
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\r\n"))
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        self._errors += self._process.stderr.readlines()[-20:]

    def next(self, timeout_s: float) -> str:
        """The next line.

        Raises:
            TimeoutError: none came in time.
            EOFError: the connection has ended.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            raise EOFError
        return line

    def failed(self) -> str | None:
        """After the end: what kubectl complained of, None if it ended well."""
        status = self._process.wait(timeout=5)
        self._readers[1].join(timeout=1)
        return "".join(self._errors).strip() or f"exit status {status}" if status else None

    def close(self) -> None:
        """End our own kubectl, and nothing else."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for reader in self._readers:
            reader.join(timeout=2)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()


def remote_lines(kubectl: Kubectl, arguments: list[str]) -> Iterator[tuple[str, int | None]]:
    """Lines of a command run in a pod, then one more item: ("what kubectl says last", exit status).

    The status belongs to the command if kubectl says so, and is -1 if kubectl itself failed.
    """
    with ending(kubectl.lasting(*arguments)) as process:
        assert process.stdout is not None
        held: str | None = None
        for line in process.stdout:
            if held is not None:
                yield held, None
            held = line.rstrip("\r\n")
        status = process.wait()
    # The command's last line may have had no end.
    said = re.search(r"command terminated with exit code (\d+)$", held or "")
    if status == 0:
        if held is not None:
            yield held, None
        yield "", 0
    elif said and held is not None:
        if before := held[: said.start()]:
            yield before, None
        yield "", int(said[1])
    else:
        yield held or "", -1
