"""What no schema catches in manifests: KubeRay's own rules, and what babelray's runs need.

An unknown submission mode passes the API server, a pod template inside a RayJob is looked at by
nobody before there are pods of it, and a wrong selector simply selects nothing. Works on plain
dictionaries, as YAML gives them; nothing is asked of a cluster.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import yaml

from cluster.launch.lint_pods import (
    Document,
    PodTemplate,
    Problem,
    check,
    environment,
    matches,
    resources,
    security,
    submitter,
)
from cluster.launch.sizes import quantity

__all__ = ["Problem", "lint"]

# KubeRay makes the name of the cluster of it (6 characters more, 53 at most) and a service of that.
MAX_NAME = 47
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode")
MAX_KUEUE_WORKER_GROUPS = 7  # of 8 pod sets in a Workload one is the head's; see Kueue on RayJobs

KUEUE = "kueue.x-k8s.io/queue-name"
_QUEUES = (KUEUE, "volcano.sh/queue-name", "kai.scheduler/queue")
_ANNOTATIONS = {
    "babelray.dev/run",
    "babelray.dev/auth",
    "babelray.dev/elastic",
    "babelray.dev/elastic-workers",
    "ray.io/external-storage-namespace",
    "ray.io/ft-enabled",
    "ray.io/overwrite-container-cmd",
}
_DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
_DRAIN_BY_DEFAULT_S = 30.0
_GRACE_BY_DEFAULT_S = 30  # of a pod


def lint(documents: Sequence[Document]) -> list[Problem]:
    """Everything wrong with rendered manifests, in their order; empty if nothing is."""
    names: dict[str, set[str]] = defaultdict(set)
    for document in documents:
        names[document["kind"]].add(document["metadata"]["name"])
    config = _configuration(documents)
    grace_s = _grace_s(documents, config)
    pods = [pod for document in documents for pod in pod_templates(document)]
    found: list[Problem] = []
    for document in documents:
        if document["kind"] == "RayJob":
            found += _job(document)
            found += _retries_and_words(document)
            found += _workers(document)
            found += _lanes(document, config)
            found += _autoscaler(document)
        elif document["kind"] in _SELECTORS:
            found += _selector(document, pods)
        found += [
            problem
            for pod in pods
            if (pod.kind, pod.name) == (document["kind"], document["metadata"]["name"])
            for problem in (*check(pod, names), *_grace(pod, grace_s))
        ]
        found += [
            problem
            for pod in pod_templates(document)
            if pod.role == "submitter"
            for problem in submitter(pod, document["spec"].get("entrypoint"))
        ]
    return found


def pod_templates(document: Document) -> Iterator[PodTemplate]:
    """The pods that a document stands for, with the labels that KubeRay will add."""
    kind, name = document["kind"], document["metadata"]["name"]
    spec = document.get("spec") or {}
    if kind == "Pod":
        labels = document["metadata"].get("labels") or {}
        yield PodTemplate(kind, name, "spec", "pod", labels, spec)
    if kind != "RayJob":
        return

    def template(where: str, role: Any, template: Document, **labels: str) -> PodTemplate:
        own = (template.get("metadata") or {}).get("labels") or {}
        added = {f"ray.io/{key.replace('_', '-')}": value for key, value in labels.items()}
        return PodTemplate(
            kind, name, f"{where}.spec", role, {**own, **added}, template.get("spec") or {}
        )

    ours = {"is_ray_node": "yes", "cluster": name}
    cluster = spec.get("rayClusterSpec") or {}
    if head := cluster.get("headGroupSpec"):
        where = "spec.rayClusterSpec.headGroupSpec.template"
        yield template(where, "head", head["template"], node_type="head", group="headgroup", **ours)
    for number, group in enumerate(cluster.get("workerGroupSpecs") or ()):
        where = f"spec.rayClusterSpec.workerGroupSpecs[{number}].template"
        name_of_group = str(group.get("groupName"))
        yield template(
            where, "worker", group["template"], node_type="worker", group=name_of_group, **ours
        )
    if (submitter := spec.get("submitterPodTemplate")) and _mode(spec) == "K8sJobMode":
        yield template("spec.submitterPodTemplate", "submitter", submitter)


def _mode(spec: Document) -> str:
    return str(spec.get("submissionMode", "K8sJobMode"))


def _job(document: Document) -> Iterator[Problem]:
    """What KubeRay's reconciler, or nobody, refuses."""
    name, spec = document["metadata"]["name"], document["spec"]
    labels = document["metadata"].get("labels") or {}
    cluster = spec.get("rayClusterSpec") or {}

    def problem(where: str, what: str, mend: str) -> Problem:
        return Problem("RayJob", name, where, what, mend)

    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield problem(
            "metadata.name",
            f"{len(name)} characters, or not of the right ones",
            f"at most {MAX_NAME} of a-z, 0-9 and -, a letter first",
        )
    if _mode(spec) not in SUBMISSION_MODES:
        yield problem(
            "spec.submissionMode",
            f"{_mode(spec)!r} is no way to submit a job here; KubeRay would do nothing, or run a "
            "container without a security context",
            f"one of {', '.join(SUBMISSION_MODES)}",
        )
    elif _mode(spec) == "K8sJobMode" and not spec.get("submitterPodTemplate"):
        yield problem(
            "spec.submitterPodTemplate",
            "KubeRay's own has no security context, so the namespace refuses it",
            "take over the one in k8s/base",
        )
    for field in ("ttlSecondsAfterFinished", "suspend"):
        if spec.get(field) and not spec.get("shutdownAfterJobFinishes"):
            yield problem(
                f"spec.{field}", "KubeRay refuses it", "set shutdownAfterJobFinishes: true"
            )
    queues = [label for label in _QUEUES if label in labels]
    if len(queues) > 1:
        yield problem("metadata.labels", f"two queues: {', '.join(queues)}", "choose one scheduler")
    if KUEUE in labels:
        yield from _kueue(spec, problem)
    if "kai.scheduler/queue" in labels and _mode(spec) == "K8sJobMode":
        yield problem(
            "spec.submissionMode",
            "KubeRay refuses a submitter pod with the KAI scheduler",
            "set HTTPMode, as the component kai does",
        )
    if str(cluster.get("rayVersion")) != version("ray"):
        yield problem(
            "spec.rayClusterSpec.rayVersion",
            f"{cluster.get('rayVersion')}, but {version('ray')} is locked, and so in the image",
            "make them the same",
        )
    head = (cluster.get("headGroupSpec") or {}).get("rayStartParams") or {}
    if head.get("num-cpus") != "0":
        yield problem(
            "spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus",
            "ranks would be placed on the head",
            'set it to "0"',
        )
    for annotation in document["metadata"].get("annotations") or {}:
        if annotation.startswith(("ray.io/", "babelray.dev/")) and annotation not in _ANNOTATIONS:
            yield problem(f"metadata.annotations.{annotation}", "nobody reads it", "mend its name")


def _kueue(spec: Document, problem: Any) -> Iterator[Problem]:
    cluster = spec.get("rayClusterSpec") or {}
    if spec.get("suspend") is not True:
        yield problem(
            "spec.suspend", "it would start before Kueue lets it", "set it true; Kueue clears it"
        )
    if cluster.get("enableInTreeAutoscaling"):
        yield problem(
            "spec.rayClusterSpec.enableInTreeAutoscaling",
            "Kueue admits a fixed number of pods",
            "leave out the component elastic, or kueue",
        )
    if len(cluster.get("workerGroupSpecs") or ()) > MAX_KUEUE_WORKER_GROUPS:
        yield problem(
            "spec.rayClusterSpec.workerGroupSpecs",
            f"more than {MAX_KUEUE_WORKER_GROUPS} groups, which Kueue refuses",
            "join groups",
        )


def _retries_and_words(document: Document) -> Iterator[Problem]:
    """The entrypoint: goes through shells, and is run again after a failure."""
    entrypoint = str(document["spec"].get("entrypoint", ""))
    name, where = document["metadata"]["name"], "spec.entrypoint"
    if unsafe := re.search(r"[^\w \n./:=,@%+-]", entrypoint):
        yield Problem(
            "RayJob",
            name,
            where,
            f"{unsafe[0]!r}: the shell on the head would read it",
            "put values with such signs into the configuration",
        )
    words = entrypoint.split()
    if words[:2] == ["babelray", "train"] and "--start-or-resume" not in words:
        yield Problem(
            "RayJob",
            name,
            where,
            "another attempt would refuse to begin, because the run is there",
            "add --start-or-resume",
        )


def _workers(document: Document) -> Iterator[Problem]:
    """Numbers of workers, and the ranks that the entrypoint wants of them."""
    name, spec = document["metadata"]["name"], document["spec"]
    cluster = spec.get("rayClusterSpec") or {}
    elastic = bool(cluster.get("enableInTreeAutoscaling"))
    least = most = 0
    for number, group in enumerate(cluster.get("workerGroupSpecs") or ()):
        where = f"spec.rayClusterSpec.workerGroupSpecs[{number}]"
        replicas, low, high = (group.get(key) for key in ("replicas", "minReplicas", "maxReplicas"))
        if replicas is None or low is None or high is None or not low <= replicas <= high:
            yield Problem(
                "RayJob",
                name,
                f"{where}.replicas",
                f"minReplicas {low}, replicas {replicas}, maxReplicas {high}",
                "give all three, in ascending order",
            )
            return
        if not elastic and low != high:
            yield Problem(
                "RayJob",
                name,
                f"{where}.maxReplicas",
                f"{high}, but without autoscaling there will be {replicas}",
                "make the three the same, or add the component elastic",
            )
        ranks = _ranks(group["template"]["spec"]["containers"][0])
        least, most = least + low * ranks, most + high * ranks
    words = str(spec.get("entrypoint", "")).split()
    if "--workers" not in words[:-1]:
        return
    wanted = words[words.index("--workers") + 1]
    low_wanted, _, high_wanted = wanted.partition(":")
    if not (low_wanted + high_wanted).isdigit():
        return  # babelray says so itself
    fits = int(low_wanted) <= least and int(high_wanted or low_wanted) <= most
    if not fits or bool(high_wanted) != elastic:
        room = f"{least}:{most}" if elastic else str(most)
        yield Problem(
            "RayJob",
            name,
            "spec.entrypoint",
            f"--workers {wanted}, but there is room for {room}",
            f"ask for --workers {room} (ranks of a worker: its GPUs, else its CPUs)",
        )


def _ranks(container: Document) -> int:
    """How many ranks a worker has room for: one a GPU, or one a CPU."""
    limits = (container.get("resources") or {}).get("limits") or {}
    gpus = [quantity(limits[key]) for key in limits if key.endswith("/gpu")]
    return int(gpus[0] if gpus else quantity(limits.get("cpu", "1")))


def _autoscaler(document: Document) -> Iterator[Problem]:
    """Ray's autoscaler, which KubeRay puts beside the head; and tokens, which it hands out."""
    cluster = document["spec"].get("rayClusterSpec") or {}
    name = document["metadata"]["name"]
    mode = (cluster.get("authOptions") or {}).get("mode", "disabled")
    containers = [
        (f"{pod.where}.{where}", container)
        for pod in pod_templates(document)
        for where, container in pod.containers()
        if where == "containers[0]"
    ]
    head = next((pod for pod in pod_templates(document) if pod.role == "head"), None)
    if cluster.get("enableInTreeAutoscaling") and head is not None:
        options = {"name": "autoscaler", **(cluster.get("autoscalerOptions") or {})}
        at = "spec.rayClusterSpec"
        pod = PodTemplate("RayJob", name, at, "autoscaler", {}, {"containers": [options]})
        containers.append((f"{at}.autoscalerOptions", options))
        yield from resources(pod, "autoscalerOptions", options)
        yield from security(pod, "autoscalerOptions", options, head.spec)
        if "/tmp" not in {m["mountPath"] for m in options.get("volumeMounts") or ()}:  # noqa: S108
            yield pod.problem(
                "autoscalerOptions.volumeMounts", "its root is read-only", "mount tmp at /tmp"
            )
        if head.spec.get("automountServiceAccountToken") is False:
            yield head.problem(
                "automountServiceAccountToken",
                "the autoscaler could not ask for pods",
                "set it true",
            )
    elif head is not None and head.spec.get("automountServiceAccountToken") is not False:
        yield head.problem(
            "automountServiceAccountToken", "the pod gets a token of the API server", "set it false"
        )
    for where, container in containers:
        # Ray switches tokens on by itself where it finds one; KubeRay keeps a value that is there.
        if environment(container).get("RAY_AUTH_MODE") != mode:
            yield Problem(
                "RayJob",
                name,
                f"{where}.env",
                f"RAY_AUTH_MODE is not {mode!r}, which authOptions.mode is",
                "set it everywhere, as the component token-auth does",
            )


def _configuration(documents: Sequence[Document]) -> dict[str, Any]:
    """The run's configuration, which a ConfigMap holds; empty if none does."""
    for document in documents:
        if document["kind"] == "ConfigMap" and "run.yaml" in (document.get("data") or {}):
            return yaml.safe_load(document["data"]["run.yaml"]) or {}
    return {}


def _lanes(document: Document, config: Document) -> Iterator[Problem]:
    """Every rank takes a lane at least; the command would refuse more ranks."""
    from data_shards.config import DataConfig

    entrypoint = str(document["spec"].get("entrypoint", ""))
    ranks = re.search(r"--workers (?:\d+:)?(\d+)", entrypoint)
    if ranks is None:
        return
    told = re.findall(r"--set data\.lanes=(\d+)", entrypoint)
    lanes = int(told[-1] if told else (config.get("data") or {}).get("lanes", DataConfig().lanes))
    if int(ranks[1]) > lanes:
        yield Problem(
            "RayJob",
            document["metadata"]["name"],
            "spec.entrypoint",
            f"{ranks[1]} workers, but the run has {lanes} lanes, and every worker takes one",
            f"ask for fewer, or set data.lanes to {ranks[1]} at least",
        )


def _grace_s(documents: Sequence[Document], config: Document) -> float:
    """How long a rank may take to save: the longest that configuration and entrypoints say."""
    from trainer.config import RecoveryConfig

    said = [RecoveryConfig().grace_s]
    recovery = config.get("recovery") or {}
    said += [float(recovery["grace_s"])] if "grace_s" in recovery else []
    for document in documents:
        entrypoint = str((document.get("spec") or {}).get("entrypoint", ""))
        said += [float(value) for value in re.findall(r"recovery\.grace_s=([\d.]+)", entrypoint)]
    return said[0] if len(said) == 1 else max(said[1:])


def _grace(pod: PodTemplate, grace_s: float) -> Iterator[Problem]:
    """SIGTERM drains a Ray node; what then saves must be done before the kubelet kills."""
    if pod.role not in ("head", "worker"):
        return
    container = pod.spec["containers"][0]
    drain_s = float(environment(container).get(_DRAIN, _DRAIN_BY_DEFAULT_S))
    if drain_s < grace_s:
        yield pod.problem(
            "containers[0].env",
            f"{_DRAIN} {drain_s:g} s, but a rank may take {grace_s:g} s to save",
            "raise it, or lower recovery.grace_s",
        )
    allowed_s = float(pod.spec.get("terminationGracePeriodSeconds", _GRACE_BY_DEFAULT_S))
    if allowed_s < drain_s + grace_s:
        yield pod.problem(
            "terminationGracePeriodSeconds",
            f"{allowed_s:g} s, but draining and saving may take {drain_s + grace_s:g} s",
            f"at least {drain_s + grace_s:g}",
        )


_SELECTORS = {
    "PodDisruptionBudget": "selector",
    "PodMonitor": "selector",
    "NetworkPolicy": "podSelector",
}


def _selector(document: Document, pods: Sequence[PodTemplate]) -> Iterator[Problem]:
    """Selectors that select no pod; ports that none has; budgets that the API refuses later."""
    kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
    field = _SELECTORS[kind]
    selected = [pod for pod in pods if matches(spec.get(field) or {}, pod.labels)]
    if not selected:
        yield Problem(
            kind, name, f"spec.{field}", "no pod has these labels", "mend them, or take it away"
        )
        return
    if kind == "PodDisruptionBudget" and not isinstance(spec.get("minAvailable"), int):
        yield Problem(
            kind,
            name,
            "spec.minAvailable",
            "for pods of a RayCluster only a whole number of minAvailable has an effect",
            "give a number, and no maxUnavailable",
        )
    ports = {
        port.get("name")
        for pod in selected
        for _, container in pod.containers()
        for port in container.get("ports") or ()
    }
    for number, endpoint in enumerate(spec.get("podMetricsEndpoints") or ()):
        if endpoint.get("port") not in ports:
            yield Problem(
                kind,
                name,
                f"spec.podMetricsEndpoints[{number}].port",
                f"no container of the selected pods has a port {endpoint.get('port')!r}",
                f"one of {', '.join(sorted(filter(None, ports)))}",
            )
