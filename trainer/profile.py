"""Profiling some steps of a run that trains: who asks, and what its ranks do about it.

Whoever writes ``profile.json`` into the run's folder asks for the steps ``first`` to ``last`` (as
``events.jsonl`` counts them, from 1) on some ranks. Those ranks then run PyTorch's profiler over
these steps and leave in ``profile/steps-<first>-<last>/``:

    request.json                what was asked for, and which steps it became
    rank-000.json.gz            the trace, for Perfetto
    rank-000.summary.json       what trainer.profile_summary makes of it; written last

A profile is a look at the run and never a part of it: it draws no random number, enters no
collective, and whatever goes wrong with it is logged and the training goes on.
"""

from __future__ import annotations

import gzip
import json
import logging
import shutil
import sys
import tempfile
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.errors import UserError
from trainer.profile_summary import STEP_PREFIX, summarize
from trainer.storage import write_atomically

if TYPE_CHECKING:
    import torch

    from data_shards.plan import Plan
    from trainer.phases import Phases

log = logging.getLogger(__name__)

# In a run's folder: the request, removed by rank 0 once it is answered.
PROFILE_FILE = "profile.json"
# In a run's folder: the answers.
PROFILE_DIR = "profile"

# A step of a small model is some ten thousand operators and some megabytes of trace.
MAX_STEPS = 100
# Beyond this, reading a trace back would take the memory that the training needs.
_MAX_SUMMARY_BYTES = 512 << 20
# Unprofiled steps whose median tells what profiling costs.
_PACE_STEPS = 20
_FOLDER_WAIT_S = 30.0
_WRITER_WAIT_S = 300.0


@dataclass(frozen=True)
class ProfileRequest:
    """Steps ``first`` to ``last``, counted from 1, both included, on ``ranks``.

    Where ``first`` is past when the ranks hear of it, as many steps from then on.

    Attributes:
        ranks: which; none for all.
        memory: also record allocations.
        stacks: also record Python's calls; the steps take several times as long.
        token: tells one request from another of the same steps.

    Raises:
        UserError: steps or ranks that make no sense.
    """

    first: int
    last: int
    ranks: tuple[int, ...] = (0,)
    memory: bool = False
    stacks: bool = False
    token: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise UserError(
                f"steps {self.first} to {self.last}: give the first and the last step, from 1 on, "
                "such as 100:105"
            )
        if self.last - self.first >= MAX_STEPS:
            raise UserError(
                f"steps {self.first} to {self.last}: {self.last - self.first + 1} steps are too "
                f"many, a trace grows by megabytes a step: give at most {MAX_STEPS}"
            )
        if min(self.ranks, default=0) < 0 or len(set(self.ranks)) < len(self.ranks):
            raise UserError(f"ranks {list(self.ranks)}: give different ranks, from 0 on")

    @classmethod
    def read(cls, run_dir: Path) -> ProfileRequest | None:
        """The run's request, None if there is none.

        Raises:
            UserError: the file holds something else.
        """
        file = run_dir / PROFILE_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            return cls(**{**values, "ranks": tuple(map(int, values.get("ranks", (0,))))})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f'{file}: {error}: write {{"first": 100, "last": 105, "ranks": [0]}}'
            ) from None

    def write(self, run_dir: Path) -> None:
        """Ask for it."""
        write_atomically(run_dir / PROFILE_FILE, json.dumps(asdict(self)) + "\n")

    def withdraw(self, run_dir: Path) -> None:
        """Remove the request, unless it is another one by now."""
        with suppress(UserError, OSError):
            if ProfileRequest.read(run_dir) == self:
                (run_dir / PROFILE_FILE).unlink()

    def asks(self, rank: int) -> bool:
        """Whether a rank is meant."""
        return not self.ranks or rank in self.ranks

    def steps_from(self, step: int) -> ProfileRequest:
        """The same, or as many steps from ``step`` on where its first is past."""
        late = max(0, step - self.first)
        return replace(self, first=self.first + late, last=self.last + late)


def folder_of(run_dir: Path, token: str) -> Path | None:
    """Where a request is answered; None where its first step has not begun."""
    found: list[tuple[float, Path]] = []
    for file in (run_dir / PROFILE_DIR).glob("steps-*/request.json"):
        with suppress(OSError, ValueError, KeyError):
            about = json.loads(file.read_text(encoding="utf-8"))
            if about["token"] == token:
                found.append((about["time"], file.parent))
    # The last: workers that were restarted answer again.
    return max(found)[1] if found else None


def trace_name(rank: int) -> str:
    """The trace's file name."""
    return f"rank-{rank:03d}.json.gz"


def summary_name(rank: int) -> str:
    """The summary's file name."""
    return f"rank-{rank:03d}.summary.json"


class StepProfiler:
    """One rank's answers to requests; every rank has one and calls it alike.

    Args:
        is_first: rank 0, which makes the folders and removes the requests.
        plan: for the tokens of the steps, if known.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        is_first: bool,
        plan: Plan | None = None,
    ) -> None:
        self._run_dir, self._rank, self._world_size = run_dir, rank, world_size
        self._device, self._is_first, self._plan = device, is_first, plan
        self._running: ProfileRequest | None = None
        self._answered: ProfileRequest | None = None  # as it was asked
        self._recording: _Recording | None = None
        self._phases: Phases | None = None
        self._writer: threading.Thread | None = None
        self._begun: deque[float] = deque(maxlen=_PACE_STEPS + 1)

    def step_begins(self, step: int, requested: bool, phases: Phases | None) -> None:
        """To be called at the top of each step, before its data is fetched.

        Args:
            step: steps done so far; the one that begins is ``step + 1``.
            requested: there is a request; the same on all ranks.
            phases: shown in the trace.
        """
        if self._running is None and not requested:
            self._begun.append(time.perf_counter())
            return
        try:
            self._begin_step(step, phases)
        except Exception:  # whatever it is: no profile is worth a run
            log.exception("the profile failed; the training goes on")
            self._give_up()

    def close(self) -> None:
        """The ranks end here, maybe in the middle of a profile: write what there is.

        Where an error ends them, the request stays for those that replace them.
        """
        try:
            if self._running is not None:
                if sys.exc_info()[0] is not None:
                    self._answered = None
                self._finish()
            if self._writer is not None:
                self._writer.join(_WRITER_WAIT_S)
        except Exception:
            log.exception("the profile could not be written")
            self._give_up()

    def _begin_step(self, step: int, phases: Phases | None) -> None:
        if self._running is not None:
            if step >= self._running.last:
                # The request is not read here: this very one may still be there.
                self._finish()
            elif self._recording is not None:
                self._recording.begin_step(step + 1)
            return
        # Read at each step while it waits: it may be withdrawn, or another by now.
        try:
            request = ProfileRequest.read(self._run_dir)
        except UserError as error:
            if self._is_first:
                log.warning("%s", error)
                (self._run_dir / PROFILE_FILE).unlink()
            return
        if request is None or step + 1 < request.first:
            self._begun.append(time.perf_counter())
            return
        self._start(request, request.steps_from(step + 1), phases)

    def _start(self, asked: ProfileRequest, request: ProfileRequest, phases: Phases | None) -> None:
        self._answered, self._running = asked, request
        if self._is_first:
            self._make_folder(request)
        if not request.asks(self._rank):
            return
        if self._writer is not None:
            self._writer.join(_WRITER_WAIT_S)
        log.info("profiling steps %d to %d", request.first, request.last)
        self._recording = _Recording(request, self._device, self._plan, _median_gap(self._begun))
        self._begun.clear()
        if phases is not None:
            self._phases, phases.annotate = phases, True
        self._recording.begin_step(request.first)

    def _finish(self) -> None:
        request, recording = self._running, self._recording
        assert request is not None
        self._running = self._recording = None
        if self._phases is not None:
            self._phases.annotate = False
            self._phases = None
        if recording is not None:
            recording.stop()
            # A thread, so that training goes on while the trace is packed and read.
            self._writer = threading.Thread(
                target=self._write, args=(request, recording), name="profile-writer", daemon=True
            )
            self._writer.start()
        self._remove_request()

    def _give_up(self) -> None:
        if self._phases is not None:
            self._phases.annotate = False
        request, recording = self._running, self._recording
        self._running = self._recording = self._phases = None
        if recording is not None:
            with suppress(Exception):
                recording.stop()
        with suppress(Exception):
            self._remove_request()
            folder = None if request is None else folder_of(self._run_dir, request.token)
            if request is not None and folder is not None and request.asks(self._rank):
                self._tell(folder, {"error": "it failed: see the worker's log"})

    def _remove_request(self) -> None:
        if self._is_first and self._answered is not None:
            self._answered.withdraw(self._run_dir)
        self._answered = None

    def _make_folder(self, request: ProfileRequest) -> None:
        name = f"steps-{request.first:05d}-{request.last:05d}"
        home = self._run_dir / PROFILE_DIR
        for number in range(1, 1000):
            folder = home / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            about = {**asdict(request), "world_size": self._world_size, "time": time.time()}
            write_atomically(folder / "request.json", json.dumps(about) + "\n")
            return
        raise FileExistsError(f"{home / name}: there are too many of it")

    def _folder(self, request: ProfileRequest) -> Path:
        """Where rank 0 wants the answer; it may be a moment ahead or behind."""
        until = time.monotonic() + _FOLDER_WAIT_S
        while (folder := folder_of(self._run_dir, request.token)) is None:
            if time.monotonic() > until:
                raise FileNotFoundError(f"rank 0 made no folder in {self._run_dir / PROFILE_DIR}")
            time.sleep(0.1)
        return folder

    def _write(self, request: ProfileRequest, recording: _Recording) -> None:
        try:
            folder = self._folder(request)
            try:
                summary = recording.write(folder / trace_name(self._rank))
            except Exception as error:
                log.exception("the profile could not be written")
                summary = {"error": f"{type(error).__name__}: {error}"}
            self._tell(folder, summary)
        except Exception:
            log.exception("the profile could not be written")

    def _tell(self, folder: Path, summary: dict[str, Any]) -> None:
        about = {
            "rank": self._rank,
            "world_size": self._world_size,
            "device": self._device.type,
            "trace": trace_name(self._rank),
        }
        text = json.dumps({**about, **summary}, indent=1) + "\n"
        write_atomically(folder / summary_name(self._rank), text)


class _Recording:
    """PyTorch's profiler over some steps of this rank."""

    def __init__(
        self,
        request: ProfileRequest,
        device: torch.device,
        plan: Plan | None,
        unprofiled_s: float | None,
    ) -> None:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._memory, self._device, self._plan = request.memory, device, plan
        self._unprofiled_s = unprofiled_s
        self._tokens: list[tuple[int, int]] = []
        self._range: Any = None
        self._profile = profile(
            activities=activities,
            profile_memory=request.memory,
            with_stack=request.stacks,
        )
        self._profile.start()

    def begin_step(self, step: int) -> None:
        from torch.profiler import record_function

        self._end_step()
        if self._plan is not None:
            of_step = self._plan.source_tokens(step - 1), self._plan.target_tokens(step - 1)
            self._tokens.append(of_step)
        self._range = record_function(f"{STEP_PREFIX}{step}")
        self._range.__enter__()

    def stop(self) -> None:
        """Stop, and keep the plain trace in a scratch folder of this machine."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)  # the last step's kernels belong to it
        self._end_step()
        self._profile.stop()
        self._scratch = tempfile.TemporaryDirectory(prefix="babelray-profile-")
        # In the thread that profiles: Kineto's objects are not made to be used beside it.
        self._profile.export_chrome_trace(str(self._plain))
        del self._profile

    @property
    def _plain(self) -> Path:
        return Path(self._scratch.name) / "trace.json"

    def _end_step(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def write(self, file: Path) -> dict[str, Any]:
        """Write the trace; returns the summary."""
        plain, draft = self._plain, file.with_name(f".{file.name}")
        with self._scratch:
            with plain.open("rb") as source, gzip.open(draft, "wb", compresslevel=4) as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            draft.replace(file)
            num_bytes = plain.stat().st_size
            if num_bytes > _MAX_SUMMARY_BYTES:
                return {
                    "error": f"the trace has {num_bytes / 1e6:,.0f} MB, too many to summarise here:"
                    " open it, or profile fewer steps"
                }
            trace = json.loads(plain.read_bytes())
        return {
            **summarize(trace["traceEvents"], with_memory=self._memory),
            "unprofiled_step_ms": (
                None if self._unprofiled_s is None else round(1e3 * self._unprofiled_s, 3)
            ),
            "source_tokens": sum(source for source, _ in self._tokens) or None,
            "target_tokens": sum(target for _, target in self._tokens) or None,
        }


def _median_gap(times: deque[float]) -> float | None:
    gaps = sorted(later - earlier for earlier, later in zip(times, list(times)[1:], strict=False))
    return gaps[len(gaps) // 2] if gaps else None
