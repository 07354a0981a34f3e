"""The checks of a cluster, against a fake kubectl: what is missing is said with its mend."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import Check, failures
from cluster.launch.capacity import demand, quota_checks, storage_checks
from cluster.launch.kubectl import Kubectl
from cluster.launch.preflight import (
    _image,
    _kuberay,
    _namespace,
    _operator,
    _queue,
    _rights,
    check_place,
    cluster_checks,
    resource_of,
)
from cluster.launch.room import POD_LINES, node_checks, refusal
from cluster.launch.secret_checks import secret_checks
from cluster.launch.target import Place
from tests.kubernetes import FakeCluster

GIB = 2**30
RAY = {"resources": [{"kind": "RayJob"}, {"kind": "RayCluster"}]}
KINDS = "KubeRay's kinds"
OPERATOR = "KubeRay's operator"
TEAM = Kubectl(namespace="team")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(tmp_path, monkeypatch)


def template(cpu: str, memory: str, gpus: int = 0, **spec: Any) -> dict[str, Any]:
    amounts: dict[str, str] = {"cpu": cpu, "memory": memory}
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    container = {"image": "reg.test/babelray:1", "resources": {"limits": amounts}}
    return {"spec": {"containers": [container], **spec}}


def job(*, workers: int = 2, gpus: int = 4, **spec: Any) -> dict[str, Any]:
    volume = {"name": "storage", "persistentVolumeClaim": {"claimName": "babelray"}}
    group = {
        "groupName": "workers",
        "replicas": workers,
        "template": template("8", "64Gi", gpus, **spec),
    }
    cluster = {
        "headGroupSpec": {"template": template("2", "8Gi", volumes=[volume])},
        "workerGroupSpecs": [group],
    }
    labels = {"app.kubernetes.io/component": "training"}
    metadata = {"name": "train-demo", "labels": labels}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {"backoffLimit": 1, "rayClusterSpec": cluster},
    }


def node(name: str, gpus: int, *, taint: str | None = None, **spec: Any) -> dict[str, Any]:
    if taint:
        spec["taints"] = [{"key": taint, "value": "present", "effect": "NoSchedule"}]
    allocatable = {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": str(gpus), "pods": "100"}
    return {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": spec,
        "status": {"allocatable": allocatable},
    }


def claim(*modes: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "babelray"},
        "spec": {"accessModes": list(modes), **spec},
    }


def good(fake: FakeCluster) -> None:
    """A cluster with all that a launch needs."""
    fake.rule("get --raw /version", out='{"gitVersion": "v1.34.1"}')
    fake.rule("get --raw /apis/ray.io/v1", out=json.dumps(RAY))
    fake.put("namespace", {"metadata": {"name": "team"}})
    container = {"image": "quay.io/kuberay/operator:v1.7.0"}
    operator = {
        "metadata": {
            "name": "kuberay-operator",
            "namespace": "ray-system",
            "labels": {"app.kubernetes.io/name": "kuberay-operator"},
        },
        "spec": {"template": {"spec": {"containers": [container]}}},
        "status": {"availableReplicas": 1},
    }
    fake.put("deployments.apps", operator)
    fake.put("nodes", node("a", 8), node("b", 8))
    bound = {"phase": "Bound", "capacity": {"storage": "100Gi"}, "accessModes": ["ReadWriteMany"]}
    fake.put("persistentvolumeclaims", {**claim("ReadWriteMany"), "status": bound})


def checks(*documents: dict[str, Any]) -> dict[str, Check]:
    """The checks by name; the worst of several with one name."""
    order = {"ok": 0, "warning": 1, "failure": 2}
    found: dict[str, Check] = {}
    for check in cluster_checks(TEAM, documents or (job(),)):
        if check.name not in found or order[check.outcome] > order[found[check.name].outcome]:
            found[check.name] = check
        assert (check.mend is None) == (check.outcome == "ok"), check
    return found


def test_a_cluster_that_has_all(fake: FakeCluster) -> None:
    good(fake)
    found = checks()
    assert {name: check.outcome for name, check in found.items()} == dict.fromkeys(found, "ok")
    assert set(found) == {
        "kubectl", "cluster", "namespace", "rights", KINDS, OPERATOR, "room on the nodes", "quota",
        "storage", "image",
    }  # fmt: skip
    assert "4 would" in found["room on the nodes"].found
    writing = [
        call for call in fake.calls if any(f" {verb} " in call for verb in ("apply", "delete"))
    ]
    assert not writing or all("can-i" in call for call in writing)


def test_nothing_more_is_asked_without_kubectl_or_a_cluster(
    fake: FakeCluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused = "The connection to the server k8s.test was refused"
    fake.rule("get --raw /version", err=refused, rc=1)
    found = checks()
    assert list(found) == ["kubectl", "cluster"]
    assert found["cluster"].outcome == "failure"
    assert "does not answer" in (found["cluster"].mend or "")
    monkeypatch.setenv("PATH", str(tmp_path))
    [only] = cluster_checks(Kubectl(), [job()])
    assert (only.outcome, only.found) == ("failure", "not installed")
    [only] = check_place(Place("kubernetes", "/mnt/babelray", overlay="cpu-smoke"))
    assert (only.outcome, only.found) == ("failure", "not installed")


def test_everything_that_can_be_missing_is_named(fake: FakeCluster) -> None:
    fake.rule("get --raw /apis/ray.io/v1", err="Error from server (NotFound): x", rc=1)
    fake.rule("get --raw /apis/monitoring", err="Error from server (NotFound): x", rc=1)
    fake.rule("can-i create rayjobs.ray.io", out="no\n", rc=1)
    fake.rule("can-i create pods --subresource=exec", out="no\n", rc=1)
    fake.rule("get localqueues", err='error: the server doesn\'t have a resource type "l"', rc=1)
    fake.rule("get --raw /version", out='{"gitVersion": "v1.34.1"}')
    value = job()
    value["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    value["spec"]["rayClusterSpec"]["authOptions"] = {"mode": "token", "secretName": "tokens"}
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor", "metadata": {}}
    found = checks(value, monitor)
    assert {check.name for check in failures(found.values())} == {
        "namespace", "rights", KINDS, "PodMonitor", "Kueue", "storage", "token authentication",
    }  # fmt: skip
    assert found["namespace"].mend == "kubectl create namespace team"
    assert "may not create rayjobs.ray.io" in found["rights"].found
    assert "helm" in (found[KINDS].mend or "")
    assert found[OPERATOR].outcome == "warning"


def test_a_missing_right_that_only_some_command_needs_is_a_warning(fake: FakeCluster) -> None:
    fake.rule("can-i create pods --subresource=portforward", out="no\n", rc=1)
    all_needed, found = _rights(TEAM, "team", [job()])
    assert (all_needed.outcome, found.outcome) == ("ok", "warning")
    assert "babelray dashboard" in found.found


def test_what_may_not_be_looked_at_is_a_warning(
    fake: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kubectl, "may", lambda *question: True)
    said = 'User "eve" cannot list resource "nodes" in API group "" at the cluster scope'
    fake.rule("get nodes", err=f"Error from server (Forbidden): nodes is forbidden: {said}", rc=1)
    good(fake)
    found = checks()["room on the nodes"]
    assert found.outcome == "warning"
    assert "you may not list nodes" in (found.mend or "")


@pytest.mark.parametrize(
    ("level", "outcome"), [("restricted", "failure"), ("privileged", "ok"), (None, "ok")]
)
def test_pod_security_against_added_capabilities(
    fake: FakeCluster, level: str | None, outcome: str
) -> None:
    good(fake)
    labels = {"pod-security.kubernetes.io/enforce": level} if level else {}
    fake.put("namespace", {"metadata": {"name": "team", "labels": labels}})
    value = job()
    [group] = value["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    [found] = _namespace(TEAM, "team", [value])
    assert found.outcome == outcome
    assert ("IPC_LOCK" in found.found) == (outcome == "failure")


def test_an_older_kuberay(fake: FakeCluster) -> None:
    good(fake)
    properties = {"rayClusterSpec": {"type": "object"}}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": properties}}}}
    crd = {"metadata": {"name": "rayjobs.ray.io"}}
    crd["spec"] = {"versions": [{"name": "v1", "schema": schema}]}  # type: ignore[dict-item]
    fake.put("customresourcedefinitions.apiextensions.k8s.io", crd)
    objects = json.loads((fake.folder / "objects.json").read_text())
    operator = objects["deployments.apps/kuberay-operator"]
    [container] = operator["spec"]["template"]["spec"]["containers"]
    container["image"] = "quay.io/kuberay/operator:v1.3.2"
    fake.put("deployments.apps", operator)
    [kinds], [found] = _kuberay(TEAM, job()), _operator(TEAM)
    assert kinds.outcome == "failure"
    assert "spec.backoffLimit" in kinds.found
    assert found.outcome == "warning"
    assert "v1.3.2" in found.found
    operator["status"] = {}
    fake.put("deployments.apps", operator)
    [found] = _operator(TEAM)
    assert found.outcome == "failure"


@pytest.mark.parametrize(
    ("queue", "outcome", "words"),
    [
        (None, "failure", "there is no LocalQueue research; there are: other"),
        ({"pendingWorkloads": 3}, "ok", "3 waiting"),
        (
            {"conditions": [{"type": "Active", "status": "False", "message": "no ClusterQueue"}]},
            "failure",
            "no ClusterQueue",
        ),
    ],
)
def test_the_queue_of_kueue(
    fake: FakeCluster, queue: dict[str, Any] | None, outcome: str, words: str
) -> None:
    good(fake)
    fake.put("localqueues.kueue.x-k8s.io", {"metadata": {"name": "other"}})
    if queue is not None:
        fake.put("localqueues.kueue.x-k8s.io", {"metadata": {"name": "research"}, "status": queue})
    value = job()
    value["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    [found] = _queue(TEAM, value)
    assert found.outcome == outcome
    assert words in found.found


def test_other_schedulers(fake: FakeCluster) -> None:
    good(fake)
    fake.rule("get --raw /apis/scheduling.volcano.sh", out='{"resources": [{"kind": "Queue"}]}')
    fake.rule("get --raw /apis/scheduling.run.ai", err="Error from server (NotFound): x", rc=1)
    value = job()
    value["metadata"]["labels"] |= {"volcano.sh/queue-name": "q", "kai.scheduler/queue": "q"}
    volcano, kai = _queue(TEAM, value)
    assert "there is no queue q" in volcano.found
    assert "install KAI" in (kai.mend or "")
    fake.put("queues.scheduling.volcano.sh", {"metadata": {"name": "q"}})
    volcano, _ = _queue(TEAM, value)
    assert volcano.outcome == "ok"


@pytest.mark.parametrize(
    ("image", "server", "outcome"),
    [
        ("babelray:gpu", "https://k8s.test", "warning"),
        ("library/babelray:gpu", "https://k8s.test", "warning"),
        ("reg.test/babelray", "https://k8s.test", "warning"),
        ("reg.test/babelray:latest", "https://k8s.test", "warning"),
        ("reg.test/babelray:latest@sha256:ab", "https://k8s.test", "ok"),
        ("reg.test:5000/babelray:1", "https://k8s.test", "ok"),
        ("babelray:cpu", "https://127.0.0.1:6443", "ok"),
    ],
)
def test_images(fake: FakeCluster, image: str, server: str, outcome: str) -> None:
    view = {"current-context": "x", "clusters": [{"cluster": {"server": server}}]}
    fake.rule("config view", out=json.dumps(view))
    good(fake)
    value = job()
    head = value["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["image"] = image
    [found] = _image(TEAM, value)
    assert found.outcome == outcome


def used(name: str, where: str, gpus: int, phase: str = "Running") -> dict[str, Any]:
    spec = template("1", "1Gi", gpus, nodeName=where)["spec"]
    return {"metadata": {"name": name}, "spec": spec, "status": {"phase": phase}}


def test_room_is_what_others_left(fake: FakeCluster) -> None:
    fake.put("nodes", node("a", 8), node("b", 8), node("c", 8, unschedulable=True))
    fake.put("pods", used("x", "a", 6), used("y", "b", 5), used("z", "a", 8, "Succeeded"))
    [found] = node_checks(Kubectl(), job(workers=2, gpus=4))
    assert found.outcome == "warning"
    assert found.found == (
        "0 of 2 workers of 4 GPU, 8 CPU and 64 GiB fit now, 4 if all were free; "
        "1 of 3 nodes are excluded: cordoned (1); short now: nvidia.com/gpu"
    )
    assert "waits until there is room" in (found.mend or "")
    [found] = node_checks(Kubectl(), job(workers=5, gpus=4))
    assert "waits for ever" in (found.mend or "")
    [found] = node_checks(Kubectl(), job(workers=2, gpus=2))
    assert found.outcome == "ok"


def small(name: str, cpu: str, memory: str, gpus: int = 0) -> dict[str, Any]:
    value = node(name, gpus)
    value["status"]["allocatable"] |= {"cpu": cpu, "memory": memory}
    return value


def test_machines_that_are_too_small_and_what_of(fake: FakeCluster) -> None:
    fake.put("nodes", small("head", "4", "16Gi"), small("a", "7910m", "96Gi", 1))
    [found] = node_checks(Kubectl(), job(workers=1, gpus=1))
    assert found.found.endswith("CPU: 8 asked for, a node has 7.91 at most")
    assert "ask for less in an overlay of your own" in (found.mend or "")
    assert "--gpus" not in (found.mend or "")
    [found] = node_checks(Kubectl(), job(workers=1, gpus=4))
    assert "nvidia.com/gpu: 4 asked for, a node has 1 at most" in found.found
    assert "fewer --gpus" in (found.mend or "")


def test_the_head_needs_a_place_too(fake: FakeCluster) -> None:
    value = job(tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}])
    value["spec"]["submitterPodTemplate"] = template("1", "1Gi")
    fake.put("nodes", node("a", 8, taint="nvidia.com/gpu"))
    head, submitter, workers = node_checks(Kubectl(), value)
    assert (head.outcome, submitter.outcome, workers.outcome) == ("warning", "warning", "ok")
    assert head.found == (
        "the head (2 CPU and 8 GiB) fits on no node now; 1 of 1 nodes are excluded: "
        "taint nvidia.com/gpu (1)"
    )
    assert "tolerations" in (head.mend or "")
    assert (head.name, submitter.name) == ("room for the head", "room for the submitter")
    # Beside the head on the only machine there is no room for the worker, ever.
    fake.put("nodes", small("a", "9", "96Gi", 8))
    [found] = node_checks(Kubectl(), job(workers=1))
    assert found.found.endswith("CPU: 8 asked for, a node has 7 at most")


def test_taints_tolerations_and_selectors() -> None:
    tainted = node("a", 8, taint="nvidia.com/gpu")
    assert refusal(tainted, {}) == "taint nvidia.com/gpu"
    for toleration in (
        {"key": "nvidia.com/gpu", "operator": "Exists"},
        {"operator": "Exists"},
        {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"},
    ):
        assert refusal(tainted, {"tolerations": [toleration]}) is None
    bad = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}
    tolerations = [bad, {"key": "x", "operator": "Exists"}]
    assert refusal(tainted, {"tolerations": tolerations}) == "taint nvidia.com/gpu"
    assert refusal(node("a", 8), {"nodeSelector": {"gpu": "h100"}}) == "gpu is not h100"


def needs(*terms: dict[str, Any]) -> dict[str, Any]:
    required = {"nodeSelectorTerms": list(terms)}
    return {
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
    }


def term(key: str, operator: str, *values: str, field: str = "Expressions") -> dict[str, Any]:
    return {f"match{field}": [{"key": key, "operator": operator, "values": list(values)}]}


@pytest.mark.parametrize(
    ("terms", "is_taken"),
    [
        ([term("gke-spot", "In", "true"), term("capacity", "In", "spot")], True),
        ([term("gke-spot", "In", "true")], False),
        ([{}], False),
        ([term("capacity", "NotIn", "spot")], False),  # codespell:ignore
        ([term("gke-spot", "NotIn", "true")], True),  # codespell:ignore
        ([term("gpus", "Gt", "4")], True),
        ([term("gpus", "Lt", "4")], False),
        ([term("capacity", "Gt", "4")], False),
        ([term("gpus", "Exists"), term("gpus", "DoesNotExist")], True),
        ([{**term("gpus", "Exists"), **term("metadata.name", "In", "b", field="Fields")}], False),
    ],
)
def test_node_affinity(terms: list[dict[str, Any]], is_taken: bool) -> None:
    value = node("a", 8)
    value["metadata"]["labels"] |= {"capacity": "spot", "gpus": "8"}
    assert refusal(value, needs(*terms)) == (None if is_taken else "node affinity")


def test_a_cluster_too_large_to_be_counted_is_launched_on(
    fake: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kubectl, "may", lambda *question: True)
    said = "Unable to connect to the server: context deadline exceeded (Client.Timeout exceeded)"
    fake.rule("get pods --all-namespaces", err=said, rc=1)
    good(fake)
    hard = {"requests.memory": "1Ei", "requests.cpu": "1 or 2"}
    fake.put("resourcequotas", {"metadata": {"name": "q"}, "status": {"hard": hard}})
    found = checks()
    assert (found["room on the nodes"].outcome, found["quota"].outcome) == ("warning", "warning")
    assert "'1 or 2' is no quantity" in (found["quota"].mend or "")
    assert not failures(found.values())


@pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on PATH")
def test_pods_as_the_real_kubectl_tells_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resources = {"requests": {"cpu": "500m", "nvidia.com/gpu": "2"}, "limits": {"cpu": "9"}}
    spec = {"nodeName": "a", "containers": [{"resources": resources}, {"name": "bare"}]}
    spec["initContainers"] = [{"resources": {"requests": {"memory": "1Gi"}}}]
    pods = [{"metadata": {"name": "x"}, "spec": spec}, {"metadata": {"name": "y"}, "spec": {}}]
    kind = {"name": "pods", "kind": "Pod", "namespaced": True, "verbs": ["get", "list"]}
    answers = {
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "groups": []},
        "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [kind]},
        "/api/v1/pods": {"kind": "PodList", "apiVersion": "v1", "items": pods},
    }

    class Api(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path.partition("?")[0], {})).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None: ...

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    with HTTPServer(("127.0.0.1", 0), Api) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = f"--server=http://127.0.0.1:{server.server_port}"
        text = Kubectl().text(
            "get", "pods", address, "--all-namespaces", f"--output=go-template={POD_LINES}"
        )
        server.shutdown()
    assert text == "a|cpu=500m,nvidia.com/gpu=2,;;|memory=1Gi,;\n||\n"


def test_secrets_that_pods_read(fake: FakeCluster) -> None:
    value = job()
    cluster = value["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    for part in (cluster["headGroupSpec"], group):
        [container] = part["template"]["spec"]["containers"]
        container["envFrom"] = [{"secretRef": {"name": "babelray-s3"}}]
    reference = {"name": "hub", "key": "token"}
    container["env"] = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": reference}}]
    some = {"name": "extra", "secret": {"secretName": "extra", "optional": True}}
    own = {"name": "own", "secret": {"secretName": "own"}}
    group["template"]["spec"]["volumes"] = [some, own]
    brought = {"kind": "Secret", "metadata": {"name": "own"}}
    s3, hub = secret_checks(TEAM, [brought], value)
    assert (s3.outcome, hub.outcome) == ("failure", "failure")
    assert "there is no secret babelray-s3" in s3.found
    assert "kubectl -n team create secret generic babelray-s3" in (s3.mend or "")
    assert "--from-literal=token=..." in (hub.mend or "")
    fake.put("secrets", {"metadata": {"name": "babelray-s3"}}, {"metadata": {"name": "hub"}})
    s3, hub = secret_checks(TEAM, [brought], value)
    assert (s3.outcome, hub.found.partition(":")[0]) == ("ok", "the secret hub lacks token")


def test_what_a_job_asks_for_and_a_quota_leaves(fake: FakeCluster) -> None:
    need = demand(job(workers=2, gpus=4))
    assert need["pods"] == 3
    assert need["requests.nvidia.com/gpu"] == 8
    assert need["limits.cpu"] == need["requests.cpu"] == need["cpu"] == 18
    assert need["requests.memory"] == 136 * GIB
    hard = {"requests.nvidia.com/gpu": "10", "requests.memory": "200Gi", "services": "5"}
    taken = {"requests.nvidia.com/gpu": "4", "requests.memory": "20Gi", "services": "5"}
    fake.put("resourcequotas", {"metadata": {"name": "q"}, "status": {"hard": hard, "used": taken}})
    [found] = quota_checks(Kubectl(), job(workers=2, gpus=4))
    assert found.outcome == "failure"
    assert found.found == "requests.nvidia.com/gpu: 8 asked for, 6 of 10 left in q"
    [found] = quota_checks(Kubectl(), job(workers=1, gpus=4))
    assert found.outcome == "ok"


def storage_class(name: str, provisioner: str, *, default: bool = True) -> dict[str, Any]:
    annotations = {"storageclass.kubernetes.io/is-default-class": str(default).lower()}
    return {"metadata": {"name": name, "annotations": annotations}, "provisioner": provisioner}


@pytest.mark.parametrize(
    ("asked", "classes", "outcome", "words"),
    [
        (claim("ReadWriteMany"), [], "failure", "no default storage class; there are: none"),
        (
            claim("ReadWriteMany", storageClassName="nfs"),
            [storage_class("gp3", "ebs.csi.aws.com")],
            "failure",
            "no storage class nfs; there are: gp3",
        ),
        (
            claim("ReadWriteMany"),
            [storage_class("gp3", "ebs.csi.aws.com")],
            "failure",
            "one node at a time",
        ),
        (
            claim("ReadWriteMany"),
            [storage_class("efs", "efs.csi.aws.com")],
            "ok",
            "will be made by efs",
        ),
        (
            claim("ReadWriteOnce"),
            [storage_class("gp3", "ebs.csi.aws.com")],
            "warning",
            "the cluster has 2 nodes",
        ),
        (claim("ReadWriteMany", storageClassName=""), [], "ok", "was made for it"),
    ],
)
def test_storage_that_is_yet_to_be_made(
    fake: FakeCluster,
    asked: dict[str, Any],
    classes: list[dict[str, Any]],
    outcome: str,
    words: str,
) -> None:
    fake.put("nodes", node("a", 8), node("b", 8))
    fake.put("storageclasses.storage.k8s.io", *classes)
    [found] = storage_checks(Kubectl(), [asked], job())
    assert (found.outcome, words in found.found) == (outcome, True), found


@pytest.mark.parametrize(
    ("phase", "mode", "outcome"),
    [
        ("Bound", "ReadWriteMany", "ok"),
        ("Bound", "ReadWriteOnce", "warning"),
        ("Pending", "ReadWriteMany", "warning"),
        ("Lost", "ReadWriteMany", "failure"),
    ],
)
def test_storage_that_is_there(fake: FakeCluster, phase: str, mode: str, outcome: str) -> None:
    fake.put("nodes", node("a", 8), node("b", 8))
    status = {"phase": phase, "capacity": {"storage": "1Ti"}}
    fake.put("persistentvolumeclaims", {**claim(mode), "status": status})
    [found] = storage_checks(Kubectl(), [], job())
    assert found.outcome == outcome


def test_names_of_resources() -> None:
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    assert resource_of(policy) == "networkpolicies.networking.k8s.io"
    assert resource_of({"apiVersion": "v1", "kind": "ConfigMap"}) == "configmaps"
