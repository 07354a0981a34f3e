"""The alert rules as an object of Prometheus' operator, for k8s/monitoring."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.monitoring.catalogue import MONITORING

SOURCES = ("alerts.yaml", "alerts-kubernetes.yaml")
RULES = MONITORING / "rules.yaml"

# Prometheus finds a pod before anything in it serves metrics, and while a long corpus is prepared
# nothing does. So on Kubernetes only a target that has answered can be missed; one of a run that is
# over says nothing about the next run's, though they may have the same address.
_ANSWERED = 'and on (instance, pod) max_over_time(up{job="babelray"}[1h]) == 1'
_HAS_ANSWERED = {
    "BabelrayTargetDown": _ANSWERED,
    "BabelrayNotWatched": f'and on (job) (up{{job="babelray"}} == 0 {_ANSWERED})',
}
_LABELS = {
    "app.kubernetes.io/name": "babelray",
    "app.kubernetes.io/component": "monitoring",
}


def prometheus_rule() -> dict[str, Any]:
    """One PrometheusRule with all groups of ``SOURCES``."""
    groups: list[dict[str, Any]] = []
    for name in SOURCES:
        groups += yaml.safe_load((MONITORING / name).read_text(encoding="utf-8"))["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        if condition := _HAS_ANSWERED.get(rule.get("alert", "")):
            rule["expr"] = f"{rule['expr'].strip()}\n{condition}\n"
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "babelray", "labels": _LABELS},
        "spec": {"groups": groups},
    }


class _Dumper(yaml.SafeDumper):
    """Lists indented and texts of several lines as blocks, as the hand-written files have them."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def render() -> str:
    """The file as it is committed."""
    text = yaml.dump(prometheus_rule(), Dumper=_Dumper, sort_keys=False, width=90)
    return (
        f"# Made of {' and '.join(SOURCES)} by `make docs`; do not edit.\n"
        f"# yamllint disable rule:line-length\n{text}"
    )
