"""What an evaluation translates: splits of the run's corpus, sacreBLEU's test sets, own files.

sacreBLEU knows the WMT and IWSLT test sets by name, with their addresses and checksums, and keeps
them in ``$SACREBLEU`` (by default ``~/.sacrebleu``).
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import sacrebleu.utils
from sacrebleu.dataset import DATASETS

from data_shards.errors import UserError
from data_shards.manifest import Manifest, SplitName
from trainer.translate import read_lines

# A server that accepts a connection and then says nothing.
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class TestSet:
    """Parallel sentences with the name that they are reported under.

    ``further_references`` are other translations of the same sentences, for the scores that can use
    them. ``files`` are the user's own.
    """

    # Not a test case, though pytest's collection would take it for one by its name.
    __test__ = False

    name: str
    sources: list[str]
    references: list[str]
    files: tuple[Path, Path] | None = None
    further_references: tuple[list[str], ...] = ()

    @property
    def reference_streams(self) -> list[list[str]]:
        """All references, one list a translator, as sacreBLEU takes them."""
        return [self.references, *self.further_references]

    @property
    def stem(self) -> str:
        """The name as part of a file's name: ``wmt14/full`` is ``wmt14-full``."""
        return self.name.replace("/", "-")

    @property
    def unique_stem(self) -> str:
        """``stem``; with digits of the text for the user's files: others may be named alike."""
        return f"{self.stem}-{self.sha256()[:8]}" if self.files else self.stem

    def sha256(self) -> str:
        """Of all sentences and references, in hex."""
        digest = hashlib.sha256()
        for lines in (self.sources, *self.reference_streams):
            for line in lines:
                digest.update(line.encode() + b"\n")
            digest.update(b"\0")
        return digest.hexdigest()


def read_test_set(source: Path, reference: Path) -> TestSet:
    """Two parallel files as a test set named after the source file.

    Raises:
        UserError: a file is missing, not UTF-8 or empty, or they differ in length.
    """
    sources, references = _read_text(source), _read_text(reference)
    _check_parallel(sources, references, str(source), str(reference))
    if not sources:
        raise UserError(f"nothing to evaluate: {source} is empty")
    return TestSet(
        name=source.name,
        sources=sources,
        references=references,
        files=(source.resolve(), reference.resolve()),
    )


def open_test_sets(
    names: Sequence[str], manifest: Manifest, *, mirror: str | None = None
) -> list[TestSet]:
    """The test sets of these names, in order, each once.

    Args:
        names: splits of the corpus (``test``, ``valid``) or sacreBLEU's names (``wmt14/full``).
        manifest: the run's corpus; its languages say which side of a WMT test set is the source.
        mirror: folder or URL that holds the archives that sacreBLEU would download.

    Raises:
        UserError: names that are unknown (all of them in one message), or a test set that is not
            in sacreBLEU's cache and cannot be fetched.
    """
    names = list(dict.fromkeys(names))
    splits = list(manifest.data.splits)
    public = public_names(manifest)
    unknown = [name for name in names if name not in splits and name not in public]
    if unknown:
        raise UserError(_unknown(unknown, manifest, splits, public))
    return [
        _split(manifest, name) if name in splits else _public(name, _pair(manifest), mirror)
        for name in names
    ]


def public_names(manifest: Manifest) -> list[str]:
    """sacreBLEU's test sets for the corpus' languages, by name."""
    pair = _pair(manifest)
    return sorted(name for name, dataset in DATASETS.items() if pair in dataset.langpairs)


def is_reserved(name: str) -> bool:
    """Whether a split of a corpus or a test set of sacreBLEU's is reported under this name."""
    return name in ("test", "valid") or name in {known.replace("/", "-") for known in DATASETS}


def reopen(name: str, files: tuple[Path, Path] | None, manifest: Manifest | None) -> TestSet | None:
    """The test set of a stored evaluation; None where it cannot be told any more.

    Raises:
        UserError: its files are gone, or sacreBLEU's cache holds it no longer.
    """
    if files is not None:
        return read_test_set(*files)
    if manifest is None:
        return None
    return open_test_sets([name], manifest)[0]


def _read_text(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            return list(read_lines(stream, name=str(file)))
    except FileNotFoundError:
        raise UserError(f"file not found: {file}") from None
    except OSError as error:
        raise UserError(f"file cannot be read: {file}: {error.strerror}") from None


def _check_parallel(sources: list[str], references: list[str], source: str, reference: str) -> None:
    if len(sources) != len(references):
        raise UserError(
            f"source and reference are not parallel: {source} has {len(sources)} lines, "
            f"{reference} has {len(references)}"
        )


def _split(manifest: Manifest, name: str) -> TestSet:
    split: SplitName = "valid" if name == "valid" else "test"
    sources, references = manifest.split_text(split)
    return TestSet(name=name, sources=sources, references=references)


def _pair(manifest: Manifest) -> str:
    return f"{manifest.source_language}-{manifest.target_language}"


def _unknown(unknown: list[str], manifest: Manifest, splits: list[Any], public: list[str]) -> str:
    pair = _pair(manifest)
    parts = []
    for name in unknown:
        if name in ("test", "valid"):
            parts.append(f"the corpus in {manifest.folder} has no {name} sentences")
            continue
        close = get_close_matches(name, [*splits, *public], n=2)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        if name in DATASETS:
            hint = f" for {pair} (sacreBLEU has it for {', '.join(DATASETS[name].langpairs)})"
        parts.append(f"unknown test set {name!r}{hint}")
    own = f"the run's corpus has {', '.join(splits) or 'none'}"
    others = f"sacreBLEU has, for {pair}, {', '.join(public) or 'none'}"
    return f"{'; '.join(parts)}: {own}; {others}. Or give --source and --reference files"


def _public(name: str, pair: str, mirror: str | None) -> TestSet:
    dataset = DATASETS[name]
    paths = [Path(dataset._get_txt_file_path(pair, field)) for field in dataset.fieldnames(pair)]
    if not all(path.is_file() for path in paths):
        _fetch(dataset, mirror)
        try:
            dataset.process_to_text(pair)
        except (OSError, ValueError) as error:
            raise UserError(
                f"sacreBLEU cannot read its test set {name}: {error}: remove {dataset._outdir} and "
                "try again"
            ) from None
    source, references = dataset.get_source_file(pair), dataset.get_reference_files(pair)
    sources, *streams = (_read_text(Path(file)) for file in (source, *references))
    for file, stream in zip(references, streams, strict=True):
        _check_parallel(sources, stream, source, file)
    return TestSet(
        name=name, sources=sources, references=streams[0], further_references=tuple(streams[1:])
    )


def _fetch(dataset: Any, mirror: str | None) -> None:
    """The dataset's archives in sacreBLEU's cache, unpacked."""
    raw = Path(dataset._rawdir)
    raw.mkdir(parents=True, exist_ok=True)
    for url, md5 in zip(dataset.data, dataset.md5 or [None] * len(dataset.data), strict=True):
        archive = raw / dataset._get_tarball_filename(url)
        if not archive.is_file() or not archive.stat().st_size:
            _download(dataset.name, url, mirror, archive)
        if md5 is not None and sacrebleu.utils.get_md5sum(str(archive)) != md5:
            raise UserError(
                f"{archive} is not the archive of {dataset.name} (expected md5 {md5}): remove it, "
                f"and put there what lies at {url}"
            )
        sacrebleu.utils.extract_tarball(str(archive), str(raw))


def _download(name: str, url: str, mirror: str | None, archive: Path) -> None:
    """Fetch into the cache; a transfer that breaks off leaves nothing there."""
    base = os.path.basename(url)
    origin = url if mirror is None else _mirrored(mirror, base)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_S)
    try:
        # Its checksum is looked at afterwards: sacreBLEU itself would end the process.
        sacrebleu.utils.download_file(origin, str(archive))
    except (OSError, SystemExit, ValueError) as error:
        archive.unlink(missing_ok=True)
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"the test set {name} is not in sacreBLEU's cache, and {origin} cannot be fetched "
            f"({reason}). Put the file {base} (its home is {url}) at {archive}, or into a folder "
            "that --mirror names"
        ) from None
    except BaseException:
        archive.unlink(missing_ok=True)
        raise
    finally:
        socket.setdefaulttimeout(timeout)


def _mirrored(mirror: str, base: str) -> str:
    if re.match(r"https?://", mirror):
        return f"{mirror.rstrip('/')}/{base}"
    return (Path(mirror.removeprefix("file://")).expanduser().absolute() / base).as_uri()
