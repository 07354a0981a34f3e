"""What a cluster must have before a job is handed to it: asked for one by one, changing nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from cluster.checks import Check, Outcome
from cluster.launch.capacity import quota_checks, storage_checks
from cluster.launch.kubectl import Kubectl, KubectlError
from cluster.launch.overlays import head_image, split_image
from cluster.launch.render import COMPONENT_LABEL, render_overlay
from cluster.launch.room import node_checks
from cluster.launch.secret_checks import secret_checks, token_checks
from cluster.launch.sizes import QuantityError
from cluster.launch.target import Place

Document = Mapping[str, Any]

KUBERAY = (1, 7)
_ROOM = "room on the nodes"
_INSTALL = (
    "install it: helm repo add kuberay https://ray-project.github.io/kuberay-helm && "
    "helm upgrade --install kuberay-operator kuberay/kuberay-operator --version 1.7.0"
)
# Without these nothing starts, or nobody sees what it does.
_NEEDED = (
    ("get", "rayjobs.ray.io"), ("delete", "rayjobs.ray.io"), ("list", "rayclusters.ray.io"),
    ("list", "pods"), ("get", "pods/log"),
)  # fmt: skip
# Without these some command does not work: (verb, resource, which).
_WANTED = (
    ("create", "pods/exec", "babelray status and stop of a run on the cluster"),
    ("create", "pods/portforward", "babelray dashboard"),
    ("list", "events", "why a pod does not start"),
)
_LOCAL_CONTEXT = re.compile(r"kind-|k3d-|minikube|docker-desktop|rancher-desktop|colima|orbstack")
_BUILT_IN = re.compile(r"(v1|apps/v1|batch/v1|policy/v1|networking\.k8s\.io/v1|"
                       r"rbac\.authorization\.k8s\.io/v1)")  # fmt: skip
_SCHEDULERS = {
    "volcano.sh/queue-name": ("Volcano", "scheduling.volcano.sh", "v1beta1"),
    "kai.scheduler/queue": ("KAI", "scheduling.run.ai", "v2"),
}


def check_place(place: Place, kubectl: Kubectl | None = None) -> Iterator[Check]:
    """The checks of ``cluster_checks`` for what an overlay would ask for.

    Raises:
        UserError: the overlay does not render.
    """
    kubectl = kubectl or Kubectl(place.context, place.namespace)
    try:
        documents = render_overlay(place, "train", kubectl).documents
    except KubectlError as error:
        if error.trouble != "not installed":
            raise
        yield Check("kubectl", "failure", "not installed", str(error))
        return
    yield from cluster_checks(kubectl, documents)


def cluster_checks(kubectl: Kubectl, documents: Sequence[Document]) -> Iterator[Check]:
    """Whether a cluster can take the rendered manifests; ends early where nothing answers."""
    job = _job(documents)
    for check in _access(kubectl):
        yield check
        if check.outcome == "failure":
            return
    namespace = kubectl.settled().namespace or "default"
    looks: tuple[tuple[str, Callable[[], Iterator[Check]]], ...] = (
        ("namespace", lambda: _namespace(kubectl, namespace, documents)),
        ("rights", lambda: _rights(kubectl, namespace, documents)),
        ("KubeRay's kinds", lambda: _kuberay(kubectl, job)),
        ("KubeRay's operator", lambda: _operator(kubectl)),
        ("further kinds", lambda: _kinds(kubectl, documents)),
        ("queue", lambda: _queue(kubectl, job)),
        (_ROOM, lambda: node_checks(kubectl, job)),
        ("quota", lambda: quota_checks(kubectl, job)),
        ("storage", lambda: storage_checks(kubectl, documents, job)),
        ("image", lambda: _image(kubectl, job)),
        ("secrets", lambda: secret_checks(kubectl, documents, job)),
        ("token authentication", lambda: token_checks(kubectl, job)),
    )
    for name, look in looks:
        try:
            yield from look()
        except KubectlError as error:
            blind = error.trouble in ("forbidden", "no such kind")
            found = "could not be looked at" if blind else "the cluster did not answer"
            # Of thousands of pods the answer takes long, and is an estimate anyway.
            outcome: Outcome = "warning" if blind or name == _ROOM else "failure"
            yield Check(name, outcome, found, str(error))
        except QuantityError as error:
            yield Check(name, "warning", "could not be reckoned", str(error))


def _job(documents: Sequence[Document]) -> Document:
    jobs = [document for document in documents if document.get("kind") == "RayJob"]
    training = [
        job
        for job in jobs
        if (job["metadata"].get("labels") or {}).get(COMPONENT_LABEL) == "training"
    ]
    return (training or jobs)[0]


def _access(kubectl: Kubectl) -> Iterator[Check]:
    try:
        client = kubectl.json("version", "--client", "--output=json")
    except KubectlError as error:
        found = "not installed" if error.trouble == "not installed" else "does not work"
        yield Check("kubectl", "failure", found, str(error))
        return
    yield Check("kubectl", "ok", str((client.get("clientVersion") or {}).get("gitVersion")))
    try:
        server = kubectl.json("get", "--raw", "/version")
    except KubectlError as error:
        yield Check("cluster", "failure", error.trouble, str(error))
        return
    where = kubectl.context or "the current context"
    yield Check("cluster", "ok", f"{where} answers, Kubernetes {server.get('gitVersion')}")


def _namespace(kubectl: Kubectl, name: str, documents: Sequence[Document]) -> Iterator[Check]:
    found = kubectl.get("namespace", name)
    if found is None:
        mend = f"kubectl create namespace {name}"
        yield Check("namespace", "failure", f"there is no {name}", mend)
        return
    labels = found["metadata"].get("labels") or {}
    level = labels.get("pod-security.kubernetes.io/enforce")
    added = sorted({word for d in documents for word in _added_capabilities(d)})
    if level in ("restricted", "baseline") and added:
        yield Check(
            "namespace", "failure",
            f"{name} enforces the pod security level {level}, which refuses {', '.join(added)}",
            "leave out the component that asks for it, or use a namespace that allows it",
        )  # fmt: skip
        return
    yield Check("namespace", "ok", f"{name}, pod security: {level or 'no level enforced'}")


def _added_capabilities(value: object) -> Iterator[str]:
    if isinstance(value, Mapping):
        capabilities = value.get("capabilities")
        if isinstance(capabilities, Mapping):
            yield from capabilities.get("add") or []
        for inner in value.values():
            yield from _added_capabilities(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _added_capabilities(inner)


def resource_of(document: Document) -> str:
    """The plural with its group, as in "networkpolicies.networking.k8s.io"."""
    group, slash, _ = str(document["apiVersion"]).rpartition("/")
    kind = str(document["kind"]).lower()
    plural = kind[:-1] + "ies" if kind.endswith("y") else f"{kind}s"
    return plural + (f".{group}" if slash else "")


def _rights(kubectl: Kubectl, namespace: str, documents: Sequence[Document]) -> Iterator[Check]:
    applied = dict.fromkeys(resource_of(document) for document in documents)
    needed = [(verb, resource) for resource in applied for verb in ("get", "create", "patch")]
    needed = list(dict.fromkeys([*needed, *_NEEDED]))
    asked = [*needed, *((verb, resource) for verb, resource, _ in _WANTED)]
    with ThreadPoolExecutor(8) as pool:
        allowed = dict(zip(asked, pool.map(lambda ask: kubectl.may(*ask), asked), strict=True))
    missing = [f"{verb} {resource}" for verb, resource in needed if not allowed[verb, resource]]
    if missing:
        yield Check(
            "rights", "failure", f"in {namespace} you may not {', '.join(missing)}",
            "ask whoever runs the cluster for a role with these rights",
        )  # fmt: skip
    else:
        yield Check("rights", "ok", f"all {len(needed)} that a launch needs, in {namespace}")
    for verb, resource, use in _WANTED:
        if not allowed[verb, resource]:
            found = f"you may not {verb} {resource}: not to be had is {use}"
            yield Check("rights", "warning", found, "ask for that right if you want it")


def _kuberay(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    served = _served(kubectl, "ray.io/v1")
    missing = [kind for kind in ("RayJob", "RayCluster") if kind not in served]
    if missing:
        found = f"the cluster knows no {' and no '.join(missing)} of ray.io/v1"
        yield Check("KubeRay's kinds", "failure", found, _INSTALL)
        return
    try:
        crd = kubectl.get("customresourcedefinitions.apiextensions.k8s.io", "rayjobs.ray.io")
    except KubectlError as error:
        if error.trouble != "forbidden":
            raise
        crd = None
    if crd is None:
        found = "ray.io/v1 is served; its fields may not be read"
        yield Check("KubeRay's kinds", "ok", found)
        return
    unknown = list(_unknown_fields(crd, job))
    if unknown:
        yield Check(
            "KubeRay's kinds", "failure",
            f"the RayJob of this cluster has no {', '.join(unknown)}: it is of an older KubeRay",
            "bring KubeRay and its CRDs to 1.7 (helm upgrade does not touch CRDs): kubectl replace "
            "-k 'github.com/ray-project/kuberay/ray-operator/config/crd?ref=v1.7.0'",
        )  # fmt: skip
    else:
        yield Check("KubeRay's kinds", "ok", "ray.io/v1 with all fields that are used")


def _served(kubectl: Kubectl, version: str) -> set[str]:
    """The kinds of a group's version; empty if it is not served."""
    try:
        found = kubectl.json("get", "--raw", f"/apis/{version}")
    except KubectlError as error:
        if error.trouble in ("not found", "no such kind"):
            return set()
        raise
    return {str(resource.get("kind")) for resource in found.get("resources") or []}


def _unknown_fields(crd: Mapping[str, Any], job: Document) -> Iterator[str]:
    """Fields of the RayJob that the installed CRD lacks; pod templates are not looked into."""
    for version in crd["spec"]["versions"]:
        if version.get("name") == "v1":
            properties = version["schema"]["openAPIV3Schema"].get("properties") or {}
            yield from _unknown(properties.get("spec") or {}, job["spec"], "spec")


def _unknown(schema: Mapping[str, Any], value: object, path: str) -> Iterator[str]:
    properties = schema.get("properties")
    if isinstance(value, Mapping) and isinstance(properties, Mapping):
        for key, inner in value.items():
            if key not in properties:
                yield f"{path}.{key}"
            elif key not in ("template", "submitterPodTemplate"):
                yield from _unknown(properties[key], inner, f"{path}.{key}")
    elif isinstance(value, list) and "items" in schema:
        for index, inner in enumerate(value):
            yield from _unknown(schema["items"], inner, f"{path}[{index}]")


def _operator(kubectl: Kubectl) -> Iterator[Check]:
    label = "app.kubernetes.io/name=kuberay-operator"
    found = kubectl.list("deployments.apps", labels=label, more=["--all-namespaces"])
    if not found:
        yield Check(
            "KubeRay's operator", "warning", "no deployment of it is to be seen",
            f"unless the provider of the cluster runs it out of sight, {_INSTALL}",
        )  # fmt: skip
        return
    operator = found[0]
    where = f"{operator['metadata'].get('namespace')}/{operator['metadata']['name']}"
    if not (operator.get("status") or {}).get("availableReplicas"):
        mend = (
            f"see why: kubectl -n {operator['metadata'].get('namespace')} describe pods -l {label}"
        )
        yield Check("KubeRay's operator", "failure", f"{where} does not run", mend)
        return
    image = str(operator["spec"]["template"]["spec"]["containers"][0]["image"])
    version = split_image(image)[1]
    number = re.match(r"v?(\d+)\.(\d+)", version or "")
    if number is None:
        yield Check("KubeRay's operator", "ok", f"{where} runs, version not told by {image}")
    elif (int(number[1]), int(number[2])) < KUBERAY:
        found_text = f"{where} runs {version}; these manifests are made for 1.7"
        yield Check("KubeRay's operator", "warning", found_text, f"upgrade it; {_INSTALL}")
    else:
        yield Check("KubeRay's operator", "ok", f"{where} runs {version}")


def _kinds(kubectl: Kubectl, documents: Sequence[Document]) -> Iterator[Check]:
    """Whether the cluster knows what components bring, such as PodMonitors."""
    wanted: dict[str, set[str]] = {}
    for document in documents:
        version = str(document["apiVersion"])
        if not _BUILT_IN.fullmatch(version) and not version.startswith("ray.io/"):
            wanted.setdefault(version, set()).add(str(document["kind"]))
    for version, kinds in wanted.items():
        missing = sorted(kinds - _served(kubectl, version))
        name = " and ".join(sorted(kinds))
        if missing:
            yield Check(
                name, "failure", f"the cluster knows no {' and no '.join(missing)} of {version}",
                "install the operator that brings them, or leave out the component",
            )  # fmt: skip
        else:
            yield Check(name, "ok", f"{version} is served")


def _queue(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    labels = job["metadata"].get("labels") or {}
    if name := labels.get("kueue.x-k8s.io/queue-name"):
        yield _local_queue(kubectl, str(name))
    for label, (product, group, version) in _SCHEDULERS.items():
        if label not in labels:
            continue
        kinds = _served(kubectl, f"{group}/{version}")
        if "Queue" not in kinds:
            found = f"the cluster knows no Queue of {group}/{version}"
            mend = f"install {product}, or leave out its component"
            yield Check(product, "failure", found, mend)
        elif kubectl.get(f"queues.{group}", str(labels[label])) is None:
            found = f"there is no queue {labels[label]}"
            mend = f"make it, or set the label {label} in an overlay of your own"
            yield Check(product, "failure", found, mend)
        else:
            yield Check(product, "ok", f"the queue {labels[label]} is there")


def _local_queue(kubectl: Kubectl, name: str) -> Check:
    try:
        queue = kubectl.get("localqueues.kueue.x-k8s.io", name)
    except KubectlError as error:
        if error.trouble != "no such kind":
            raise
        mend = "install Kueue, or leave out the component kueue"
        return Check("Kueue", "failure", "the cluster knows no LocalQueue", mend)
    if queue is None:
        present = [q["metadata"]["name"] for q in kubectl.list("localqueues.kueue.x-k8s.io")]
        found = f"there is no LocalQueue {name}; there are: {', '.join(present) or 'none'}"
        mend = "make it, or set the label kueue.x-k8s.io/queue-name in an overlay of your own"
        return Check("Kueue", "failure", found, mend)
    for condition in (queue.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "Active" and condition.get("status") == "False":
            found = f"the LocalQueue {name} takes nothing: {condition.get('message')}"
            return Check("Kueue", "failure", found, "ask whoever runs Kueue")
    waiting = (queue.get("status") or {}).get("pendingWorkloads") or 0
    return Check("Kueue", "ok", f"LocalQueue {name}, {waiting} waiting")


def _image(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    image = head_image(job)
    name, tag, digest = split_image(image)
    host = name.partition("/")[0]
    named = "/" in name and ("." in host or ":" in host or host == "localhost")
    if _is_local(kubectl):
        found = f"{image}; the cluster is on this machine, so load it there"
        yield Check("image", "ok", found)
    elif not named:
        yield Check(
            "image", "warning", f"{image} names no registry: the nodes must have it already",
            "push it where the nodes can pull it, and give --image REGISTRY/babelray:TAG",
        )  # fmt: skip
    elif digest is None and tag in (None, "latest"):
        yield Check(
            "image", "warning", f"{image} may be another one tomorrow, or on another node",
            "give it a tag of its own, or better its digest: --image NAME@sha256:...",
        )  # fmt: skip
    else:
        yield Check("image", "ok", f"{image}; whether the nodes can pull it shows when they do")


def _is_local(kubectl: Kubectl) -> bool:
    view = kubectl.json("config", "view", "--minify", "--output=json")
    context = kubectl.context or str(view.get("current-context") or "")
    clusters = view.get("clusters") or []
    server = str(((clusters[0].get("cluster") or {}) if clusters else {}).get("server") or "")
    host = urlsplit(server).hostname
    return bool(_LOCAL_CONTEXT.match(context)) or host in ("127.0.0.1", "localhost", "::1")
