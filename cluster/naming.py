"""A run's name and folder: choose, claim, and decide whether a resume continues the same run."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from data_shards.errors import UserError
from trainer.config import RecoveryConfig, RunConfig, load_config, parse_config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_LOCK = ".lock"
# Longer than a look at the lock can take.
_LOOK_S = 0.5

# What may differ between a run and its resume. Everything else decides which numbers a step
# computes, and a changed value would make the run's config.json and curves tell an untruth.
CHANGEABLE = frozenset(
    {
        "data.root", "data.dir", "data.mirror", "data.prefetch_steps", "data.shards_url",
        "data.cache_dir",
        "trainer.max_steps", "trainer.max_minutes", "trainer.patience", "trainer.log_every",
        "trainer.validate_every", "trainer.checkpoint_every", "trainer.keep_checkpoints",
        "trainer.bleu_every", "trainer.best_by", "trainer.ema_decay",
        "trainer.stragglers", "trainer.peak_flops", "trainer.trackers",
        "trainer.threads", "trainer.metrics_host", "trainer.metrics_port", "trainer.zero_stage",
        "recovery.storage", "recovery.staging", "recovery.save_attempts", "recovery.save_backoff_s",
        "recovery.max_failures", "recovery.hang_timeout_s", "recovery.grace_s",
        "recovery.resize_interval_s", "recovery.standby", "recovery.max_skipped", "recovery.then",
        "recovery.max_rewinds", "recovery.spike_nats",
        "evaluation.search", "evaluation.beam", "evaluation.length_rule",
        "evaluation.length_penalty", "evaluation.coverage_rule", "evaluation.coverage_penalty",
        "evaluation.max_extra_length", "evaluation.unknown", "evaluation.temperature",
        "evaluation.top_k", "evaluation.top_p", "evaluation.seed", "evaluation.precision",
        "evaluation.batch_tokens",
    }
)  # fmt: skip

# A preset only fills other fields, which are compared themselves.
_IGNORED = frozenset({"model.preset"})


def new_name(config_file: Path | None) -> str:
    """A name for a run that was given none: the configuration's, and the time."""
    stem = config_file.stem if config_file is not None else "run"
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-") or "run"
    return f"{stem[:60]}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_name(name: str) -> None:
    """Refuse a name that is no plain folder name.

    Raises:
        UserError: the name is empty, too long or holds a slash, a space, ….
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name!r}: use at most 100 letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit"
        )


def find_run(run: str, runs: Path) -> Path:
    """The folder of a run given by its name under ``runs`` or by its path.

    Raises:
        UserError: there is no such run; the message names those there are.
    """
    for folder in (runs / run, Path(run)):
        if (folder / "config.json").is_file():
            return folder
    known = sorted(file.parent.name for file in runs.glob("*/config.json"))
    if not known:
        raise UserError(f"no run {run!r}: {runs} holds no runs; start one with babelray train")
    close = get_close_matches(run, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "there are: " + ", ".join(known[-10:])
    raise UserError(f"no run {run!r} in {runs}; {hint}")


def find_begun_run(run: str, runs: Path) -> Path:
    """As ``find_run``; a run that is only starting, and has no configuration yet, counts, too."""
    starting = runs / run
    return starting if is_claimed(starting) else find_run(run, runs)


def open_run(
    config_file: Path | None,
    settings: tuple[str, ...],
    name: str | None,
    *,
    runs: Path,
    resume: bool,
    overwrite: bool = False,
    start_or_resume: bool = False,
) -> tuple[RunConfig, str]:
    """Settle what to train and under which name; nothing is written.

    With ``resume`` and no file, the run's own ``config.json`` is the base of ``settings``. With
    ``start_or_resume`` it is a resume if there is such a run.

    Raises:
        UserError: the configuration is wrong, the name is taken, there is no run to resume, or the
            resume would change what the run computes.
    """
    if name is not None:
        check_name(name)
    if start_or_resume:
        if name is None or config_file is None:
            raise UserError("--start-or-resume needs --name RUN and --config FILE")
        resume = exists(runs / name, load_config(config_file, settings).recovery)
    if resume:
        if name is None:
            raise UserError("--resume needs the run: give --name RUN")
        if config_file is not None and not (runs / name / "config.json").is_file():
            config = absolute(load_config(config_file, settings))
            if _stored_elsewhere(runs / name, config.recovery):
                return config, name  # another machine's run, known by its checkpoints
        stored_file = find_run(name, runs) / "config.json"
        stored = _read(stored_file)
        config = absolute(load_config(config_file or stored_file, settings))
        check_resume(stored, config, name=name)
        return config, name
    if config_file is None:
        raise UserError("give the configuration: for example --config configs/tiny.yaml")
    config = absolute(load_config(config_file, settings))
    if name is None:
        return config, new_name(config_file)
    if not overwrite and exists(runs / name, config.recovery):
        raise UserError(
            f"the run {name} exists already ({runs / name}): continue it with --resume, "
            "choose another --name, or begin anew with --overwrite"
        )
    return config, name


def exists(run_dir: Path, recovery: RecoveryConfig) -> bool:
    """Whether there is a run of this name, in its folder or in the storage of its checkpoints."""
    return any(
        (run_dir / kept).exists() for kept in ("config.json", "checkpoints")
    ) or _stored_elsewhere(run_dir, recovery)


def check_resume(stored: RunConfig, new: RunConfig, *, name: str) -> None:
    """Refuse to continue a run with a configuration that computes something else.

    Raises:
        UserError: with each field that differs, its old and its new value.
    """
    before, after = _flat(stored), _flat(new)
    changed = sorted(
        key for key in before if before[key] != after[key] and key not in CHANGEABLE | _IGNORED
    )
    if changed:
        lines = [f"{key}: {before[key]!r} in the run, {after[key]!r} now" for key in changed]
        raise UserError(
            f"--resume would change what the run {name} computes:\n  "
            + "\n  ".join(lines)
            + "\nresume without the change, or start a new run under another --name"
        )


def absolute(config: RunConfig) -> RunConfig:
    """The same configuration with the paths of data and checkpoints made absolute.

    Workers and later commands may run in another working directory.
    """
    data = config.data
    paths = {
        key: Path(os.path.abspath(value))
        for key in ("root", "dir", "cache_dir")
        if (value := getattr(data, key)) is not None
    }
    recovery = config.recovery
    places: dict[str, object] = {}
    if recovery.staging is not None:
        places["staging"] = Path(os.path.abspath(recovery.staging))
    if recovery.storage is not None and "://" not in recovery.storage:
        places["storage"] = os.path.abspath(recovery.storage)
    return config.model_copy(
        update={
            "data": data.model_copy(update=paths),
            "recovery": recovery.model_copy(update=places),
        }
    )


def write_config(config: RunConfig, run_dir: Path) -> None:
    """Put the resolved configuration into the run's folder, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / f".config.json.{os.getpid()}"
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(config.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(run_dir / "config.json")


def clear(run_dir: Path, recovery: RecoveryConfig) -> None:
    """Remove what an earlier run left in a folder that is claimed, and in its storage."""
    if recovery.storage is not None:
        from trainer.checkpoint import Checkpoints

        Checkpoints.of(run_dir, recovery).clear()
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _stored_elsewhere(run_dir: Path, recovery: RecoveryConfig) -> bool:
    """Whether the storage holds checkpoints of a run of this name, which workers would take."""
    if recovery.storage is None:
        return False
    from trainer.checkpoint import Checkpoints  # imports torch, which takes a second or two

    return bool(Checkpoints.of(run_dir, recovery).committed())


def logs_dir(run_dir: Path) -> Path:
    """Where workers, driver and controller of a run leave their logs."""
    return run_dir / "logs"


def is_claimed(run_dir: Path) -> bool:
    """Whether a process holds the run's folder now: it is being trained."""
    return is_held(run_dir / _LOCK)


def is_held(locked: Path) -> bool:
    """Whether a process has the lock of a file or folder now; False where there is none."""
    try:
        descriptor = os.open(locked, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


@contextmanager
def claim(run_dir: Path, *, patience_s: float = _LOOK_S) -> Iterator[None]:
    """Hold the run's folder: two drivers on one run would overwrite each other's checkpoints.

    The lock is the kernel's and goes with the process, however it ends.

    Args:
        run_dir: made if it is not there.
        patience_s: how long to wait for it. A file server keeps the lock of a machine that was lost
            for as long as its lease lasts, a minute or two.

    Raises:
        UserError: another process trains the run now.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _LOCK).open("a+", encoding="utf-8") as lock:
        if not _lock(lock, max(patience_s, _LOOK_S)):
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"the run {run_dir.name} is being trained by {holder}: "
                "wait for it, stop it, or choose another --name"
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield


def _lock(file: TextIO, patience_s: float) -> bool:
    """Whether the lock is ours now; whoever only looks whether it is held lets go in no time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S / 50)
        except OSError as error:
            raise UserError(
                f"{file.name} cannot be locked ({error.strerror}), so two commands could train one "
                "run: mount the file system with locks (Lustre: flock; NFS: without nolock), or "
                "put the runs elsewhere"
            ) from None
        else:
            return True


def _read(file: Path) -> RunConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the run's configuration cannot be read: {file}: {error}") from None
    return parse_config(values, where=str(file))


def _flat(config: RunConfig) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }
