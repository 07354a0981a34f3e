"""What an evaluation has translated so far, on the disk: it may be interrupted at any moment."""

from __future__ import annotations

import fcntl
import glob
import json
import os
from pathlib import Path
from types import TracebackType

from data_shards.errors import UserError

_SUFFIX = ".partial.jsonl"
_DIGITS = 8


def partial_file(folder: Path, name: str, digest: str) -> Path:
    """Its place: what another digest left of the same evaluation may lie beside it."""
    return folder / f"{name}.{digest[:_DIGITS]}{_SUFFIX}"


def others(file: Path) -> list[Path]:
    """The files of the same evaluation that belong to other digests."""
    name = file.name.removesuffix(_SUFFIX).rpartition(".")[0]
    pattern = glob.escape(f"{name}.") + "[0-9a-f]" * _DIGITS + _SUFFIX
    return sorted(found for found in file.parent.glob(pattern) if found != file)


def remove_others(file: Path) -> None:
    """Remove ``others``, but for those that another process works on."""
    for other in others(file):
        try:
            descriptor = os.open(other, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            other.unlink(missing_ok=True)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


class PartialResult:
    """An append-only file of translated batches, one JSON object a line, each synced.

    The first line holds a digest of all that decides the translations: a file of another digest
    (that begins alike) is emptied. While it is open no other process may have it.

    Attributes:
        batches: hypotheses by the batch's number, as found and as added.
        seconds: time spent decoding them, over all attempts.

    Raises:
        UserError: another process has it.
    """

    def __init__(self, file: Path, digest: str) -> None:
        self.file = file
        self.batches: dict[int, list[str]] = {}
        self.seconds = 0.0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open_locked(file)
        try:
            self._recover(digest)
        except BaseException:
            os.close(self._descriptor)
            raise

    def add(self, number: int, hypotheses: list[str], seconds: float) -> None:
        """Keep a batch; on return it is on the disk."""
        self._append({"batch": number, "hypotheses": hypotheses, "seconds": round(seconds, 4)})
        self.batches[number] = hypotheses
        self.seconds += seconds

    def remove(self) -> None:
        """The result is written: the file is not needed any more. Only while it is open."""
        self.file.unlink(missing_ok=True)

    def __enter__(self) -> PartialResult:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def _recover(self, digest: str) -> None:
        """Take over what is there, up to the first line that is not whole."""
        lines = self.file.read_bytes().split(b"\n")
        whole, found = 0, []
        for line in lines[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
            whole += len(line) + 1
        if not found or found[0].get("digest") != digest:
            os.ftruncate(self._descriptor, 0)
            self._append({"digest": digest})
            return
        os.ftruncate(self._descriptor, whole)
        for entry in found[1:]:
            self.batches[entry["batch"]] = entry["hypotheses"]
            self.seconds += entry["seconds"]

    def _append(self, entry: dict[str, object]) -> None:
        data = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fsync(self._descriptor)


def _open_locked(file: Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, file):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another process is making this evaluation now ({file}): wait for it, or stop it"
            ) from None
        os.close(descriptor)  # whoever had it has finished and removed it


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
