"""The code that travels with a job on somebody's Ray cluster: one archive, always the same bytes.

Its name is its content's hash, so that the cluster keeps one copy of what did not change.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_shards.errors import UserError

PACKAGES = ("cluster", "trainer", "model", "data_shards", "k8s")
CONFIG_FILE = "run.yaml"

_ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = frozenset({"__pycache__", ".mypy_cache", ".ruff_cache"})
_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Upload:
    """An archive for Ray's ``working_dir``.

    Attributes:
        content: the zip file.
        files: (path in it, bytes) of each.
    """

    content: bytes
    files: tuple[tuple[str, int], ...]

    @property
    def uri(self) -> str:
        """How a job names it."""
        # SHA-1 is what Ray's own client names packages by.
        digest = hashlib.sha1(self.content, usedforsecurity=False).hexdigest()
        return f"gcs://_ray_pkg_{digest}.zip"


def pack(config: str | None = None, *, root: Path = _ROOT) -> Upload:
    """The packages of this installation, and the run's configuration as ``CONFIG_FILE``.

    Raises:
        UserError: this installation lacks one of its packages.
    """
    files = [(str(file.relative_to(root)), file.read_bytes()) for file in _files(root)]
    if config is not None:
        files.append((CONFIG_FILE, config.encode()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    sizes = tuple((name, len(content)) for name, content in files)
    return Upload(buffer.getvalue(), sizes)


def _files(root: Path) -> Iterator[Path]:
    for package in PACKAGES:
        if not (root / package).is_dir():
            raise UserError(f"{root / package} is missing: install babelray anew (make setup)")
        yield from sorted(
            file
            for file in (root / package).rglob("*")
            if file.is_file() and not _LEFT_OUT.intersection(file.parts) and file.suffix != ".pyc"
        )
