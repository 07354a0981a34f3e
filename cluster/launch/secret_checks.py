"""Whether the secrets that pods read are there: without one they stand and say nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.checks import Check
from cluster.launch.kubectl import Kubectl

Document = Mapping[str, Any]


def secret_checks(
    kubectl: Kubectl, documents: Sequence[Document], job: Document
) -> Iterator[Check]:
    """Each secret that a pod of the job cannot do without, and that the manifests do not bring."""
    brought = {d["metadata"]["name"] for d in documents if d["kind"] == "Secret"}
    wanted: dict[str, set[str]] = {}
    for spec in _pod_specs(job):
        for name, key in _secrets(spec):
            wanted.setdefault(name, set()).update([key] if key else [])
    for name in sorted(wanted.keys() - brought):
        keys = sorted(wanted[name])
        secret = kubectl.get("secrets", name)
        missing = [key for key in keys if key not in ((secret or {}).get("data") or {})]
        if secret is not None and not missing:
            yield Check("secrets", "ok", f"{name} is there")
            continue
        found = f"there is no secret {name}" if secret is None else f"the secret {name} lacks "
        found += "" if secret is None else ", ".join(missing)
        values = [f"--from-literal={key}=..." for key in keys or ["NAME"]]
        make = kubectl.for_person("create", "secret", "generic", name, *values)
        mend = make if secret is None else f"delete it, and make it anew: {make}"
        if not keys:
            mend += " (docs/kubernetes.md, Storage, has the names for s3)"
        yield Check("secrets", "failure", f"{found}: pods that read it would not start", mend)


def _pod_specs(job: Document) -> Iterator[Document]:
    spec = job["spec"]
    cluster = spec["rayClusterSpec"]
    for part in (cluster["headGroupSpec"], *(cluster.get("workerGroupSpecs") or [])):
        yield part["template"]["spec"]
    if submitter := spec.get("submitterPodTemplate"):
        yield submitter["spec"]
    yield {"containers": [cluster.get("autoscalerOptions") or {}]}


def _secrets(spec: Document) -> Iterator[tuple[str, str | None]]:
    """(name, key) of the secrets that a pod reads; without a key all of it is read."""
    for reference in _references(spec):
        name = reference.get("name") or reference.get("secretName")
        if name and not reference.get("optional"):
            yield str(name), reference.get("key")


def _references(spec: Document) -> Iterator[Document]:
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        for source in container.get("envFrom") or []:
            yield source.get("secretRef") or {}
        for variable in container.get("env") or []:
            yield (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
    for volume in spec.get("volumes") or []:
        yield volume.get("secret") or {}
        for source in (volume.get("projected") or {}).get("sources") or []:
            yield source.get("secret") or {}


def token_checks(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    """The secret with Ray's token, where the manifests name one."""
    auth = job["spec"]["rayClusterSpec"].get("authOptions") or {}
    if auth.get("mode") != "token":
        return
    secret = auth.get("secretName")
    if secret and kubectl.get("secret", secret) is None:
        mend = f"kubectl create secret generic {secret} --from-literal=auth_token=..."
        found = f"there is no secret {secret} with the token"
        yield Check("token authentication", "failure", found, mend)
    else:
        yield Check("token authentication", "ok", secret or "KubeRay makes a token for the cluster")
