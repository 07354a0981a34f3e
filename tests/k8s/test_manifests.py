"""Every overlay, with the components that go together: rendered, held against schemas and lint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable

import pytest

from cluster.cli import cli
from cluster.launch.lint import lint
from cluster.launch.lint_pods import matches
from tests.k8s import rendering, schemas
from tests.k8s.rendering import K8S, OVERLAYS, Choice, kustomize, render, render_all
from trainer.config import parse_config, read_values

pytestmark = pytest.mark.k8s


def job(choice: Choice, component: str = "training"):
    (found,) = [
        document
        for document in render(choice)
        if document["kind"] == "RayJob"
        and document["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]
    return found


def assert_sound(choices: Iterable[Choice]) -> None:
    for choice, documents in render_all(choices):
        found = [problem for document in documents for problem in schemas.problems(document)]
        found += map(str, lint(documents))
        assert not found, (choice, found)


def test_every_overlay_alone_and_with_each_component():
    choices = list(rendering.singly())
    assert len(choices) == len(OVERLAYS) * (1 + len(rendering.COMPONENTS)) >= 40
    assert_sound(choices)


def test_as_many_components_as_go_together():
    assert_sound(rendering.largest())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_sets_of_components_that_go_together():
    choices = list(rendering.everything())
    assert len(choices) > 800
    for start in range(0, len(choices), 64):
        assert_sound(choices[start : start + 64])
        render.cache_clear()


def test_the_order_of_components_does_not_matter():
    forwards = render(("gpu", ("elastic", "kai", "s3", "token-auth")))
    backwards = render(("gpu", ("token-auth", "s3", "kai", "elastic")))
    assert json.dumps(forwards, sort_keys=True) == json.dumps(backwards, sort_keys=True)


@pytest.mark.parametrize("folder", ["toolbox", "cluster", "cluster/kueue"])
def test_what_is_applied_by_itself(folder):
    documents = kustomize(K8S / folder)
    assert documents
    for document in documents:
        assert schemas.problems(document) == []
    shared = ("PersistentVolumeClaim", "ServiceAccount")
    launched = [one for one in render(("gpu", ())) if one["kind"] in shared]
    assert lint([*documents, *launched]) == []


def test_the_namespace_lets_only_restricted_pods_in():
    (namespace,) = kustomize(K8S / "cluster")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_queue_of_the_sample_is_the_components():
    (queue,) = [one for one in kustomize(K8S / "cluster/kueue") if one["kind"] == "LocalQueue"]
    labels = job(("gpu", ("kueue",)))["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    (covering,) = [one for one in kustomize(K8S / "cluster/kueue") if one["kind"] == "ClusterQueue"]
    (group,) = covering["spec"]["resourceGroups"]
    asked = {
        name
        for containers in schemas.container_lists(job(("gpu", ("kueue", "rdma"))))
        for container in containers
        for name in container["resources"]["requests"]
    }
    assert asked <= set(group["coveredResources"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_one_job_of_each_kind(overlay):
    for component in ("training", "evaluation"):
        document = job((overlay, ()), component)
        words = document["spec"]["entrypoint"].split()
        assert words[:2] == ["babelray", {"training": "train", "evaluation": "evaluate"}[component]]
        options = {option for param in cli.commands[words[1]].params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= options
        assert document["spec"]["backoffLimit"] > 0
        for group in document["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
            gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get(
                "nvidia.com/gpu"
            )
            assert (gpus is None) == (overlay == "cpu-smoke")


def test_the_head_asks_for_no_gpu_and_sees_none():
    for overlay in OVERLAYS:
        head = job((overlay, ()))["spec"]["rayClusterSpec"]["headGroupSpec"]
        (container,) = head["template"]["spec"]["containers"]
        assert not [name for name in container["resources"]["limits"] if "/" in name]
        assert {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container["env"]


def pods_of(choice: Choice, component: str = "training"):
    """Templates of head, worker and submitter."""
    spec = job(choice, component)["spec"]
    cluster = spec["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"][0]["template"]
    return cluster["headGroupSpec"]["template"], workers, spec["submitterPodTemplate"]


def test_pods_go_where_the_image_runs():
    for overlay in OVERLAYS:
        for pod in (*pods_of((overlay, ())), *pods_of((overlay, ()), "evaluation")):
            # A laptop's only machine has whatever architecture the laptop has.
            arch = None if overlay == "cpu-smoke" else "amd64"
            assert pod["spec"]["nodeSelector"].get("kubernetes.io/arch") == arch


def test_autoscalers_leave_pods_alone_but_on_machines_that_may_be_taken():
    stay = {
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }
    for overlay in OVERLAYS:
        head, workers, submitter = pods_of((overlay, ()))
        assert head["metadata"]["annotations"] == submitter["metadata"]["annotations"] == stay
        assert workers["metadata"]["annotations"] == ({} if overlay == "spot" else stay)


def test_a_job_of_another_overlay_is_tried_again_as_often():
    for component, attempts in (("training", 3), ("evaluation", 2)):
        found = {job((overlay, ()), component)["spec"]["backoffLimit"] for overlay in OVERLAYS}
        assert found == {attempts}


def test_policies_hold_for_jobs_that_were_launched_with_them_only():
    documents = render(("gpu", ("network-policy",)))
    policies = [one["spec"] for one in documents if one["kind"] == "NetworkPolicy"]
    assert len(policies) == 6
    for component in ("training", "evaluation"):
        restricted = pods_of(("gpu", ("network-policy",)), component)
        for policy in policies:
            assert any(
                matches(policy["podSelector"], {"ray.io/node-type": "head", **labels_of(pod)})
                for pod in restricted
            )
        for pod in pods_of(("gpu", ()), component):
            labels = {"ray.io/node-type": "head", **labels_of(pod)}
            assert not any(matches(policy["podSelector"], labels) for policy in policies)


def labels_of(pod):
    return pod["metadata"]["labels"]


def test_elastic_workers_are_those_that_the_entrypoint_asks_for():
    words = job(("gpu-multi-node", ("elastic",)))["spec"]["entrypoint"].split()
    assert words[words.index("--workers") + 1] == "8:32"
    evaluation = job(("gpu-multi-node", ("elastic",)), "evaluation")
    assert evaluation == job(("gpu-multi-node", ()), "evaluation")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_configuration_is_valid(overlay, tmp_path):
    (config,) = [one for one in render((overlay, ())) if one["kind"] == "ConfigMap"]
    assert config["metadata"]["labels"]["app.kubernetes.io/component"] == "configuration"
    text = config["data"]["run.yaml"]
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    parse_config(read_values(tmp_path / "run.yaml", ()), where="run.yaml")
    same = {"cpu-smoke": "tiny", "gpu": "base", "spot": "base"}
    if overlay in same:
        file = K8S.parent / "configs" / f"{same[overlay]}.yaml"
        assert text == file.read_text(encoding="utf-8")


def test_an_image_and_a_configuration_of_ones_own(tmp_path):
    """What ``babelray launch`` does: its kustomization reaches all containers and the mounts."""
    (tmp_path / "run.yaml").write_text("trainer:\n  max_steps: 7\n", encoding="utf-8")
    digest = "sha256:" + "a" * 64
    more = {
        "images": [{"name": "babelray", "newName": "registry.example/babelray", "digest": digest}],
        "configMapGenerator": [
            {"name": "babelray-config", "behavior": "replace", "files": ["run.yaml"]}
        ],
    }
    folder = rendering.kustomization(tmp_path.resolve(), ("gpu", ("elastic",)), more)
    documents = kustomize(folder)
    assert lint(documents) == []
    images = [
        container["image"]
        for document in documents
        for containers in schemas.container_lists(document)
        for container in containers
    ]
    assert len(images) == 6
    assert set(images) == {f"registry.example/babelray@{digest}"}
    (config,) = [one for one in documents if one["kind"] == "ConfigMap"]
    assert config["data"] == {"run.yaml": "trainer:\n  max_steps: 7\n"}
    before = {one["metadata"]["name"] for one in render(("gpu", ())) if one["kind"] == "ConfigMap"}
    assert config["metadata"]["name"] not in before  # and lint has found that jobs mount this one


def test_dashboards_and_rules_reach_the_cluster():
    documents = render(("gpu", ("monitoring",)))
    names = {path.name for path in (K8S / "monitoring" / "dashboards").iterdir()}
    found = {
        name
        for one in documents
        if one["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name in one["data"]
    }
    assert found == names
    (rules,) = [one for one in documents if one["kind"] == "PrometheusRule"]
    alerts = {rule.get("alert") for group in rules["spec"]["groups"] for rule in group["rules"]}
    assert {"BabelrayNoStep", "BabelrayJobFailed"} <= alerts


MISSPELT = {
    "in a RayJob": ("RayJob", ("spec",), {"ttlSecondAfterFinished": 60}),
    "in a pod inside it": (
        "RayJob",
        ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"),
        {"terminationGracePeriodSecond": 60},
    ),
    "a wrong type": ("RayJob", ("spec",), {"backoffLimit": "3"}),
    "a wrong value": ("RayJob", ("spec", "rayClusterSpec", "authOptions"), {"mode": "tokens"}),
    "in a claim": ("PersistentVolumeClaim", ("spec",), {"storageClass": "nfs"}),
    "in a budget": ("PodDisruptionBudget", ("spec",), {"minimumAvailable": 1}),
    "in a policy": ("NetworkPolicy", ("spec",), {"policyType": ["Ingress"]}),
    "in a monitor": ("PodMonitor", ("spec",), {"podMetricEndpoints": []}),
    "in a rule": ("PrometheusRule", ("spec", "groups", 0, "rules", 0), {"fore": "5m"}),
    "in metadata": ("RayJob", ("metadata",), {"label": {}}),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_the_schemas_refuse_what_is_misspelt(name):
    kind, path, change = MISSPELT[name]
    documents = render(("gpu", ("monitoring", "network-policy")))
    document = copy.deepcopy(next(one for one in documents if one["kind"] == kind))
    assert schemas.problems(document) == []
    place = document
    for key in path:
        place = place[key]
    place.update(change)
    (problem,) = schemas.problems(document)
    assert next(iter(change)) in problem


def test_every_folder_says_what_it_is_for():
    for file in [*K8S.glob("overlays/*/kustomization.yaml"), *K8S.glob("components/*/*.yaml")]:
        text = file.read_text(encoding="utf-8")
        if file.name == "kustomization.yaml":
            assert text.startswith("# "), file
    page = (K8S.parent / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    for name in (*OVERLAYS, *rendering.COMPONENTS):
        assert f"`{name}`" in page, name
