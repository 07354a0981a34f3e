"""Manifests that schemas let pass: each is broken in one place and refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from cluster.launch.lint import Problem, lint
from tests.k8s import rendering, schemas

pytestmark = pytest.mark.k8s

CLUSTER = "spec.rayClusterSpec"
HEAD = f"{CLUSTER}.headGroupSpec.template.spec"
WORKER = f"{CLUSTER}.workerGroupSpecs[0].template.spec"
SUBMITTER = "spec.submitterPodTemplate.spec"
Rendering = dict[str, Any]


def rendering_of(*components: str) -> Rendering:
    """A rendering of the overlay gpu: the first of each kind by that, of RayJobs what trains."""
    made: Rendering = {}
    for document in copy.deepcopy(rendering.render(("gpu", components))):
        kind, name = document["kind"], document["metadata"]["name"]
        taken = kind in made or name == "evaluate-babelray"
        made[f"{kind} {name}" if taken else kind] = document
    return made


def spec(r: Rendering) -> Any:
    return r["RayJob"]["spec"]


def cluster(r: Rendering) -> Any:
    return spec(r)["rayClusterSpec"]


def head(r: Rendering) -> Any:
    return cluster(r)["headGroupSpec"]["template"]["spec"]


def group(r: Rendering) -> Any:
    return cluster(r)["workerGroupSpecs"][0]


def worker(r: Rendering) -> Any:
    return group(r)["template"]["spec"]


def submitter(r: Rendering) -> Any:
    return spec(r)["submitterPodTemplate"]["spec"]


def first(pod: Any) -> Any:
    return pod["containers"][0]


def without(pod: Any, volume: str) -> None:
    """Take a volume and its mounts away."""
    pod["volumes"] = [one for one in pod["volumes"] if one["name"] != volume]
    mounts = first(pod)["volumeMounts"]
    first(pod)["volumeMounts"] = [one for one in mounts if one["name"] != volume]


def variable(pod: Any, name: str, value: str) -> None:
    (entry,) = [one for one in first(pod)["env"] if one["name"] == name]
    entry["value"] = value


def volume(pod: Any, name: str) -> Any:
    (found,) = [one for one in pod["volumes"] if one["name"] == name]
    return found


def entrypoint(r: Rendering, old: str, new: str) -> None:
    assert old in spec(r)["entrypoint"]
    spec(r)["entrypoint"] = spec(r)["entrypoint"].replace(old, new)


# Name: how it is broken, where that is found, what is said of it, with which components.
Case = tuple[Callable[[Rendering], Any], str, str, tuple[str, ...]]
BROKEN: dict[str, Case] = {
    "an unknown submission mode": (
        lambda r: spec(r).update(submissionMode="K8sJob"),
        "spec.submissionMode", "'K8sJob' is no way", (),
    ),
    "a sidecar without a security context": (
        lambda r: spec(r).update(submissionMode="SidecarMode"),
        "spec.submissionMode", "security context", (),
    ),
    "the submitter that KubeRay makes": (
        lambda r: spec(r).pop("submitterPodTemplate"),
        "spec.submitterPodTemplate", "no security context", (),
    ),
    "a submitter with KubeRay's command": (
        lambda r: first(submitter(r)).pop("command"),
        f"{SUBMITTER}.containers[0].command", "waits for ever", (),
    ),
    "a submitter with another entrypoint": (
        lambda r: entrypoint(r, "--name babelray", "--name other"),
        f"{SUBMITTER}.containers[0].args", "spec.entrypoint is another", (),
    ),
    "a submitter without the entrypoint": (
        lambda r: first(submitter(r)).pop("args"),
        f"{SUBMITTER}.containers[0].args", "it would hand in ''", (),
    ),
    "time to live without shutdown": (
        lambda r: spec(r).update(shutdownAfterJobFinishes=False),
        "spec.ttlSecondsAfterFinished", "KubeRay refuses", (),
    ),
    "suspended without shutdown": (
        lambda r: spec(r).update(
            suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0
        ),
        "spec.suspend", "KubeRay refuses", (),
    ),
    "more at least than at most": (
        lambda r: group(r).update(minReplicas=3),
        f"{CLUSTER}.workerGroupSpecs[0].replicas", "minReplicas 3", (),
    ),
    "replicas outside": (
        lambda r: group(r).update(replicas=5),
        f"{CLUSTER}.workerGroupSpecs[0].replicas", "replicas 5", (),
    ),
    "no number of replicas at most": (
        lambda r: group(r).pop("maxReplicas"),
        f"{CLUSTER}.workerGroupSpecs[0].replicas", "maxReplicas None", (),
    ),
    "room to grow without autoscaling": (
        lambda r: group(r).update(maxReplicas=4),
        f"{CLUSTER}.workerGroupSpecs[0].maxReplicas", "without autoscaling", (),
    ),
    "too few GPUs for the ranks": (
        lambda r: entrypoint(r, "--workers 1", "--workers 2"),
        "spec.entrypoint", "room for 1", (),
    ),
    "more ranks than lanes": (
        lambda r: r["ConfigMap"]["data"].update({"run.yaml": "data: {lanes: 3}"}),
        "spec.entrypoint", "the run has 3 lanes", ("elastic",),
    ),
    "elastic workers on a fixed cluster": (
        lambda r: entrypoint(r, "--workers 1", "--workers 1:1"),
        "spec.entrypoint", "room for 1", (),
    ),
    "fixed workers on an elastic cluster": (
        lambda r: entrypoint(r, "--workers 1:4", "--workers 4"),
        "spec.entrypoint", "room for 1:4", ("elastic",),
    ),
    "Kueue's job not suspended": (
        lambda r: spec(r).update(suspend=False), "spec.suspend", "before Kueue", ("kueue",),
    ),
    "Kueue and autoscaling": (
        lambda r: r["RayJob"]["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "q"})
        or spec(r).update(suspend=True),
        f"{CLUSTER}.enableInTreeAutoscaling", "fixed number", ("elastic",),
    ),
    "Kueue and eight groups": (
        lambda r: cluster(r).update(
            workerGroupSpecs=[{**group(r), "groupName": f"g{i}"} for i in range(8)]
        ),
        f"{CLUSTER}.workerGroupSpecs", "more than 7", ("kueue",),
    ),
    "two queues": (
        lambda r: r["RayJob"]["metadata"]["labels"].update({"volcano.sh/queue-name": "q"}),
        "metadata.labels", "two queues", ("kueue",),
    ),
    "KAI and a submitter": (
        lambda r: spec(r).update(submissionMode="K8sJobMode"),
        "spec.submissionMode", "KAI", ("kai",),
    ),
    "a request without a limit": (
        lambda r: first(head(r))["resources"]["limits"].pop("memory"),
        f"{HEAD}.containers[0].resources.limits.memory", "no limit", (),
    ),
    "a limit without a request": (
        lambda r: first(submitter(r))["resources"]["requests"].pop("cpu"),
        f"{SUBMITTER}.containers[0].resources.limits.cpu", "not requested", (),
    ),
    "less allowed than requested": (
        lambda r: first(head(r))["resources"]["limits"].update(cpu="1500m"),
        f"{HEAD}.containers[0].resources.limits.cpu", "less than", (),
    ),
    "fewer GPUs requested than allowed": (
        lambda r: first(worker(r))["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
        f"{WORKER}.containers[0].resources.limits.nvidia.com/gpu", "1 of nvidia.com/gpu", (),
    ),
    "half a GPU": (
        lambda r: [
            first(worker(r))["resources"][key].update({"nvidia.com/gpu": "500m"})
            for key in ("requests", "limits")
        ],
        f"{WORKER}.containers[0].resources.limits.nvidia.com/gpu", "500m of", (),
    ),
    "root": (
        lambda r: first(head(r))["securityContext"].update(runAsUser=0),
        f"{HEAD}.containers[0].securityContext.runAsNonRoot", "restricted", (),
    ),
    "a capability": (
        lambda r: first(worker(r))["securityContext"]["capabilities"].update(add=["IPC_LOCK"]),
        f"{WORKER}.containers[0].securityContext.capabilities", "restricted", (),
    ),
    "privilege escalation": (
        lambda r: first(submitter(r))["securityContext"].pop("allowPrivilegeEscalation"),
        f"{SUBMITTER}.containers[0].securityContext.allowPrivilegeEscalation", "restricted", (),
    ),
    "no seccomp profile": (
        lambda r: worker(r)["securityContext"].pop("seccompProfile"),
        f"{WORKER}.containers[0].securityContext.seccompProfile", "restricted", (),
    ),
    "a privileged container": (
        lambda r: first(head(r))["securityContext"].update(privileged=True),
        f"{HEAD}.containers[0].securityContext.privileged", "restricted", (),
    ),
    "a root that can be written": (
        lambda r: first(head(r))["securityContext"].update(readOnlyRootFilesystem=False),
        f"{HEAD}.containers[0].securityContext.readOnlyRootFilesystem", "can be written", (),
    ),
    "an init container without a security context": (
        lambda r: worker(r).update(
            initContainers=[{**first(worker(r)), "name": "before", "securityContext": {}}]
        ),
        f"{WORKER}.initContainers[0].securityContext.capabilities", "restricted", (),
    ),
    "the machine's network": (
        lambda r: worker(r).update(hostNetwork=True), f"{WORKER}.hostNetwork", "forbids", (),
    ),
    "no shared memory": (
        lambda r: without(worker(r), "shm"),
        f"{WORKER}.containers[0].volumeMounts", "no /dev/shm", (),
    ),
    "shared memory on a disk": (
        lambda r: volume(worker(r), "shm").update(emptyDir={"sizeLimit": "1Gi"}),
        f"{WORKER}.containers[0].volumeMounts", "no /dev/shm", (),
    ),
    "shared memory that takes all memory": (
        lambda r: volume(worker(r), "shm")["emptyDir"].update(sizeLimit="32Gi"),
        f"{WORKER}.containers[0].resources.limits.memory", "fills all", (),
    ),
    "no /tmp": (
        lambda r: without(submitter(r), "tmp"),
        f"{SUBMITTER}.containers[0].volumeMounts", "nothing can be written", (),
    ),
    "a mount without a volume": (
        lambda r: first(worker(r))["volumeMounts"].append({"name": "nfs", "mountPath": "/nfs"}),
        f"{WORKER}.containers[0].volumeMounts[4]", "no volume 'nfs'", (),
    ),
    "a volume that nobody mounts": (
        lambda r: head(r)["volumes"].append({"name": "spare", "emptyDir": {}}),
        f"{HEAD}.volumes[4]", "'spare'", (),
    ),
    "a configuration that is not there": (
        lambda r: r.pop("ConfigMap"), f"{HEAD}.volumes[1].configMap", "no ConfigMap", (),
    ),
    "a claim that is not there": (
        lambda r: volume(worker(r), "storage")["persistentVolumeClaim"].update(claimName="x"),
        f"{WORKER}.volumes[1].persistentVolumeClaim", "no PersistentVolumeClaim 'x'", (),
    ),
    "an account that is not there": (
        lambda r: head(r).update(serviceAccountName="x"),
        f"{HEAD}.serviceAccountName", "no ServiceAccount 'x'", (),
    ),
    "a head that trains": (
        lambda r: cluster(r)["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
        f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus", "on the head", (),
    ),
    "no time to drain and save": (
        lambda r: worker(r).update(terminationGracePeriodSeconds=60),
        f"{WORKER}.terminationGracePeriodSeconds", "may take 90 s", (),
    ),
    "a configuration that takes longer to save": (
        lambda r: r["ConfigMap"]["data"].update({"run.yaml": "recovery: {grace_s: 61}"}),
        f"{WORKER}.terminationGracePeriodSeconds", "may take 121 s", (),
    ),
    "an entrypoint that takes longer to save": (
        lambda r: entrypoint(r, "--log-format", "--set recovery.grace_s=90 --log-format"),
        f"{WORKER}.containers[0].env", "may take 90 s to save", (),
    ),
    "another Ray": (
        lambda r: cluster(r).update(rayVersion="2.9.0"),
        f"{CLUSTER}.rayVersion", "2.9.0", (),
    ),
    "an image without a version": (
        lambda r: first(worker(r)).update(image="registry:5000/babelray"),
        f"{WORKER}.containers[0].image", "no version", (),
    ),
    "the latest image": (
        lambda r: first(submitter(r)).update(image="babelray:latest"),
        f"{SUBMITTER}.containers[0].image", "no version", (),
    ),
    "an attempt that would not resume": (
        lambda r: entrypoint(r, "--start-or-resume ", ""),
        "spec.entrypoint", "refuse to begin", (),
    ),
    "words that a shell reads": (
        lambda r: entrypoint(r, "--name babelray", "--name $NAME"), "spec.entrypoint", "'$'", (),
    ),
    "a name that is too long": (
        lambda r: r["RayJob"]["metadata"].update(name="train-" + "a" * 42),
        "metadata.name", "48 characters", (),
    ),
    "a name that is none": (
        lambda r: r["RayJob"]["metadata"].update(name="1st.run"), "metadata.name", "right ones", (),
    ),
    "an annotation that nobody reads": (
        lambda r: r["RayJob"]["metadata"]["annotations"].update({"ray.io/ft-enable": "true"}),
        "metadata.annotations.ray.io/ft-enable", "nobody reads", (),
    ),
    "a token for the API server": (
        lambda r: worker(r).pop("automountServiceAccountToken"),
        f"{WORKER}.automountServiceAccountToken", "gets a token", (),
    ),
    "a token for the head": (
        lambda r: head(r).update(automountServiceAccountToken=True),
        f"{HEAD}.automountServiceAccountToken", "gets a token", (),
    ),
    "an autoscaler without rights": (
        lambda r: head(r).update(automountServiceAccountToken=False),
        f"{HEAD}.automountServiceAccountToken", "could not ask", ("elastic",),
    ),
    "an autoscaler without a security context": (
        lambda r: cluster(r)["autoscalerOptions"]["securityContext"].pop("capabilities"),
        f"{CLUSTER}.autoscalerOptions.securityContext.capabilities", "restricted", ("elastic",),
    ),
    "an autoscaler without /tmp": (
        lambda r: cluster(r)["autoscalerOptions"].pop("volumeMounts"),
        f"{CLUSTER}.autoscalerOptions.volumeMounts", "read-only", ("elastic",),
    ),
    "an autoscaler without limits": (
        lambda r: cluster(r)["autoscalerOptions"]["resources"].pop("limits"),
        f"{CLUSTER}.autoscalerOptions.resources.limits.cpu", "no limit", ("elastic",),
    ),
    "a token half switched on": (
        lambda r: variable(submitter(r), "RAY_AUTH_MODE", "disabled"),
        f"{SUBMITTER}.containers[0].env", "not 'token'", ("token-auth",),
    ),
    "a token mode that Ray chooses": (
        lambda r: first(head(r))["env"].pop(0),
        f"{HEAD}.containers[0].env", "not 'disabled'", (),
    ),
    "an autoscaler without the token": (
        lambda r: cluster(r)["autoscalerOptions"]["env"].pop(0),
        f"{CLUSTER}.autoscalerOptions.env", "not 'token'", ("elastic", "token-auth"),
    ),
    "a budget for nobody": (
        lambda r: r["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].update(
            {"ray.io/node-type": "driver"}
        ),
        "spec.selector", "no pod has", (),
    ),
    "a budget in per cent": (
        lambda r: r["PodDisruptionBudget"]["spec"].update(minAvailable="50%"),
        "spec.minAvailable", "whole number", (),
    ),
    "a policy for nobody": (
        lambda r: r["NetworkPolicy"]["spec"]["podSelector"].update(
            matchExpressions=[{"key": "ray.io/group", "operator": "In", "values": ["x"]}]
        ),
        "spec.podSelector", "no pod has", ("network-policy",),
    ),
    "a monitor for nobody": (
        lambda r: r["PodMonitor"]["spec"]["selector"]["matchLabels"].update(a="b"),
        "spec.selector", "no pod has", ("monitoring",),
    ),
    "a port that no container has": (
        lambda r: r["PodMonitor"]["spec"]["podMetricsEndpoints"][0].update(port="ray-metrics"),
        "spec.podMetricsEndpoints[0].port", "'ray-metrics'", ("monitoring",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_by_name(name):
    mutate, where, what, components = BROKEN[name]
    documents = rendering_of(*components)
    assert lint(list(documents.values())) == []
    mutate(documents)
    found = lint(list(documents.values()))
    assert [one for one in found if one.where == where and what in one.what], found
    assert all(one.mend for one in found)


ONLY_LINT = (
    "an unknown submission mode", "more at least than at most", "time to live without shutdown",
    "a mount without a volume", "Kueue's job not suspended", "a request without a limit", "root",
    "a submitter with another entrypoint",
)  # fmt: skip


@pytest.mark.parametrize("name", ONLY_LINT)
def test_no_schema_catches_it(name):
    """Or it would not be lint's to find."""
    mutate, _, _, components = BROKEN[name]
    documents = rendering_of(*components)
    mutate(documents)
    assert [problem for one in documents.values() for problem in schemas.problems(one)] == []


def test_a_problem_reads_as_one_line():
    problem = Problem("RayJob", "train-a", "spec.suspend", "it would start", "set it true")
    assert str(problem) == "RayJob train-a, spec.suspend: it would start; set it true"


def test_a_pod_of_ones_own_is_looked_at_too():
    (pod,) = rendering.kustomize(rendering.K8S / "toolbox")
    account = {"kind": "ServiceAccount", "metadata": {"name": "babelray"}}
    (missing,) = lint([pod, account])
    assert missing.where == "spec.volumes[0].persistentVolumeClaim"
    pod["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    assert len(lint([pod, account])) == 5
