"""``make chaos``: an undisturbed run, then each fault at random moments, and what it cost."""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.chaos import host_faults, table
from tests.chaos.faults import FAULTS, Fault, Stage
from tests.chaos.measure import Reference, Row, measure, measure_reference
from tests.chaos.recorder import Options
from tests.chaos.scene import Scene, SceneError
from tests.chaos.workspace import (
    PACE_S,
    REPOSITORY,
    Workspace,
    adopt_orphans,
    end_descendants,
    scratch,
)

assert host_faults  # imported to register its faults

_DOCUMENT = REPOSITORY / "docs" / "reliability.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every fault went as it should, 1 if not, 2 for wrong arguments."""
    given = _parse(arguments)
    # So that SIGTERM, too, takes everything down.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    adopt_orphans()
    began, load = time.monotonic(), os.getloadavg()[0]
    with scratch(keep=given.keep) as folder:
        if given.keep:
            print(f"kept: {folder}")
        try:
            rows = _play_all([FAULTS[name] for name in given.faults], folder, given.seed)
        finally:
            end_descendants()
    summary = table.Summary(given.seed, time.monotonic() - began, load)
    text = table.markdown(rows, summary)
    print(f"\n{text}")
    problems = [f"{row.fault}: {problem}" for row in rows for problem in row.problems]
    for problem in problems:
        print(f"chaos: error: {problem}", file=sys.stderr)
    if given.write:
        table.insert(_DOCUMENT, text)
        print(f"written into {_DOCUMENT}")
    return 1 if problems else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Break real runs and measure what it cost; exit status 1 if more than allowed.",
        epilog="faults:\n" + "\n".join(f"  {f.name:22} {f.title}" for f in FAULTS.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("faults", nargs="*", metavar="FAULT", help="of those below; default: all")
    parser.add_argument("--seed", type=int, help="decides the moments; by default a new one")
    parser.add_argument("--write", action="store_true", help=f"also put it into {_DOCUMENT.name}")
    parser.add_argument("--keep", action="store_true", help="leave the runs' folders, to look at")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.faults if name not in FAULTS]
    if unknown:
        parser.error(f"unknown fault {unknown[0]}: choose of {', '.join(FAULTS)}")
    given.faults = given.faults or list(FAULTS)
    if given.seed is None:
        given.seed = random.SystemRandom().randrange(10**6)
    return given


def _play_all(faults: Sequence[Fault], folder: Path, seed: int) -> list[Row]:
    workspace = Workspace(folder)
    print(f"seed {seed}: an undisturbed run first", flush=True)
    reference, first = _play_undisturbed(workspace)
    rows = [first]
    for fault in faults:
        print(f"{fault.name} ...", end=" ", flush=True)
        row = _play(fault, workspace, reference, seed)
        rows.append(row)
        print(row.skipped or f"{len(row.problems)} problems, {row.took_s:.0f} s", flush=True)
    return rows


def _play_undisturbed(workspace: Workspace) -> tuple[Reference, Row]:
    began = time.monotonic()
    scene = Scene(workspace, "undisturbed", random.Random(0), options=Options(pace_s=PACE_S))
    scene.start()
    try:
        scene.ended()
    except SceneError as error:
        raise SystemExit(f"the undisturbed run failed: {error}\n{_tail(scene)}") from None
    reference = measure_reference(scene)
    final = reference.losses[max(reference.losses)]
    took_s = time.monotonic() - began
    return reference, Row("none", None, 0, 0, 0, final_loss=final, difference=0.0, took_s=took_s)


def _play(fault: Fault, workspace: Workspace, reference: Reference, seed: int) -> Row:
    row = Row(fault.title, skipped=fault.lacking())
    if row.skipped:
        return row
    began = time.monotonic()
    with ExitStack() as stack:
        stack.callback(end_descendants)
        stage = Stage(workspace, fault.name, random.Random(f"{seed}/{fault.name}"), stack)
        try:
            row = measure(fault.title, fault.play(stage), reference)
        except (SceneError, TimeoutError) as error:
            row.problems = [*(p for scene in stage.scenes for p in scene.problems), str(error)]
        except Exception as error:  # the other faults are worth playing all the same
            traceback.print_exc()
            row.problems = [f"the harness failed: {error!r}"]
        if row.problems:
            for scene in stage.scenes:
                print(f"\n{_tail(scene)}", file=sys.stderr)
    row.took_s = time.monotonic() - began
    return row


def _tail(scene: Scene, lines: int = 40) -> str:
    said = scene.said().splitlines()[-lines:]
    return "\n".join(f"  {scene.name}| {line}" for line in said)


if __name__ == "__main__":
    sys.exit(main())
