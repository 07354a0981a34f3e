"""What a RayJob and its pods say: how far the job is, and what it waits for.

Pure functions of the objects as the API server returns them. Values of ``.status``:
KubeRay 1.7, ray-operator/apis/ray/v1/rayjob_types.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.launch.overlays import head_image
from cluster.launch.render import RUN_ANNOTATION, job_name
from cluster.launch.target import Job, Kind, Phase

Object = Mapping[str, Any]

NAME_LABEL = "app.kubernetes.io/name"
QUEUE_LABELS = ("kueue.x-k8s.io/queue-name", "volcano.sh/queue-name", "kai.scheduler/queue")

_SUSPENDED = frozenset({"Suspended", "Suspending"})
# These mean that a container will not start by itself.
_CANNOT_PULL = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"}
)
_CANNOT_MAKE = frozenset(
    {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
)
_MAX_MESSAGE = 300


def is_ours(job: Object, run: str) -> bool:
    """Whether a RayJob of the run's name was made for that run."""
    metadata = job["metadata"]
    labels, annotations = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return labels.get(NAME_LABEL) == "babelray" and annotations.get(RUN_ANNOTATION, run) == run


def job_of(rayjob: Object, run: str, kind: Kind) -> Job:
    """A RayJob as the commands know it, without facts."""
    spec, status = rayjob.get("spec") or {}, rayjob.get("status") or {}
    attempts = int(spec.get("backoffLimit") or 0) + 1
    failed = int(status.get("failed") or 0)
    phase, message = _phase(rayjob)
    attempt = failed if phase == "failed" else failed + 1
    return Job(
        run, kind, job_name(run, kind), phase, message, min(max(attempt, 1), attempts), attempts
    )


def _phase(rayjob: Object) -> tuple[Phase, str | None]:
    spec, status = rayjob.get("spec") or {}, rayjob.get("status") or {}
    deployment = str(status.get("jobDeploymentStatus") or "").replace(" ", "")
    ray = str(status.get("jobStatus") or "")
    said = _said(status)
    if rayjob["metadata"].get("deletionTimestamp"):
        return "stopped", "it is being deleted"
    if deployment == "Complete":
        ended: dict[str, Phase] = {"FAILED": "failed", "STOPPED": "stopped"}
        phase = ended.get(ray, "succeeded")
        return phase, said if phase != "succeeded" else None
    if deployment == "Failed":
        return "failed", said or "KubeRay gave no reason"
    if deployment == "ValidationFailed":
        return "failed", said or "KubeRay refuses the RayJob"
    if deployment in _SUSPENDED or (deployment == "" and spec.get("suspend")):
        return "queued", None
    if deployment == "Retrying":
        return "starting", f"the attempt before failed ({said})" if said else None
    if deployment == "Running" and ray in ("RUNNING", "SUCCEEDED", "FAILED", "STOPPED"):
        return "running", None
    return "starting", None


def _said(status: Object) -> str | None:
    reason, message = status.get("reason"), " ".join(str(status.get("message") or "").split())
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE].rsplit(" ", 1)[0] + " …"
    hints = {
        "DeadlineExceeded": "spec.activeDeadlineSeconds has passed",
        "PreRunningDeadlineExceeded": "it did not begin within spec.preRunningDeadlineSeconds",
    }
    parts = [str(part) for part in (reason, message or hints.get(str(reason))) if part]
    return ": ".join(parts) or None


def facts(rayjob: Object, pods: Sequence[Object]) -> tuple[tuple[str, str], ...]:
    """What more there is to tell of a job."""
    metadata, status = rayjob["metadata"], rayjob.get("status") or {}
    spec = rayjob.get("spec") or {}
    found: list[tuple[str, str]] = [("namespace", str(metadata.get("namespace") or "default"))]
    if cluster := status.get("rayClusterName"):
        found.append(("Ray cluster", str(cluster)))
    if pods:
        ready = sum(is_ready(pod) for pod in pods)
        found.append(("pods", f"{ready} of {len(pods)} ready"))
    if queue := queue_of(rayjob):
        found.append(("queue", queue))
    if since := status.get("startTime") or metadata.get("creationTimestamp"):
        found.append(("since", str(since)))
    if spec.get("rayClusterSpec"):
        found.append(("image", head_image({"spec": spec})))
    return tuple(found)


def queue_of(rayjob: Object) -> str | None:
    """The queue that decides when a job may start."""
    labels = rayjob["metadata"].get("labels") or {}
    return next((str(labels[label]) for label in QUEUE_LABELS if label in labels), None)


def is_ready(pod: Object) -> bool:
    """Whether all containers of a pod are."""
    conditions = (pod.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions)


def queue_reason(rayjob: Object, workloads: Sequence[Object]) -> str:
    """Why a suspended job does not start, by what its queue says."""
    queue = queue_of(rayjob)
    uid = rayjob["metadata"].get("uid")
    for workload in workloads:
        owners = workload["metadata"].get("ownerReferences") or []
        if not any(owner.get("uid") == uid for owner in owners):
            continue
        conditions = (workload.get("status") or {}).get("conditions") or []
        for kind in ("Evicted", "QuotaReserved", "Admitted"):
            for condition in conditions:
                waits = (condition.get("status") == "True") == (kind == "Evicted")
                if condition.get("type") == kind and waits and condition.get("message"):
                    return f"queued in {queue}: {condition['message']}"
    if queue is None:
        return "suspended (spec.suspend): nothing starts until somebody sets it to false"
    return f"queued in {queue}"


def trouble(pods: Sequence[Object]) -> tuple[str, Object | None] | None:
    """What keeps a cluster's pods from being ready: (reason, the pod whose events tell more).

    The pod is None where the reason says it all; None as a whole if all are ready.
    """
    waiting = [pod for pod in pods if not is_ready(pod) and not _is_done(pod)]
    if not waiting:
        return None
    count = f"{len(pods) - len(waiting)} of {len(pods)} pods are ready"
    for find in (_container_trouble, _scheduling_trouble):
        for pod in waiting:
            if reason := find(pod):
                return f"{count}; {pod['metadata']['name']}: {reason}", None
    pod = waiting[0]
    return f"{count}; {pod['metadata']['name']}: {_progress(pod)}", pod


def _is_done(pod: Object) -> bool:
    return (pod.get("status") or {}).get("phase") == "Succeeded"


def _scheduling_trouble(pod: Object) -> str | None:
    for condition in (pod.get("status") or {}).get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            said = " ".join(str(condition.get("message") or condition.get("reason")).split())
            return f"no node takes it: {said}"
    return None


def containers(pod: Object) -> Iterator[Object]:
    """The states of a pod's containers, those before its start first."""
    status = pod.get("status") or {}
    for field in ("initContainerStatuses", "containerStatuses"):
        yield from status.get(field) or []


def _container_trouble(pod: Object) -> str | None:
    for container in containers(pod):
        state = container.get("state") or {}
        waiting = state.get("waiting") or {}
        reason, said = str(waiting.get("reason") or ""), str(waiting.get("message") or "")
        if reason in _CANNOT_PULL:
            detail = "" if said.startswith("Back-off") else said
            return _joined(
                f"the image {container.get('image')} cannot be pulled ({reason})", detail
            )
        if reason in _CANNOT_MAKE:
            return _joined(reason, said)
        if reason == "CrashLoopBackOff":
            return f"the container {container.get('name')} {_death(container)} again and again"
        if (dead := state.get("terminated")) and dead.get("exitCode"):
            return f"the container {container.get('name')} {_death(container)}"
    return None


def _joined(*parts: str) -> str:
    return " ".join(": ".join(part for part in parts if part).split())[:_MAX_MESSAGE]


def _death(container: Object) -> str:
    for field in ("state", "lastState"):
        dead = (container.get(field) or {}).get("terminated")
        if dead and dead.get("reason") == "OOMKilled":
            return "was killed for want of memory (OOMKilled)"
        if dead:
            return f"ends with exit status {dead.get('exitCode')}"
    return "ends"


def crashing(pods: Sequence[Object]) -> tuple[str, str] | None:
    """(pod, container) of the first that ends with an error, whose log says why."""
    for pod in pods:
        for container in containers(pod):
            state = container.get("state") or {}
            is_looping = (state.get("waiting") or {}).get("reason") == "CrashLoopBackOff"
            if is_looping or (state.get("terminated") or {}).get("exitCode"):
                return str(pod["metadata"]["name"]), str(container.get("name"))
    return None


def _progress(pod: Object) -> str:
    for container in containers(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = waiting.get("reason")
        if reason == "PodInitializing":
            continue
        if reason == "ContainerCreating":
            return "its containers are made (the image is pulled, volumes are mounted)"
        if reason:
            return _joined(str(reason), str(waiting.get("message") or ""))
    phase = (pod.get("status") or {}).get("phase") or "Pending"
    return "its containers start" if phase == "Running" else f"it is {phase.lower()}"


def last_warning(events: Sequence[Object]) -> str | None:
    """What the newest warning among events says."""
    warnings = [event for event in events if event.get("type") == "Warning"]
    if not warnings:
        return None
    newest = max(warnings, key=_event_time)
    return _joined(str(newest.get("reason") or ""), str(newest.get("message") or ""))


def _event_time(event: Object) -> str:
    times = (
        event.get("lastTimestamp"),
        event.get("eventTime"),
        event["metadata"].get("creationTimestamp"),
    )
    return str(next((time for time in times if time), ""))


def uses_tokens(rayjob: Object) -> bool:
    """Whether its Ray cluster answers only those who have its token."""
    cluster = (rayjob.get("spec") or {}).get("rayClusterSpec") or {}
    return (cluster.get("authOptions") or {}).get("mode") == "token"


def last_line(text: str) -> str | None:
    """The last line of a log that says something."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
    return lines[-1][:_MAX_MESSAGE] if lines else None
