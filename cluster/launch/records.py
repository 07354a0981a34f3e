"""Which runs were launched from here, and where to: ``<runs>/.launched/RUN.json``.

A record lets a later command find the run's cluster again, and launch the run anew.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.hints import DEFAULT_RUNS
from cluster.launch.target import Place, Target
from data_shards.errors import UserError
from trainer.storage import write_atomically

_FOLDER = ".launched"


@dataclass(frozen=True)
class Record:
    """A launch: of which run, where to, with which configuration (YAML), when (Unix seconds)."""

    run: str
    place: Place
    config: str
    time: float


def write_record(record: Record, runs: Path) -> None:
    """Remember a launch; an earlier one of the same run is forgotten."""
    file = _file(record.run, runs)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.parent.chmod(0o700)  # an address may hold a password
    write_atomically(file, json.dumps(asdict(record), indent=2) + "\n")


def read_record(run: str, runs: Path) -> Record | None:
    """The last launch of the run from here, if there was one.

    Raises:
        UserError: its file is damaged.
    """
    file = _file(run, runs)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        place = values.pop("place")
        place["components"] = tuple(place["components"])
        return Record(place=Place(**place), **values)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(
            f"{file} is damaged: remove it and launch the run again; nothing on the cluster is lost"
        ) from None


def forget(record: Record, before: Record | None, runs: Path) -> None:
    """Undo ``write_record``: ``before`` is what it replaced."""
    if before is not None:
        write_record(before, runs)
    else:
        _file(record.run, runs).unlink(missing_ok=True)


def launched(runs: Path) -> list[Record]:
    """All of them, by name."""
    names = sorted(file.stem for file in (runs / _FOLDER).glob("*.json"))
    found = (read_record(name, runs) for name in names)
    return [record for record in found if record is not None]


def open_target(place: Place, runs: Path = DEFAULT_RUNS) -> Target:
    """The target at a place; nothing is contacted yet.

    ``runs`` is the folder of runs here: the commands that it tells people to type name it.
    """
    if place.kind == "ray":
        from cluster.launch.ray_jobs import RayJobsTarget

        return RayJobsTarget(place, runs=runs)
    from cluster.launch.kubernetes import KubernetesTarget

    return KubernetesTarget(place)


def _file(run: str, runs: Path) -> Path:
    return runs / _FOLDER / f"{run}.json"
