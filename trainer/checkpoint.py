"""Checkpoints that are either whole or not there, whatever died while one was written.

A checkpoint is a folder ``checkpoints/step-00001000`` in the run's storage::

    model.safetensors    all weights, float32, whole tensors by parameter name
    optimizer-<tag>-00000-of-00002.safetensors
                         Adam's moments (and the weights' moving average, if there is one) that a
                         rank kept: flat float32 fragments of parameters
    state.json           where the run stands: all of TrainState, and the settings it ran under
    manifest.json        size and sha256 of every file above, and which fragments it holds
    COMMIT               sha256 of manifest.json, written last; without it the folder does not count

Neither the number of ranks nor the ZeRO stage is in the format: any other can read it. Nothing in
it is ever unpickled. There is no random state: dropout is seeded by (seed, step, lane).

What is beside these files, or in a folder without COMMIT, is what a save that died has left: it
carries the tag of that save in its name and is removed by the next one (``Checkpoints.clean``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from data_shards.errors import RunFailedError, UserError
from data_shards.manifest import file_sha256
from trainer.config import RecoveryConfig
from trainer.parts import WEIGHTS
from trainer.reader import Reader
from trainer.storage import MissingError, Storage, StorageError

log = logging.getLogger(__name__)

COMMIT = "COMMIT"
STATE = "state.json"
MANIFEST = "manifest.json"
BEST = "best.json"
_PINNED = "pinned.json"

_FOLDER = "checkpoints"
_ATTEMPT = f"{_FOLDER}/attempt.json"


class _DamagedError(Exception):
    """A checkpoint's commit or manifest cannot be believed; says why."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
        storage: the run's place in it; checkpoints lie under ``checkpoints/``.
        cache: local folder for what is fetched from a remote storage, of this run alone.
    """

    def __init__(self, storage: Storage, cache: Path) -> None:
        self.storage = storage
        self._cache = cache

    @classmethod
    def of(cls, run_dir: Path, recovery: RecoveryConfig) -> Checkpoints:
        """Those of a run: under ``recovery.storage``, else in the run's own folder.

        Raises:
            UserError: ``recovery.storage`` is a URL that cannot be spoken here.
        """
        if recovery.storage is None:
            storage = Storage.of(run_dir)
        else:
            storage = Storage.of(f"{recovery.storage.rstrip('/')}/{run_dir.name}")
        place = hashlib.sha256(storage.where("").encode()).hexdigest()[:8]
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "babelray"
        return cls(storage, home / "checkpoints" / f"{run_dir.name}-{place}")

    def folder(self, step: int) -> str:
        """A checkpoint's name in the storage."""
        return f"{_FOLDER}/step-{step:08d}"

    @property
    def home(self) -> str:
        """Where all of them lie: a path or URL, for messages."""
        return self.storage.where(_FOLDER)

    def where(self, step: int) -> str:
        """A checkpoint's path or URL, for messages."""
        return self.storage.where(self.folder(step))

    def staging(self, given: Path | None) -> Path:
        """Local folder where parts are written before they are published.

        Args:
            given: ``recovery.staging``; by default the storage itself if that is a folder, so that
                publishing is a rename, else the cache.
        """
        if given is not None:
            return given / self._cache.name
        if self.storage.folder is not None:
            return self.storage.folder / _FOLDER / ".staging"
        return self._cache / "staging"

    def committed(self) -> list[int]:
        """The steps of the checkpoints whose commit was written, oldest first."""
        return [
            step
            for step in self._steps()
            if self.storage.size(f"{self.folder(step)}/{COMMIT}") is not None
        ]

    def manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a committed checkpoint.

        Raises:
            StorageError: it cannot be read, or is not what was committed.
        """
        try:
            return self._manifest(step)
        except _DamagedError as error:
            raise StorageError(f"{error}: use another checkpoint") from None

    def problems(
        self, step: int, *, only: Collection[str] | None = None, hashes: bool = True
    ) -> list[str]:
        """Everything that is wrong with a checkpoint; empty if it can be trusted.

        Args:
            only: look at these of its files, not at all.
            hashes: compare the contents too, not only the sizes.

        Raises:
            StorageError: a remote storage does not answer, which says nothing about the files.
        """
        try:
            files = self._manifest(step)["files"]
        except _DamagedError as error:
            return [str(error)]
        found = []
        for name, entry in files.items():
            if only is None or name in only:
                problem = self._problem(step, name, entry, hashes=hashes)
                found += [problem] if problem else []
        if only is not None:
            found += [f"{self.where(step)} holds no {name}" for name in only if name not in files]
        return found

    def find_trusted(self, before: int | None = None) -> tuple[int | None, dict[int, list[str]]]:
        """The newest checkpoint that is committed and verifies, and what was passed over.

        Args:
            before: look at those of this step and earlier ones.

        Returns:
            ``(step, passed_over)``: None if the run has no checkpoint (so early); and the problems
            of each newer one, by step.

        Raises:
            RunFailedError: there are committed checkpoints, but none of them verifies.
        """
        candidates = [step for step in self.committed() if before is None or step <= before]
        passed_over: dict[int, list[str]] = {}
        for step in reversed(candidates):
            found = self.problems(step)
            if not found:
                return step, passed_over
            passed_over[step] = found
            log.warning("passed over checkpoint %s: %s", self.where(step), "; ".join(found))
        if candidates:
            every = "; ".join(problem for found in passed_over.values() for problem in found)
            raise RunFailedError(
                f"no checkpoint of this run can be trusted: {every}. Restore one from a backup, or "
                f"start anew under another name ({self.home} was left as it is)"
            )
        return None, passed_over

    def open(self, step: int) -> Reader:
        """A checkpoint's state and tensors; it should have verified (``find_trusted``)."""
        try:
            state = json.loads(self.local(step, STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StorageError.of("read", f"{self.where(step)}/{STATE}", error) from error
        return Reader(
            self.where(step), state, self.manifest(step)["files"], partial(self.local, step)
        )

    def weights(self, step: int) -> Path:
        """The weights as a local file."""
        return self.local(step, WEIGHTS)

    def local(self, step: int, name: str) -> Path:
        """A file of a checkpoint as a local one; fetched and verified now, if it is remote.

        Raises:
            StorageError: it cannot be had, or is not what was committed.
        """
        if self.storage.folder is not None:
            return self.storage.folder / self.folder(step) / name
        problem = self._problem(step, name, self.manifest(step)["files"][name])
        if problem:
            raise StorageError(f"{problem}: use another checkpoint")
        return self.storage.fetch(f"{self.folder(step)}/{name}", self._cache_of(step))

    def best(self) -> int | None:
        """The step of the best checkpoint so far, by validation.

        Raises:
            StorageError: ``best.json`` cannot be read.
        """
        return self.best_note().get("step")

    def best_note(self) -> dict[str, Any]:
        """All of ``best.json``: what the best checkpoint is the best by; empty before the first.

        Raises:
            StorageError: it cannot be read.
        """
        return self._noted(BEST)

    def set_best(self, step: int, **measures: float | str | None) -> None:
        """Note which checkpoint is the best, and by what, where readers look for it."""
        content = json.dumps({"step": step, **measures})
        self.storage.write(BEST, f"{content}\n".encode())

    def pin(self, step: int | None) -> None:
        """Let retention keep this one, too, while somebody works with it; None lets it go."""
        if step is None:
            self.storage.remove(_PINNED)
        else:
            self.storage.write(_PINNED, json.dumps({"step": step}).encode() + b"\n")

    def begin_attempt(self, token: str) -> None:
        """Make this the one attempt that may commit, and clear away what earlier ones left.

        Rank 0 calls it before any rank saves.
        """
        attempt = json.dumps({"token": token}).encode()
        try:
            self.storage.write(_ATTEMPT, attempt)
        except StorageError:
            self.clean(token)  # a disk may be full of what is cleared away here
            self.storage.write(_ATTEMPT, attempt)
        else:
            self.clean(token)

    def is_attempt(self, token: str) -> bool:
        """Whether no newer attempt has begun."""
        try:
            return bool(json.loads(self.storage.read(_ATTEMPT)).get("token") == token)
        except (MissingError, ValueError, AttributeError):
            return False

    def clean(self, tag: str | None, *, step: int | None = None) -> None:
        """Remove what saves that never came to their end have left.

        Args:
            tag: files with this in their names stay: ranks may be writing them at this moment.
            step: the checkpoint that is being written: its folder stays, even if it is empty.
        """
        for file in (BEST, _PINNED, _ATTEMPT):
            folder, _, name = file.rpartition("/")
            for draft in self.storage.names(folder):
                if draft.startswith(f".{name}."):
                    self.storage.remove(file.removesuffix(name) + draft)
        for other in self._steps():
            folder = self.folder(other)
            names = self.storage.names(folder)
            keep = {name for name in names if tag is not None and tag in name}
            if COMMIT in names:
                try:
                    keep |= {COMMIT, MANIFEST, *self._manifest(other)["files"]}
                except _DamagedError:
                    continue  # it will be passed over by name; it may be wanted for a rescue
            elif other != step and not keep:
                self.storage.remove(folder)
                continue
            for name in names:
                if name not in keep:
                    self.storage.remove(f"{folder}/{name}")

    def uncommit(self, step: int) -> None:
        """From here on the folder does not count as a checkpoint."""
        self.storage.remove(f"{self.folder(step)}/{COMMIT}")

    def drop(self, step: int) -> None:
        """Remove a checkpoint, its commit first: half of one must not look like one."""
        self.uncommit(step)
        self.storage.remove(self.folder(step))

    def clear(self) -> None:
        """Remove all of them, and what is noted about them: the run begins anew."""
        for step in self.committed():
            self.uncommit(step)
        for name in (_FOLDER, BEST, _PINNED):
            self.storage.remove(name)

    def retain(self, *, keep: int, best: int | None) -> None:
        """Drop all but the newest ``keep``, the best, a pinned one, and the newest that verifies.

        In a remote storage the last is judged by the files' sizes: object stores check contents on
        arrival, and fetching everything after each save would cost more than it tells.
        """
        steps = self.committed()
        kept = {*steps[-keep:], best}
        # In this order: one that turns out to be the best is noted before it is no longer pinned.
        for file in (_PINNED, BEST):
            try:
                kept.add(self._noted(file).get("step"))
            except StorageError as error:
                log.warning("%s", error)
        if kept.issuperset(steps):
            return
        hashes = self.storage.folder is not None
        trusted = next(
            (step for step in reversed(steps) if not self.problems(step, hashes=hashes)), None
        )
        if trusted is None:
            log.warning("no checkpoint verifies: all are kept (%s)", self.home)
            return
        for step in steps:
            if step not in kept and step != trusted:
                self.drop(step)

    def _noted(self, file: str) -> dict[str, Any]:
        """What a file beside the checkpoints says of a ``step``; empty if it is not there."""
        try:
            note: dict[str, Any] = json.loads(self.storage.read(file))
            return {**note, "step": int(note["step"])}
        except MissingError:
            return {}
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(
                f"{self.storage.where(file)} cannot be read ({error}): remove it"
            ) from None

    def _steps(self) -> list[int]:
        numbers = (
            name.removeprefix("step-")
            for name in self.storage.names(_FOLDER)
            if name.startswith("step-")
        )
        return sorted(int(number) for number in numbers if number.isdigit())

    def _manifest(self, step: int) -> dict[str, Any]:
        folder = self.folder(step)
        found = []
        for name in (COMMIT, MANIFEST):
            try:
                found.append(self.storage.read(f"{folder}/{name}"))
            except MissingError:
                raise _DamagedError(f"{self.where(step)}/{name} is missing") from None
            except StorageError as error:
                if self.storage.folder is None:
                    raise  # that it does not answer says nothing about the files
                raise _DamagedError(str(error)) from None
        commit, content = found[0].decode(errors="replace").strip(), found[1]
        if hashlib.sha256(content).hexdigest() != commit:
            raise _DamagedError(f"{self.where(step)}/{MANIFEST} differs from what was committed")
        values: dict[str, Any] = json.loads(content)
        return values

    def _problem(
        self, step: int, name: str, entry: dict[str, Any], *, hashes: bool = True
    ) -> str | None:
        """What is wrong with a file, or None."""
        full = f"{self.folder(step)}/{name}"
        where = self.storage.where(full)
        try:
            num_bytes = self.storage.size(full)
            if num_bytes is None:
                return f"{where} is missing"
            if num_bytes != entry["bytes"]:
                return f"{where} has {num_bytes} bytes, {entry['bytes']} were written"
            if hashes and self._sha256(step, name, entry["sha256"]) != entry["sha256"]:
                return f"{where} differs from what was written (sha256)"
        except StorageError as error:
            if self.storage.folder is None:
                raise
            return str(error)
        except OSError as error:
            return f"{where} cannot be read ({error.strerror or error})"
        return None

    def _sha256(self, step: int, name: str, expected: str) -> str:
        full, cache = f"{self.folder(step)}/{name}", self._cache_of(step)
        file = self.storage.fetch(full, cache)
        found = file_sha256(file)
        if found != expected and self.storage.folder is None:
            # The copy may be what is damaged: it is not the storage's fault before it came twice.
            file.unlink(missing_ok=True)
            found = file_sha256(self.storage.fetch(full, cache))
            if found != expected:
                file.unlink(missing_ok=True)
        return found

    def _cache_of(self, step: int) -> Path:
        # Named by content: a step that was written again is never taken for its older copy.
        commit = self.storage.read(f"{self.folder(step)}/{COMMIT}").decode().strip()
        folder = self._cache / f"step-{step:08d}-{commit[:16]}"
        if self.storage.folder is None and not folder.exists():
            self._prune_cache()
        return folder

    def _prune_cache(self) -> None:
        """Forget copies of checkpoints that the storage no longer has."""
        steps = {f"{step:08d}" for step in self.committed()}
        for folder in self._cache.glob("step-*"):
            if folder.name.split("-")[1] not in steps:
                shutil.rmtree(folder, ignore_errors=True)


# What the first checkpoints do not tell, and so cannot be held against.
_LATER_SETTINGS = ("gradient_dtype",)


def check_settings(where: str | Path, written: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to go on under another model, data or precision.

    Raises:
        UserError: names each setting that differs, with both values.
    """
    different = {
        name: f"{name} was {written.get(name)!r}, is {value!r}"
        for name, value in now.items()
        if written.get(name) != value and (name in written or name not in _LATER_SETTINGS)
    }
    if list(different) == ["plan"]:  # of the same corpus and settings
        raise UserError(
            f"checkpoint {PurePath(where).name} belongs to a run whose batches another version of "
            f"babelray made; this one would make others of the same corpus ({different['plan']}). "
            "Resume with the version that began the run, or start a run under another name"
        )
    if different:
        raise UserError(
            f"checkpoint {PurePath(where).name} belongs to another configuration: "
            f"{'; '.join(different.values())}. Resume with the run's own settings, or start a run "
            "under another name"
        )
