"""Write the dashboards and the rules for Kubernetes, or check that they are what is committed."""

from __future__ import annotations

import argparse
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from cluster.monitoring import data, kubernetes, machines, reliability, run
from cluster.monitoring.catalogue import DASHBOARDS

DRAWN = {
    "run": run.draw,
    "cluster": machines.draw,
    "data": data.draw,
    "reliability": reliability.draw,
}


def render(name: str) -> str:
    """A dashboard as Grafana imports it."""
    return JSONEncoder(sort_keys=True, indent=2, ensure_ascii=False).encode(DRAWN[name]()) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """0; with ``--check`` 1 if a file would change."""
    parser = argparse.ArgumentParser(prog="python -m cluster.monitoring", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    checking = parser.parse_args(arguments).check
    stale = []
    made = {DASHBOARDS / f"{name}.json": render(name) for name in DRAWN}
    made[kubernetes.RULES] = kubernetes.render()
    for file, text in made.items():
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        stale.append(file)
        if not checking:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    for file in stale:
        sys.stderr.write(
            f"{file}: {'stale: run this without --check' if checking else 'written'}\n"
        )
    return int(checking and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
