"""What no schema catches in a pod: see ``cluster.launch.lint``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cluster.launch.sizes import quantity

Document = Mapping[str, Any]
Role = Literal["head", "worker", "submitter", "autoscaler", "pod"]

# cluster.launch.submitter, which nothing here needs to import.
COMMAND = ("python", "-m", "cluster.launch.submitter")


@dataclass(frozen=True)
class Problem:
    """Something that would not work, or not as meant.

    Attributes:
        kind, name: of the object.
        where: the path of the field in it.
        what: what is wrong.
        mend: what to do about it.
    """

    kind: str
    name: str
    where: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}, {self.where}: {self.what}; {self.mend}"


@dataclass(frozen=True)
class PodTemplate:
    """A pod as it will be, of whatever it is made.

    Attributes:
        kind, name: of the object that it comes from.
        where: the path of its spec in that.
        role: what for.
        labels: those that KubeRay adds included.
        spec: the PodSpec.
    """

    kind: str
    name: str
    where: str
    role: Role
    labels: Mapping[str, str]
    spec: Document

    def problem(self, where: str, what: str, mend: str) -> Problem:
        """One at ``where`` in the spec."""
        return Problem(self.kind, self.name, f"{self.where}.{where}", what, mend)

    def containers(self) -> Iterator[tuple[str, Document]]:
        """Every container, with its path in the spec."""
        for field in ("initContainers", "containers"):
            for number, container in enumerate(self.spec.get(field) or ()):
                yield f"{field}[{number}]", container


def environment(container: Document) -> dict[str, str]:
    """The variables of a container that have a plain value."""
    return {v["name"]: str(v["value"]) for v in container.get("env") or () if "value" in v}


def check(pod: PodTemplate, names: Mapping[str, set[str]]) -> Iterator[Problem]:
    """What is wrong with a pod; ``names``: of the objects beside it, by kind."""
    yield from _volumes(pod)
    yield from _references(pod, names)
    yield from _token(pod)
    for where, container in pod.containers():
        yield from image(pod, where, container)
        yield from resources(pod, where, container)
        yield from security(pod, where, container, pod.spec)
        yield from _folders(pod, where, container)


def submitter(pod: PodTemplate, entrypoint: object) -> Iterator[Problem]:
    """What hands a RayJob's entrypoint in: KubeRay asks for both, and compares nothing."""
    at, container = next(pod.containers(), ("containers[0]", {}))
    given = [*(container.get("command") or ()), *(container.get("args") or ())]
    own, told = given[: len(COMMAND)], " ".join(map(str, given[len(COMMAND) :]))
    if tuple(own) != COMMAND:
        yield pod.problem(
            f"{at}.command",
            "KubeRay's own waits for ever for a head that is lost, and takes a log stream that "
            "ends for the end of the job",
            f"command: [{', '.join(COMMAND)}], and the entrypoint as args, as in k8s/base",
        )
    elif told.split() != str(entrypoint).split():
        yield pod.problem(
            f"{at}.args",
            f"it would hand in {told!r}, and spec.entrypoint is another",
            "change both",
        )


def _volumes(pod: PodTemplate) -> Iterator[Problem]:
    volumes = [volume["name"] for volume in pod.spec.get("volumes") or ()]
    mounted = set()
    for where, container in pod.containers():
        for number, mount in enumerate(container.get("volumeMounts") or ()):
            mounted.add(mount["name"])
            if mount["name"] not in volumes:
                yield pod.problem(
                    f"{where}.volumeMounts[{number}]",
                    f"there is no volume {mount['name']!r}",
                    "add it to volumes, or take the mount away (KubeRay would, silently)",
                )
    for number, name in enumerate(volumes):
        if name not in mounted:
            yield pod.problem(
                f"volumes[{number}]", f"no container mounts {name!r}", "mount it or take it away"
            )


def _references(pod: PodTemplate, names: Mapping[str, set[str]]) -> Iterator[Problem]:
    """Secrets are made by hand, so they are not looked for."""
    wanted = [("serviceAccountName", "ServiceAccount", pod.spec.get("serviceAccountName"))]
    for number, volume in enumerate(pod.spec.get("volumes") or ()):
        at = f"volumes[{number}]"
        claim = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        wanted.append((f"{at}.persistentVolumeClaim", "PersistentVolumeClaim", claim))
        wanted.append((f"{at}.configMap", "ConfigMap", (volume.get("configMap") or {}).get("name")))
    for where, kind, name in wanted:
        if name is not None and name not in names.get(kind, set()):
            yield pod.problem(
                where, f"there is no {kind} {name!r} among the manifests", "add it or mend the name"
            )


def _token(pod: PodTemplate) -> Iterator[Problem]:
    """Only the autoscaler, which is in the head's pod, talks to the API server."""
    if pod.role != "head" and pod.spec.get("automountServiceAccountToken") is not False:
        yield pod.problem(
            "automountServiceAccountToken", "the pod gets a token of the API server", "set it false"
        )


def image(pod: PodTemplate, where: str, container: Document) -> Iterator[Problem]:
    """An image that may be another one tomorrow."""
    name = str(container.get("image", ""))
    tag = name.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in name and tag in ("", "latest"):
        yield pod.problem(
            f"{where}.image",
            f"{name!r} names no version",
            "name it by digest (image@sha256:...) or by a tag that is not latest",
        )


def resources(pod: PodTemplate, where: str, container: Document) -> Iterator[Problem]:
    """What is requested without a limit, and devices that are not whole."""
    given = container.get("resources") or {}
    requests, limits = given.get("requests") or {}, given.get("limits") or {}
    for name in sorted({"cpu", "memory", *requests, *limits}):
        at = f"{where}.resources.limits.{name}"
        if name not in limits:
            yield pod.problem(at, f"{name} has no limit", "limit it")
        elif name not in requests:
            yield pod.problem(at, f"{name} is limited but not requested", "request it as well")
        elif "/" in name and str(requests[name]) != str(limits[name]):
            yield pod.problem(
                at,
                f"{requests[name]} of {name} requested, {limits[name]} allowed",
                "devices are not shared: make them equal",
            )
        elif "/" in name and not str(limits[name]).isdigit():
            yield pod.problem(at, f"{limits[name]} of {name}", "ask for whole ones")
        elif quantity(requests[name]) > quantity(limits[name]):
            yield pod.problem(at, "less than is requested", "raise it to the request at least")


def security(
    pod: PodTemplate, where: str, container: Document, pod_spec: Document
) -> Iterator[Problem]:
    """What the restricted pod security standard asks for, and a root that cannot be written."""
    own, shared = container.get("securityContext") or {}, pod_spec.get("securityContext") or {}
    capabilities = own.get("capabilities") or {}
    either = {**shared, **own}
    wanted = {
        "runAsNonRoot": either.get("runAsNonRoot") is True and either.get("runAsUser") != 0,
        "seccompProfile": (either.get("seccompProfile") or {}).get("type")
        in {"RuntimeDefault", "Localhost"},
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": "ALL" in (capabilities.get("drop") or ())
        and set(capabilities.get("add") or ()) <= {"NET_BIND_SERVICE"},
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "privileged": not own.get("privileged"),
    }
    for name, fulfilled in wanted.items():
        if not fulfilled:
            yield pod.problem(
                f"{where}.securityContext.{name}",
                "not as the restricted pod security standard wants it"
                if name != "readOnlyRootFilesystem"
                else "the root can be written",
                "take over the securityContext of the containers in k8s/base",
            )
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod_spec.get(name):
            yield pod.problem(name, "the restricted standard forbids it", "take it away")


def _folders(pod: PodTemplate, where: str, container: Document) -> Iterator[Problem]:
    """A /tmp that can be written; for Ray, shared memory of a size that its memory holds."""
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes") or ()}
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts") or ()}
    if "/tmp" not in mounts or "emptyDir" not in volumes.get(mounts["/tmp"]["name"], {}):  # noqa: S108
        yield pod.problem(
            f"{where}.volumeMounts",
            "nothing can be written: the root is read-only, and no emptyDir is at /tmp",
            "mount an emptyDir at /tmp",
        )
    if pod.role not in ("head", "worker") or not where.startswith("containers[0]"):
        return
    directory = volumes.get((mounts.get("/dev/shm") or {}).get("name"), {}).get("emptyDir")  # noqa: S108
    if not directory or directory.get("medium") != "Memory" or "sizeLimit" not in directory:
        yield pod.problem(
            f"{where}.volumeMounts",
            "no /dev/shm of its own: a container has 64 MiB, too little for Ray and NCCL",
            "mount an emptyDir with medium Memory and a sizeLimit at /dev/shm",
        )
        return
    memory = ((container.get("resources") or {}).get("limits") or {}).get("memory")
    if memory is not None and quantity(directory["sizeLimit"]) >= quantity(memory):
        yield pod.problem(
            f"{where}.resources.limits.memory",
            f"shared memory ({directory['sizeLimit']}) counts as memory and fills all of {memory}",
            "raise the limit or lower the sizeLimit",
        )


def matches(selector: Document, labels: Mapping[str, str]) -> bool:
    """Whether a label selector selects a pod with these labels."""
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    rules: Sequence[Document] = selector.get("matchExpressions") or ()
    for rule in rules:
        key, values = labels.get(rule["key"]), rule.get("values") or ()
        fulfilled = {
            "In": key in values,
            "NotIn": key not in values,  # codespell:ignore
            "Exists": key is not None,
            "DoesNotExist": key is None,
        }[rule["operator"]]
        if not fulfilled:
            return False
    return True
