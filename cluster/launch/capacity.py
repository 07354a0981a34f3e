"""Whether a cluster has room for a job: in its quotas, in its storage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster.checks import Check
from cluster.launch.kubectl import Kubectl, KubectlError
from cluster.launch.room import Amounts, pod_requests
from cluster.launch.sizes import group_index, quantity, read_group

Document = Mapping[str, Any]

# These give a volume to one node at a time.
_ONE_NODE = frozenset(
    {
        "ebs.csi.aws.com", "pd.csi.storage.gke.io", "disk.csi.azure.com", "rancher.io/local-path",
        "k8s.io/minikube-hostpath", "kubernetes.io/aws-ebs", "kubernetes.io/gce-pd",
        "kubernetes.io/azure-disk", "cinder.csi.openstack.org", "csi.vsphere.vmware.com",
        "dobs.csi.digitalocean.com", "csi.hetzner.cloud",
    }
)  # fmt: skip
_DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"


def demand(job: Document) -> Amounts:
    """What all pods of a job ask for, as a quota counts it: "requests.cpu", "limits.memory", …."""
    cluster = job["spec"]["rayClusterSpec"]
    specs = [(cluster["headGroupSpec"]["template"]["spec"], 1)]
    specs.append(
        (cluster["workerGroupSpecs"][group_index(job)]["template"]["spec"], read_group(job).low)
    )
    if submitter := job["spec"].get("submitterPodTemplate"):
        specs.append((submitter["spec"], 1))
    total: Amounts = defaultdict(float)
    for spec, number in specs:
        for name, amount in pod_requests(spec).items():
            total["pods" if name == "pods" else f"requests.{name}"] += amount * number
        for container in spec.get("containers") or []:
            for name, amount in ((container.get("resources") or {}).get("limits") or {}).items():
                total[f"limits.{name}"] += quantity(amount) * number
    for name in ("cpu", "memory"):
        total[name] = total[f"requests.{name}"]
    return total


def quota_checks(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    """Whether the namespace's quotas leave room; a pod over them is refused, not queued."""
    quotas = kubectl.list("resourcequotas")
    need = demand(job)
    short = []
    for quota in quotas:
        status = quota.get("status") or {}
        used = status.get("used") or {}
        for name, hard in (
            status.get("hard") or (quota.get("spec") or {}).get("hard") or {}
        ).items():
            left = quantity(hard) - quantity(used.get(name, 0)) if name in need else 0.0
            if name in need and need[name] > left:
                short.append(
                    f"{name}: {_amount(name, need[name])} asked for, {_amount(name, left)} of "
                    f"{hard} left in {quota['metadata']['name']}"
                )
    if short:
        mend = "choose fewer --nodes or --gpus, end something else, or ask for a larger quota"
        yield Check("quota", "failure", "; ".join(short), mend)
    elif quotas:
        yield Check("quota", "ok", f"{len(quotas)} in the namespace, with room")
    else:
        yield Check("quota", "ok", "none in the namespace")


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.4g}Gi" if "memory" in name or "storage" in name else f"{value:g}"


def storage_checks(
    kubectl: Kubectl, documents: Sequence[Document], job: Document
) -> Iterator[Check]:
    """Whether each volume claim that the job mounts is there, or can be made, for all its nodes."""
    made = {d["metadata"]["name"]: d for d in documents if d["kind"] == "PersistentVolumeClaim"}
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for volume in template.get("volumes") or []:
        name = (volume.get("persistentVolumeClaim") or {}).get("claimName")
        if name is None:
            continue
        claim = kubectl.get("persistentvolumeclaims", name)
        if claim is not None:
            yield _claim(kubectl, claim)
        elif name in made:
            yield _class(kubectl, made[name])
        else:
            found = f"the claim {name} is not there, and no manifest makes it"
            yield Check("storage", "failure", found, "make it, or use the base's claim babelray")


def _claim(kubectl: Kubectl, claim: Document) -> Check:
    name, status = claim["metadata"]["name"], claim.get("status") or {}
    modes = status.get("accessModes") or (claim.get("spec") or {}).get("accessModes") or []
    phase = status.get("phase")
    if phase == "Lost":
        found = f"the claim {name} has lost its volume"
        return Check("storage", "failure", found, "bring it back, or delete the claim")
    if phase != "Bound":
        found = f"the claim {name} is {phase}: its volume comes with the first pod, or never"
        mend = f"if pods wait for it, see why: kubectl describe pvc {name}"
        return Check("storage", "warning", found, mend)
    size = (status.get("capacity") or {}).get("storage")
    found = f"the claim {name} is bound, {size}, {', '.join(modes)}"
    if "ReadWriteMany" not in modes and (several := _several_nodes(kubectl)):
        return Check("storage", "warning", f"{found}; {several}", _SHARED)
    return Check("storage", "ok", found)


_SHARED = "pods on several nodes need a claim with ReadWriteMany (NFS, Filestore, EFS, CephFS, ...)"


def _several_nodes(kubectl: Kubectl) -> str | None:
    try:
        number = len(kubectl.text("get", "nodes", "--output=name").split())
    except KubectlError as error:
        if error.trouble != "forbidden":
            raise
        return "the number of nodes may not be read"
    return f"the cluster has {number} nodes" if number > 1 else None


def _is_default(storage_class: Document) -> bool:
    annotations = storage_class["metadata"].get("annotations") or {}
    return annotations.get(_DEFAULT_CLASS) == "true"


def _class(kubectl: Kubectl, claim: Document) -> Check:
    """Whether the storage class of a claim that is yet to be made can serve it."""
    spec = claim.get("spec") or {}
    modes, asked = spec.get("accessModes") or [], spec.get("storageClassName")
    name = claim["metadata"]["name"]
    if asked == "":
        return Check("storage", "ok", f"the claim {name} takes a volume that was made for it")
    classes = kubectl.list("storageclasses.storage.k8s.io")
    if asked is None:
        chosen = [c for c in classes if _is_default(c)]
    else:
        chosen = [c for c in classes if c["metadata"]["name"] == asked]
    known = ", ".join(c["metadata"]["name"] for c in classes) or "none"
    mend = "set storageClassName of the claim in an overlay of your own (docs/kubernetes.md)"
    if not chosen:
        what = f"no storage class {asked}" if asked else "no default storage class"
        return Check("storage", "failure", f"the cluster has {what}; there are: {known}", mend)
    provisioner = chosen[0].get("provisioner")
    found = f"the claim {name} will be made by {chosen[0]['metadata']['name']} ({provisioner})"
    if "ReadWriteMany" in modes and provisioner in _ONE_NODE:
        found += ", which serves one node at a time: ReadWriteMany would never be bound"
        return Check("storage", "failure", found, mend)
    if "ReadWriteMany" not in modes and (several := _several_nodes(kubectl)):
        return Check("storage", "warning", f"{found}, {', '.join(modes)}; {several}", _SHARED)
    return Check("storage", "ok", f"{found}, {', '.join(modes)}")
