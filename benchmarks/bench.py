"""All benchmarks, one table: what was measured, against what, and against the committed baseline.

    make bench                              # all, about an hour
    make bench BENCH='--quick'              # a few minutes
    python benchmarks/bench.py --only train stream
    python benchmarks/bench.py --only peers # other toolkits, in environments that it makes

Each benchmark is a script beside this one, which measures its alternatives in the same run and
writes what it found with a ``summary``; this one runs them, joins the summaries and writes
``results/<machine>-<date>.json``. Benchmarks that were not run keep their rows of the same day.

The baseline is the newest such file that is committed, of this machine if there is one. Of another
machine's only ratios are compared. A row has changed if every turn of now lies beyond every turn of
then and the medians differ by more than a twentieth. Exit status 1: something got worse, or a
benchmark failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, default_corpora, machine
from table import Comparison, compare, lines, machine_slug

HERE = Path(__file__).parent
FORMAT = "babelray bench 1"
_LIMIT_S = 3600


@dataclass(frozen=True)
class Benchmark:
    """A script; ``quick`` are its arguments for a short run, None if it has no place in one."""

    name: str
    quick: tuple[str, ...] | None = None
    full: tuple[str, ...] = ()
    script: str = ""
    takes_run: bool = False  # a trained model by --run, else it trains one
    corpora: bool = True  # takes --corpora
    asked: bool = False  # runs only if it is asked for by name

    @property
    def file(self) -> Path:
        """Where the script is."""
        return HERE / (self.script or f"{self.name}.py")


BENCHMARKS = (
    Benchmark("train", quick=("--rounds", "2", "--seconds", "3", "--warm-up", "15")),
    Benchmark("curves"),
    Benchmark("stream", quick=("--repeats", "2", "--passes", "1")),
    Benchmark("latency", quick=("--starts", "1", "--rounds", "1", "--seconds", "4")),
    Benchmark("overhead", quick=("--rounds", "2", "--seconds", "4")),
    Benchmark("start", quick=("--quick",)),
    # Not its part on quality, which trains six models.
    Benchmark("communication", full=("--parts", "traffic", "collectives", "scaling")),
    Benchmark("checkpoint"),
    Benchmark("recovery", corpora=False),
    Benchmark("decode", takes_run=True),
    Benchmark("serving", takes_run=True),
    Benchmark("metrics"),
    Benchmark("peers", quick=("--quick",), script="peers/compare.py", asked=True),
)


def main() -> None:
    """Run, print, write, compare."""
    arguments = parse()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    chosen = choose(arguments.only, quick=arguments.quick)
    before = machine()
    slug = machine_slug(str(before["cpu"]), int(str(before["cores"])))
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = f"{slug}-{today}{'-quick' if arguments.quick else ''}.json"
    output = arguments.output or RESULTS / name
    baseline_file, baseline = load_baseline(arguments.baseline, slug)

    found: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="babelray-bench-") as scratch:
        for benchmark in chosen:
            began = time.monotonic()
            print(f"{benchmark.name} ...", flush=True)
            try:
                result = run(benchmark, arguments, Path(scratch))
            except BenchmarkError as error:
                failed[benchmark.name] = str(error)
                print(f"  FAILED: {error}")
                continue
            seconds = round(time.monotonic() - began)
            found[benchmark.name] = {**result, "seconds": seconds}
            print(f"  {len(result['rows'])} rows in {seconds} s")

    kept = {} if arguments.quick else same_day(output)
    # In the order in which they are listed, whatever was run first.
    order = {benchmark.name: number for number, benchmark in enumerate(BENCHMARKS)}
    benchmarks = dict(sorted({**kept, **found}.items(), key=lambda item: order.get(item[0], 99)))
    content = {
        "format": FORMAT,
        "date": today,
        "quick": arguments.quick,
        "machine": before,
        "benchmarks": benchmarks,
        "failed": failed,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=2) + "\n")

    rows = rows_of(content, set(found))
    old_rows = rows_of(baseline, set(found)) if baseline else []
    print()
    print("\n".join(lines(rows, old_rows)))
    print(f"\nwritten: {output}")
    regressed = False
    if baseline is None:
        print("no baseline to compare with: none is committed")
    else:
        same = baseline["machine"]["cpu"] == before["cpu"]
        same = same and baseline["machine"]["cores"] == before["cores"]
        comparison = compare(rows, old_rows, same_machine=same)
        print(f"against {baseline_file}:", *report(comparison, baseline, before, same), sep="\n  ")
        regressed = bool(comparison.regressions)
    if failed:
        print("failed: " + ", ".join(failed))
    raise SystemExit(1 if regressed or failed else 0)


def parse() -> argparse.Namespace:
    """The command line."""
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short runs of what has one")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--baseline", type=Path, help="by default the newest that is committed")
    parser.add_argument("--output", type=Path, help="by default results/<machine>-<date>.json")
    parser.add_argument(
        "--run", type=Path, help="a trained run for decode and serving; else each trains one"
    )
    parser.add_argument("--corpora", type=Path, default=default_corpora())
    parser.add_argument("--venvs", type=Path, help="where the peers' environments are")
    return parser.parse_args()


def choose(only: list[str] | None, *, quick: bool) -> list[Benchmark]:
    """What is run; says what is left out."""
    there = [benchmark for benchmark in BENCHMARKS if benchmark.file.is_file()]
    if only:
        chosen = [benchmark for benchmark in there if benchmark.name in only]
    else:
        chosen = [benchmark for benchmark in there if not benchmark.asked]
        if quick:
            left_out = [benchmark.name for benchmark in chosen if benchmark.quick is None]
            chosen = [benchmark for benchmark in chosen if benchmark.quick is not None]
            print(f"quick: without {', '.join(left_out)}")
    return chosen


class BenchmarkError(Exception):
    """Why a benchmark gave nothing, in a line."""


def run(benchmark: Benchmark, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """One benchmark's command, machine and rows; what it prints is passed on, indented."""
    # A quick run is not what results/ holds.
    result_file = (scratch if arguments.quick else RESULTS) / f"{benchmark.name}.json"
    command = [sys.executable, str(benchmark.file), "--output", str(result_file)]
    command += (benchmark.quick or ()) if arguments.quick else benchmark.full
    if benchmark.corpora:
        command += ["--corpora", str(arguments.corpora)]
    if benchmark.takes_run and arguments.run:
        command += ["--run", str(arguments.run)]
    if benchmark.name == "peers" and arguments.venvs:
        command += ["--venvs", str(arguments.venvs)]
    began = time.time()
    log: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line.rstrip())
            print(f"  | {line.rstrip()}")
            if time.time() - began > _LIMIT_S:
                process.terminate()
                raise BenchmarkError(f"took more than {_LIMIT_S} s")
    if not result_file.is_file() or result_file.stat().st_mtime < began:
        last = next((line for line in reversed(log) if line.strip()), "it said nothing")
        raise BenchmarkError(f"ended with {process.returncode}: {last.strip()[:200]}")
    result = json.loads(result_file.read_text())
    summary = result.get("summary")
    if not summary:
        raise BenchmarkError("its result has no summary")
    rows = [{**row, "benchmark": benchmark.name} for row in summary]
    head = {name: result.get(name) for name in ("command", "date", "commit", "machine")}
    # A result may be written and the status say that something is wrong with it: serving's errors.
    return {**head, "exit_status": process.returncode, "rows": rows}


def same_day(output: Path) -> dict[str, Any]:
    """The benchmarks that the file has already: those that are not run now are kept."""
    if not output.is_file():
        return {}
    benchmarks: dict[str, Any] = json.loads(output.read_text())["benchmarks"]
    return benchmarks


def rows_of(content: dict[str, Any], names: set[str]) -> list[dict[str, Any]]:
    """The rows of these benchmarks."""
    return [
        row
        for name, benchmark in content["benchmarks"].items()
        if name in names
        for row in benchmark["rows"]
    ]


def load_baseline(given: Path | None, slug: str) -> tuple[str, dict[str, Any] | None]:
    """The file's name and content: the one given, else the newest committed one.

    This machine's come first. Without git (an archive) what lies in results/ counts as committed.
    """
    if given:
        try:
            return str(given), parsed(given.read_text(), str(given))
        except OSError as error:
            raise SystemExit(f"--baseline {given}: {error.strerror}") from None
    texts = committed()
    for own in (True, False):
        dated = {
            name[-len("2026-01-01.json") :]: name
            for name in sorted(texts)
            if name.startswith(slug) == own
        }
        if dated:
            name = dated[max(dated)]
            return name, parsed(texts[name], name)
    return "", None


def parsed(text: str, where: str) -> dict[str, Any]:
    """A result of this script; ends the program if it is another file."""
    try:
        content = json.loads(text)
        if content["format"] == FORMAT:
            return dict(content)
    except (ValueError, KeyError, TypeError):
        pass
    raise SystemExit(f"{where}: not a result of benchmarks/bench.py ({FORMAT})")


def committed() -> dict[str, str]:
    """The text of every committed ``results/<machine>-<date>.json``."""
    pattern = "*-cores-????-??-??.json"
    git = ["git", "-C", str(RESULTS)]
    try:
        listed = subprocess.run(
            [*git, "ls-tree", "--name-only", "HEAD", "./"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.splitlines()
        return {
            name: subprocess.run(
                [*git, "show", f"HEAD:./{name}"], check=True, capture_output=True, text=True
            ).stdout
            for name in listed
            if Path(name).match(pattern)
        }
    except (OSError, subprocess.CalledProcessError):
        return {file.name: file.read_text() for file in RESULTS.glob(pattern)}


def report(
    comparison: Comparison, baseline: dict[str, Any], now: dict[str, object], same: bool
) -> list[str]:
    """What the comparison says, a line each."""
    told = []
    if not same:
        then = baseline["machine"]
        told.append(
            f"another machine ({then['cpu']}, {then['cores']} cores): only ratios are compared, "
            f"{comparison.values_left_out} values are not"
        )
    versions = [
        f"{name} {baseline['machine'][name]} is now {now[name]}"
        for name in ("python", "torch", "deepspeed", "ray")
        if baseline["machine"].get(name) != now.get(name)
    ]
    told += versions
    told += [str(change) for change in comparison.changes]
    told += [f"not in the baseline: {name}" for name in comparison.new]
    told += [f"no longer there: {name}" for name in comparison.gone]
    better = len(comparison.changes) - len(comparison.regressions)
    told.append(
        f"{comparison.compared} rows compared: {len(comparison.regressions)} worse and {better} "
        "better beyond their spread"
    )
    return told


if __name__ == "__main__":
    main()
