"""The dashboards and alert rules that are shipped: what they ask, of metrics that there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator

import promql_parser as promql
import pytest
import yaml

from cluster.monitoring import catalogue, kubernetes
from cluster.monitoring.__main__ import DRAWN, render
from cluster.monitoring.panels import RAY_NODES_ID, RAY_UTILIZATION_ID
from cluster.monitoring.promql import HEALTH_STATES
from trainer import metrics

RULES = [
    rule
    for name in kubernetes.SOURCES
    for group in yaml.safe_load((catalogue.MONITORING / name).read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
RECORDED = {rule["record"]: rule for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RUNBOOK = (catalogue.MONITORING.parents[1] / "docs" / "runbook.md").read_text(encoding="utf-8")
DASHBOARDS = {name: catalogue.load(name) for name in catalogue.NAMES}
EXPRESSIONS = catalogue.expressions()

_TARGET = {"instance", "job", "pod"}  # what Prometheus adds to each series, pod on Kubernetes
# Ray's, by the labels that are used; ray/dashboard/modules/{metrics,reporter} of ray 2.60.
RAY_LABELS = {
    "ray_node_cpu_utilization": set(),
    "ray_node_cpu_count": set(),
    "ray_node_mem_used": set(),
    "ray_node_mem_total": set(),
    "ray_node_disk_utilization_percentage": set(),
    "ray_node_disk_io_read_speed": set(),
    "ray_node_disk_io_write_speed": set(),
    "ray_node_network_receive_speed": set(),
    "ray_node_network_send_speed": set(),
    "ray_node_gpus_utilization": {"GpuIndex"},
    "ray_node_gram_used": {"GpuIndex"},
    "ray_node_gram_available": {"GpuIndex"},
    "ray_node_gpu_temperature_celsius": {"GpuIndex"},
    "ray_node_gpu_power_milliwatts": {"GpuIndex"},
    "ray_component_rss_bytes": {"Component"},
    "ray_actors": {"State", "Source"},
}


def known() -> dict[str, set[str]]:
    """Every metric that a query may name, and its labels."""
    labels = {name: RAY_LABELS[name] | _TARGET for name in RAY_LABELS}
    labels["up"] = set(_TARGET)
    # KubeRay's operator: ray-operator/controllers/ray/metrics/ray_job_metrics.go of 1.7.
    labels["kuberay_job_deployment_status"] = {
        "name", "namespace", "uid", "deployment_status", *_TARGET,
    }  # fmt: skip
    labels["ALERTS"] = {"alertname", "alertstate", "severity", "run"}
    for metric in [*metrics.declared(), *metrics.declared_evaluation()]:
        ours = {*metric.labels, *_TARGET}
        if metric.kind == "histogram":
            labels |= {f"{metric.name}_{part}": ours for part in ("sum", "count")}
            labels[f"{metric.name}_bucket"] = ours | {"le"}
        else:
            labels[metric.name] = ours
    # As their names say, which are level:metric:operation.
    labels |= {name: set(name.split(":")[0].split("_")) for name in RECORDED}
    return labels


KNOWN = known()


def nodes(expr: promql.Expr) -> Iterator[promql.Expr]:
    """An expression and all in it."""
    yield expr
    for name in ("expr", "lhs", "rhs", "param", "vector_selector", "vs"):
        inner = getattr(expr, name, None)
        if inner is not None and type(inner).__module__ == type(expr).__module__:
            yield from nodes(inner)
    if isinstance(expr, promql.Call):
        for argument in expr.args:
            yield from nodes(argument)


def selectors(expr: promql.Expr) -> list[promql.VectorSelector]:
    return [node for node in nodes(expr) if isinstance(node, promql.VectorSelector)]


def labelled(expr: promql.Expr) -> list[promql.VectorSelector]:
    """The selectors whose labels the result has, not those that it is only matched with."""
    sides = {"lhs": expr.lhs, "rhs": expr.rhs} if isinstance(expr, promql.BinaryExpr) else {}
    if sides:
        card = str(expr.modifier.card) if expr.modifier else ""
        if str(expr.op) in {"and", "unless"} or card.endswith("ManyToOne"):
            del sides["rhs"]
        elif card.endswith("OneToMany"):
            del sides["lhs"]
        return [selector for side in sides.values() for selector in labelled(side)]
    inner = getattr(expr, "expr", None)
    if inner is not None and not isinstance(expr, promql.VectorSelector):
        return labelled(inner)
    return selectors(expr)


def check(text: str) -> set[str]:
    """Parse a query and hold it against the metrics that there are.

    Returns:
        The metrics that it names.
    """
    parsed = promql.parse(text)
    found = set()
    for selector in selectors(parsed):
        name = selector.name
        assert name in KNOWN, f"no metric {name} in {text}"
        found.add(name)
        used = {matcher.name for matcher in selector.matchers.matchers}
        assert used <= KNOWN[name], f"{name} has no label {used - KNOWN[name]}: {text}"
    for node in nodes(parsed):
        if not isinstance(node, promql.AggregateExpr) or node.modifier is None:
            continue
        kept = set(node.modifier.labels)
        for name in {selector.name for selector in labelled(node.expr)}:
            assert kept <= KNOWN[name], f"by ({kept - KNOWN[name]}) of {name}: {text}"
    return found


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_committed_is_what_the_code_draws(name):
    committed = (catalogue.DASHBOARDS / f"{name}.json").read_text(encoding="utf-8")
    assert committed == render(name), "python -m cluster.monitoring writes them anew"


def test_the_rules_for_kubernetes_are_what_the_code_makes():
    committed = kubernetes.RULES.read_text(encoding="utf-8")
    assert committed == kubernetes.render(), "python -m cluster.monitoring writes them anew"
    rules = [
        rule for group in yaml.safe_load(committed)["spec"]["groups"] for rule in group["rules"]
    ]
    assert [rule.get("alert") for rule in rules] == [rule.get("alert") for rule in RULES]
    for rule in rules:
        assert check(rule["expr"])
    changed = [new["alert"] for new, old in zip(rules, RULES, strict=True) if new != old]
    assert changed == ["BabelrayNotWatched", "BabelrayTargetDown"]


def test_a_pod_that_has_never_answered_is_not_missed(tmp_path):
    """Prometheus finds pods from their start, and a long corpus keeps them silent."""
    groups = kubernetes.prometheus_rule()["spec"]["groups"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}), encoding="utf-8")

    def case(ups: dict[str, str], firing: dict[int, dict[str, str]], **series: str):
        of = {f'up{{job="babelray",{pod}}}': values for pod, values in ups.items()}
        return {
            "interval": "1m",
            "input_series": [{"series": s, "values": v} for s, v in {**of, **series}.items()],
            "promql_expr_test": [
                {
                    "expr": 'ALERTS{alertstate="firing"}',
                    "eval_time": f"{minute}m",
                    "exp_samples": [
                        {
                            "labels": f'ALERTS{{alertname="{name}",alertstate="firing",{labels}}}',
                            "value": 1,
                        }
                        for name, labels in found.items()
                    ],
                }
                for minute, found in firing.items()
            ],
        }

    down = 'instance="a",pod="p1",job="babelray",severity="ticket"'
    started = 'babelray_run_started_timestamp_seconds{run="r",instance="a",pod="p1"}'
    cases = [
        # One of two pods serves metrics, and then stops.
        case(
            {'instance="a",pod="p1"': "0x30 1x30 0x60", 'instance="b",pod="p2"': "0x120"},
            {
                25: {},
                75: {
                    "BabelrayTargetDown": down,
                    "BabelrayNotWatched": 'job="babelray",severity="page"',
                },
            },
        ),
        # A run ends; the next prepares its corpus, one of its pods at the address of the old one.
        case(
            {
                'instance="a",pod="p1"': "1x30 0x2 stale",
                'instance="a",pod="p3"': "_x35 0x45",
                'instance="b",pod="p4"': "_x35 0x45",
            },
            {42: {}, 60: {}, 75: {}},
            **{started: "0x30 stale"},
        ),
    ]
    file = tmp_path / "rules_test.yaml"
    file.write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": cases}), encoding="utf-8"
    )
    ended = promtool("test", "rules", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_the_checker_finds_what_is_wrong():
    check("sum by (run) (rate(babelray_steps_total[5m]))")
    for wrong in (
        "babelray_step_total",
        "rate(babelray_step_seconds[5m])",
        'babelray_steps_total{phase="forward"}',
        "1 - sum by (rank) (babelray_world_size) / 2",
        "clamp_min(max by (run) (babelray_loss), 0)",
        "histogram_quantile(0.5, sum by (le, rank) (rate(babelray_step_seconds_bucket[5m])))",
        "max by (run) (up == on (instance) group_right () up)",
    ):
        with pytest.raises(AssertionError):
            check(wrong)


@pytest.mark.parametrize(
    "query", EXPRESSIONS, ids=lambda query: f"{query.dashboard}: {query.panel}"
)
def test_a_query_of_a_dashboard(query):
    text = query.filled(run="a-run|b.run", instance="10\\\\.0\\\\.0\\\\.1")
    assert "$" not in text, text
    found = check(text)
    ours = {name for name in found if name.startswith("babelray_")}
    for selector in selectors(promql.parse(text)):
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert selector.name not in ours or "run" in matched, f"of all runs: {text}"


def test_what_needs_a_gpu_is_set_apart():
    of_gpus = {
        name
        for query in EXPRESSIONS
        if query.needs == "gpu"
        for name in check(query.filled(run="r"))
    }
    others = {
        name
        for query in EXPRESSIONS
        if query.needs is None
        for name in check(query.filled(run="r"))
    }
    assert {name for name in KNOWN if "_gpu" in name or "_gram" in name} <= of_gpus
    assert not {name for name in others if "gpu" in name or "gram" in name or "energy" in name}


def test_what_is_said_to_need_something_is_there():
    titles = {
        panel["title"] for name in DASHBOARDS for _, panel in catalogue.panels(DASHBOARDS[name])
    }
    assert set(catalogue.PANELS) <= titles
    assert {query.needs for query in EXPRESSIONS} == {None, "gpu", "scores", "fault"}


def test_every_metric_of_a_run_is_shown_somewhere():
    shown = set().union(*(check(query.filled(run="r")) for query in EXPRESSIONS))
    missing = {
        metric.name
        for metric in metrics.declared()
        if not {metric.name, f"{metric.name}_sum", f"{metric.name}_bucket"} & shown
    }
    assert not missing


def everything(dashboard):
    """Every panel, rows included."""
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels") or ()


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_panels_say_what_they_are(name):
    for _, panel in catalogue.panels(DASHBOARDS[name]):
        title = panel["title"]
        assert re.fullmatch(r"[^\n]+[.]", panel["description"]), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert panel["datasource"]["uid"] == "${datasource}", title
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}", title
            assert target["legendFormat"] or panel["type"] == "table", title
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references), title


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_panels_have_their_own_numbers_and_places(name):
    dashboard = DASHBOARDS[name]
    numbers = [panel["id"] for panel in everything(dashboard)]
    assert len(set(numbers)) == len(numbers)
    groups = [dashboard["panels"]]
    groups += [panel["panels"] for panel in dashboard["panels"] if panel.get("panels")]
    for group in groups:
        cells = set()
        for panel in group:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            covered = {
                (x, y)
                for x in range(place["x"], place["x"] + place["w"])
                for y in range(place["y"], place["y"] + place["h"])
            }
            assert not covered & cells, f"{panel['title']} lies on another panel"
            cells |= covered


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_the_dashboards_belong_together(name):
    dashboard = DASHBOARDS[name]
    assert dashboard["uid"] == f"babelray-{name}"
    assert dashboard["tags"] == ["babelray"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert check(variables["run"]["query"]["query"].split("(")[1].split(",")[0])
    assert ("instance" in variables) == (name == "cluster")
    others, ray = dashboard["links"]
    assert others["tags"] == ["babelray"]
    assert others["includeVars"]
    assert ray["url"] == "${ray:raw}"
    assert variables["ray"]["query"] == "http://127.0.0.1:8265"


@pytest.mark.parametrize("name", ["run", "cluster"])
def test_ray_finds_the_panels_that_its_overview_embeds(name):
    titles = {panel["id"]: panel["title"] for panel in everything(DASHBOARDS[name])}
    assert titles[RAY_NODES_ID] == "Machines"
    assert "busy" in titles[RAY_UTILIZATION_ID]


@pytest.mark.parametrize("rule", [*ALERTS.values(), *RECORDED.values()], ids=str)
def test_a_rule_names_metrics_that_there_are(rule):
    assert check(rule["expr"])


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_what_to_do(name):
    alert = ALERTS[name]
    assert name.startswith("Babelray")
    assert alert["labels"]["severity"] in {"page", "ticket"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def entries() -> dict[str, str]:
    """The runbook's entries by their headings."""
    parts = re.split(r"^###? (.+)$", RUNBOOK, flags=re.MULTILINE)
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    return {name: text for name, text in texts.items() if name.startswith("Babelray")}


def test_every_alert_has_an_entry_in_the_runbook_and_every_entry_an_alert():
    assert set(entries()) == set(ALERTS)
    section = ""
    for line in RUNBOOK.splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").lower()
        elif line.startswith("### "):
            severity = ALERTS[line.removeprefix("### ")]["labels"]["severity"]
            assert section == f"{severity}s", line


@pytest.mark.parametrize("name", ALERTS)
def test_an_entry_of_the_runbook(name):
    text = entries()[name]
    for part in ("**Means:**", "**Look:**", "**Do:**", "**Ignore:**"):
        assert text.count(part) == 1, part
    for linked in re.findall(r"\]\(#([a-z]+)\)", text):
        assert linked in {alert.lower() for alert in ALERTS}
    for block in re.findall(r"```promql\n(.*?)```", text, flags=re.DOTALL):
        for line in block.splitlines():
            assert check(line.split("  #")[0])


def test_the_commands_of_the_runbook_are_there():
    from cluster.cli import cli

    for words in re.findall(r"^\$ babelray (.*)$", RUNBOOK, flags=re.MULTILINE):
        name, *arguments = words.split("#")[0].split()
        command = cli.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in arguments if word.startswith("--")} <= options, words


def test_the_settings_of_the_runbook_are_there():
    from trainer.config import RunConfig

    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    for section, key in re.findall(r"`(\w+)\.(\w+)[=`]", RUNBOOK):
        assert key in sections[section].model_fields, f"{section}.{key}"


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (Debian and Ubuntu: apt install prometheus)")
    return subprocess.run(
        ["promtool", *arguments],
        cwd=catalogue.MONITORING,
        # Its garbage collector takes a third of its time, for memory that there is.
        env={**os.environ, "GOGC": "off", "GOMEMLIMIT": "500MiB"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_promtool_finds_nothing_wrong_with_the_rules():
    ended = promtool("check", "rules", "--lint=all", "--lint-fatal", *kubernetes.SOURCES)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_alert_fires_on_its_fault_and_none_on_a_healthy_run():
    tests = [name.replace(".yaml", "_test.yaml") for name in kubernetes.SOURCES]
    ended = promtool("test", "rules", *tests)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_panels_outlive_the_machine_of_the_first_rank(tmp_path):
    """Two hours on one, which dies; the other makes steps from 136 minutes on."""
    values = {
        ("run_started_timestamp_seconds", "r", "a:1"): "0x120 stale",
        ("run_started_timestamp_seconds", "r", "b:1"): "0x220",
        ("last_step_timestamp_seconds", "r", "a:1"): "0+60x120 stale",
        ("last_step_timestamp_seconds", "r", "b:1"): "0x135 8160+60x80",
        ("run_started_timestamp_seconds", "validates", "b:1"): "0x220",
        ("last_step_timestamp_seconds", "validates", "b:1"): "0+60x60 3600x160",
        ("validating", "validates", "b:1"): "0x60 1x160",
        ("run_lost", "lost", "b:1"): "_x100 1x50",
        # Its first rank has moved; the old machine keeps what it said last.
        ("last_checkpoint_timestamp_seconds", "moved", "a:1"): "60x220",
        ("last_checkpoint_timestamp_seconds", "moved", "b:1"): "7800x220",
        ("last_checkpoint_size_bytes", "moved", "a:1"): "500x220",
        ("last_checkpoint_size_bytes", "moved", "b:1"): "300x220",
    }
    code = {text: number for number, text, _ in HEALTH_STATES}
    expected = [
        ("Since last step", 125, {"r": 300, "validates": 3900}),
        ("Health", 115, {"r": "healthy", "validates": "validating", "lost": "lost"}),
        ("Health", 125, {"r": "healthy", "validates": "no step", "lost": "lost"}),
        ("Health", 132, {"r": "no step", "validates": "no step", "lost": "lost"}),
        ("Health", 140, {"r": "healthy", "validates": "no step", "lost": "lost"}),
        ("Size of a checkpoint", 5, {"moved": 300}),
    ]
    queries = {query.panel: query.filled(run=".+") for query in EXPRESSIONS}
    case = {
        "interval": "1m",
        "input_series": [
            {"series": f'babelray_{name}{{run="{run}",instance="{instance}"}}', "values": text}
            for (name, run, instance), text in values.items()
        ],
        "promql_expr_test": [
            {
                "expr": queries[panel],
                "eval_time": f"{minute}m",
                "exp_samples": [
                    {"labels": f'{{run="{run}"}}', "value": code.get(value, value)}
                    for run, value in found.items()
                ],
            }
            for panel, minute, found in expected
        ],
    }
    file = tmp_path / "panels_test.yaml"
    file.write_text(yaml.safe_dump({"tests": [case]}), encoding="utf-8")
    ended = promtool("test", "rules", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_no_alert_is_left_out_of_the_rule_tests():
    texts = [
        (catalogue.MONITORING / name.replace(".yaml", "_test.yaml")).read_text(encoding="utf-8")
        for name in kubernetes.SOURCES
    ]
    files = [yaml.safe_load(text)["tests"] for text in texts]
    healthy = {case["alertname"] for tests in files for case in tests[0]["alert_rule_test"]}
    assert healthy == set(ALERTS)
    tests = [case for tests in files for case in tests]
    assert not any("exp_alerts" in case for case in tests[0]["alert_rule_test"])
    shown = {
        case["alertname"]
        for test in tests[1:]
        for case in test.get("alert_rule_test", ())
        if case.get("exp_alerts")
    }
    assert shown == set(ALERTS)


def test_a_stale_dashboard_is_found(tmp_path, monkeypatch, capsys):
    from cluster.monitoring import __main__ as tool

    monkeypatch.setattr(tool, "DASHBOARDS", tmp_path)
    assert tool.main(["--check"]) == 1
    assert not list(tmp_path.iterdir())
    assert tool.main([]) == 0
    assert tool.main(["--check"]) == 0
    changed = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    changed["title"] = "by hand"
    (tmp_path / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    capsys.readouterr()
    assert tool.main(["--check"]) == 1
    assert capsys.readouterr().err.count("stale: ") == 1
