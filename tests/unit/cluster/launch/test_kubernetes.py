"""Kubernetes as a target, against a fake kubectl: every way a job can go."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch import kubernetes, watch
from cluster.launch.kubectl import KubectlError
from cluster.launch.kubernetes import KubernetesTarget
from cluster.launch.pod_logs import JobLog, Source
from cluster.launch.rayjob import job_of
from cluster.launch.target import (
    Ended,
    Job,
    LogLine,
    Place,
    RemoteCommandError,
    Submission,
    Update,
    Waiting,
)
from data_shards.errors import UserError
from tests.kubernetes import FakeCluster, pod, rayjob

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on PATH")
CLUSTER = {"ray.io/cluster": "c1"}
TOOLBOX = {"app.kubernetes.io/component": "toolbox"}
SUBMITTER = {"job-name": "train-demo"}
RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING", "jobId": "j1"}
RUNNING["rayClusterName"] = "c1"
STARTING = {"jobDeploymentStatus": "Initializing", "jobId": "j1", "rayClusterName": "c1"}
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED", "jobId": "j1"}
KEY = "rayjobs.ray.io/train-demo"


# The same in every test, and kustomize takes its time.
_render = functools.cache(kubernetes.render)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    monkeypatch.setattr(kubernetes, "render", _render)
    return FakeCluster(tmp_path, monkeypatch)


@pytest.fixture
def target() -> KubernetesTarget:
    where = Place("kubernetes", "/mnt/babelray", namespace="team", overlay="cpu-smoke", nodes="2")
    return KubernetesTarget(where, poll_s=0.05, sleep=lambda seconds: None)


def training() -> Submission:
    arguments = ("train", "--name", "demo", "--workers", "2", "--start-or-resume")
    return Submission("demo", "train", arguments, "trainer: {max_steps: 3}\n")


def job() -> Job:
    return Job("demo", "train", "train-demo", "starting")


def texts(updates: list[Update]) -> list[str]:
    return [update.text for update in updates if isinstance(update, LogLine)]


def reasons(updates: list[Update]) -> list[str]:
    return [update.reason for update in updates if isinstance(update, Waiting)]


def ended(updates: list[Update]) -> Job:
    assert isinstance(updates[-1], Ended)
    return updates[-1].job


def stamped(*numbers: int) -> str:
    return "".join(f"2026-11-23T03:00:{number:02d}.5Z line {number}\n" for number in numbers)


def first_reason(target: KubernetesTarget) -> str:
    """What the job waits for; whoever stops listening leaves it as it is."""
    updates = target.follow(job())
    update = next(iter(updates))
    updates.close()  # type: ignore[attr-defined]
    assert isinstance(update, Waiting)
    return update.reason


# How far a job is.


@pytest.mark.parametrize(
    ("status", "spec", "phase", "message", "attempt"),
    [
        ({}, {}, "starting", None, 1),
        ({}, {"suspend": True}, "queued", None, 1),
        ({"jobDeploymentStatus": "Suspended"}, {"suspend": True}, "queued", None, 1),
        ({"jobDeploymentStatus": "Initializing"}, {}, "starting", None, 1),
        ({"jobDeploymentStatus": "Running"}, {}, "starting", None, 1),
        (RUNNING, {}, "running", None, 1),
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, {}, "running", None, 1),
        (
            {"jobDeploymentStatus": "Retrying", "failed": 1, "reason": "AppFailed", "message": "m"},
            {},
            "starting",
            "the attempt before failed (AppFailed: m)",
            2,
        ),
        ({**RUNNING, "failed": 2}, {}, "running", None, 3),
        (DONE, {}, "succeeded", None, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, {}, "stopped", None, 1),
        (
            {"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "failed": 3},
            {},
            "failed",
            "DeadlineExceeded: spec.activeDeadlineSeconds has passed",
            3,
        ),
        (
            {"jobDeploymentStatus": "Validation Failed", "message": "bad name"},
            {},
            "failed",
            "bad name",
            1,
        ),
    ],
)
def test_how_far_a_job_is(
    status: dict[str, Any], spec: dict[str, Any], phase: str, message: str | None, attempt: int
) -> None:
    value = rayjob(**status)
    value["spec"].update(spec)
    found = job_of(value, "demo", "train")
    assert (found.phase, found.attempt, found.attempts) == (phase, attempt, 3)
    assert found.is_over == (phase in {"succeeded", "failed", "stopped"})
    assert found.message == message


def test_a_job_that_somebody_suspended(fake: FakeCluster, target: KubernetesTarget) -> None:
    value = rayjob(jobDeploymentStatus="Suspended")
    value["spec"]["suspend"] = True
    fake.put("rayjobs.ray.io", value)
    found = target.find("demo")
    assert found is not None
    assert (found.message or "").startswith("suspended (spec.suspend)")


def test_what_there_is_to_tell(fake: FakeCluster, target: KubernetesTarget) -> None:
    value = rayjob(**RUNNING, startTime="2026-11-23T03:00:00Z")
    template = {"spec": {"containers": [{"image": "babelray:1"}]}}
    value["spec"]["rayClusterSpec"] = {
        "headGroupSpec": {"template": template},
        "authOptions": {"mode": "token"},
    }
    fake.put("rayjobs.ray.io", value)
    fake.put("pods", pod("head", ready=True, labels=CLUSTER), pod("worker", labels=CLUSTER))
    found = target.find("demo")
    assert found is not None
    facts = dict(found.facts)
    assert facts["pods"] == "1 of 2 ready"
    assert facts["Ray cluster"] == "c1"
    assert facts["image"] == "babelray:1"
    assert "get secret c1" in facts["token of the dashboard"]
    assert target.find("other") is None


def test_another_runs_job_is_not_found(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(run="somebody-elses", **RUNNING))
    assert target.find("demo") is None


def test_looking_without_rights_says_which(fake: FakeCluster, target: KubernetesTarget) -> None:
    said = 'User "eve" cannot get resource "rayjobs" in API group "ray.io" in the namespace "team"'
    fake.rule("get rayjobs", err=f"Error from server (Forbidden): x is forbidden: {said}", rc=1)
    with pytest.raises(UserError, match=r"you may not get rayjobs\.ray\.io in the namespace team"):
        target.find("demo")


# Handing a job over.


@needs_kubectl
def test_a_job_is_applied_as_rendered(fake: FakeCluster, target: KubernetesTarget) -> None:
    assert target.workers() == "2"
    submitted = target.submit(training())
    assert (submitted.id, submitted.phase) == ("train-demo", "starting")
    assert fake.applied == target.render(training())
    [call] = fake.called(" apply ")
    assert "--server-side --field-manager=babelray --filename=-" in call


@needs_kubectl
def test_a_job_that_is_over_makes_room(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(**DONE))
    left = {"kind": "RayCluster", "metadata": {"name": "c1"}}
    fake.rule("get rayclusters", out=f'{{"items": [{left!r}]}}'.replace("'", '"'), times=2)
    target.submit(training())
    [deletion] = fake.called("delete rayjobs.ray.io train-demo")
    assert "--cascade=foreground" in deletion
    assert len(fake.called("get rayclusters.ray.io", "originated-from-cr-name=train-demo")) == 3
    assert fake.calls.index(deletion) < fake.calls.index(fake.called(" apply ")[0])


@needs_kubectl
def test_a_storage_claim_that_is_there_is_left_alone(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.put("persistentvolumeclaim", {"metadata": {"name": "babelray"}})
    target.submit(training())
    kinds = {document["kind"] for document in yaml.safe_load_all(fake.applied)}
    assert "PersistentVolumeClaim" not in kinds
    assert {"RayJob", "ConfigMap", "ServiceAccount"} <= kinds


@needs_kubectl
@pytest.mark.parametrize(
    ("present", "message"),
    [
        (rayjob(**RUNNING), "the training of demo is running already .*babelray logs demo"),
        (rayjob(run="other", **DONE), "a RayJob train-demo already that is not of the run demo"),
    ],
)
def test_a_name_that_is_taken(
    fake: FakeCluster, target: KubernetesTarget, present: dict[str, Any], message: str
) -> None:
    fake.put("rayjobs.ray.io", present)
    with pytest.raises(UserError, match=message):
        target.submit(training())
    assert not fake.called(" apply ")
    assert not fake.called(" delete ")


@needs_kubectl
def test_a_refusal_is_told_in_the_api_servers_words(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.rule(" apply ", err='The RayJob "train-demo" is invalid: spec.x: Invalid value\n', rc=1)
    with pytest.raises(UserError, match=r"spec\.x: Invalid value"):
        target.submit(training())


@needs_kubectl
def test_the_check_before_a_launch(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.rule("get --raw /version", err="The connection to the server x was refused", rc=1)
    found = {check.name: check.outcome for check in target.preflight(training())}
    assert found == {"kubectl": "ok", "cluster": "failure"}


# What it waits for.


def test_pods_that_find_no_gpus(fake: FakeCluster, target: KubernetesTarget) -> None:
    said = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    fake.put("rayjobs.ray.io", rayjob(**STARTING))
    waiting = pod("w", phase="Pending", labels=CLUSTER, unscheduled=said)
    fake.put("pods", pod("h", ready=True, labels=CLUSTER), waiting)
    assert first_reason(target) == f"1 of 2 pods are ready; w: no node takes it: {said}"


@pytest.mark.parametrize(
    ("state", "more", "reason"),
    [
        (
            {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}},
            {},
            "the image reg.test/babelray:1 cannot be pulled (ImagePullBackOff)",
        ),
        (
            {"waiting": {"reason": "ErrImagePull", "message": "not found"}},
            {},
            "the image reg.test/babelray:1 cannot be pulled (ErrImagePull): not found",
        ),
        (
            {"waiting": {"reason": "CreateContainerConfigError", "message": "no secret x"}},
            {},
            "CreateContainerConfigError: no secret x",
        ),
        (
            {"waiting": {"reason": "CrashLoopBackOff"}},
            {"lastState": {"terminated": {"exitCode": 3}}},
            "the container ray-worker ends with exit status 3 again and again; "
            "its log ends: no such option",
        ),
        (
            {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            {},
            "the container ray-worker was killed for want of memory (OOMKilled); "
            "its log ends: no such option",
        ),
        (
            {"waiting": {"reason": "ContainerCreating"}},
            {},
            "its containers are made (the image is pulled, volumes are mounted); "
            "FailedMount: no claim",
        ),
    ],
)
def test_pods_that_do_not_start(
    fake: FakeCluster,
    target: KubernetesTarget,
    state: dict[str, Any],
    more: dict[str, Any],
    reason: str,
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**STARTING))
    fake.put("pods", pod("w", phase="Pending", labels=CLUSTER, state=state, **more))
    event = {"metadata": {"name": "e"}, "type": "Warning", "reason": "FailedMount"}
    fake.put("events", {**event, "message": "no claim", "involvedObject": {"name": "w"}})
    fake.rule("logs w .*--tail", out="starting\nno such option\n\n")
    assert first_reason(target) == f"0 of 1 pods are ready; w: {reason}"


def test_a_quota_that_lets_no_pod_in(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(**STARTING))
    event = {"metadata": {"name": "e"}, "type": "Warning", "reason": "FailedCreate"}
    fake.put("events", {**event, "message": "exceeded quota", "involvedObject": {"name": "c1"}})
    assert first_reason(target).endswith("no pods yet: FailedCreate: exceeded quota")


def test_a_job_in_a_queue(fake: FakeCluster, target: KubernetesTarget) -> None:
    value = rayjob(jobDeploymentStatus="Suspended")
    value["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "research"
    fake.put("rayjobs.ray.io", value)
    condition = {
        "type": "QuotaReserved",
        "status": "False",
        "message": "insufficient quota for gpu",
    }
    metadata = {"name": "w1", "ownerReferences": [{"uid": "u1"}]}
    fake.put(
        "workloads.kueue.x-k8s.io", {"metadata": metadata, "status": {"conditions": [condition]}}
    )
    assert first_reason(target) == "queued in research: insufficient quota for gpu"
    fake.rule("get workloads", err='the server doesn\'t have a resource type "workloads"', rc=1)
    assert first_reason(target) == "queued in research"


def test_an_operator_that_does_nothing(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob())
    assert first_reason(target) == "KubeRay has not taken it up yet"


# Following it to its end.


def test_lines_until_it_is_done(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("s", labels=SUBMITTER, phase="Succeeded"))
    fake.rule("logs s", out=stamped(1, 2), set={KEY: rayjob(**DONE)})
    updates = list(target.follow(job()))
    assert texts(updates) == ["line 1", "line 2"]
    assert ended(updates).phase == "succeeded"


def test_a_job_that_failed_says_why(fake: FakeCluster, target: KubernetesTarget) -> None:
    why = {"reason": "AppFailed", "message": "exit code 1, " + "x " * 400, "failed": 3}
    fake.put("rayjobs.ray.io", rayjob(jobDeploymentStatus="Failed", jobStatus="FAILED", **why))
    [update] = target.follow(job())
    assert isinstance(update, Ended)
    assert (update.job.phase, update.job.attempt) == ("failed", 3)
    assert (update.job.message or "").startswith("AppFailed: exit code 1, x x")
    assert len(update.job.message or "") < 330


def test_a_cut_connection_loses_and_repeats_nothing(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("s", labels=SUBMITTER))
    twins = "2026-11-23T03:00:02.5Z twin\n"
    fake.rule("logs s", out=stamped(1) + twins + twins, times=1, rc=1, err="unexpected EOF")
    # The server's grain is a second: what came at the last moment comes again.
    rest = twins * 3 + stamped(3)
    over = {KEY: rayjob(**DONE), "pods/s": pod("s", labels=SUBMITTER, phase="Succeeded")}
    fake.rule("logs s .*--since-time=2026-11-23T03:00:02.5Z", out=rest, set=over)
    updates = list(target.follow(job()))
    assert texts(updates) == ["line 1", "twin", "twin", "twin", "line 3"]
    assert ended(updates).phase == "succeeded"


def test_a_new_submitter_of_the_same_attempt_repeats_nothing(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("s1", labels=SUBMITTER, phase="Failed"))
    second = pod("s2", labels=SUBMITTER, phase="Succeeded")
    fake.rule("logs s1", out=stamped(1, 2), set={"pods/s2": second})
    again = stamped(1, 2, 3).replace("03:00", "03:07")
    fake.rule("logs s2", out=again, set={KEY: rayjob(**DONE)})
    assert texts(list(target.follow(job()))) == ["line 1", "line 2", "line 3"]


def test_a_second_attempt(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("s1", labels=SUBMITTER, phase="Failed"))
    retrying = {"jobDeploymentStatus": "Retrying", "failed": 1, "reason": "AppFailed"}
    fake.rule("logs s1", out=stamped(1), set={KEY: rayjob(**retrying), "pods/s1": None})
    second = {**RUNNING, "jobId": "j2", "failed": 1}
    new = {KEY: rayjob(**second), "pods/s2": pod("s2", labels=SUBMITTER, phase="Succeeded")}
    fake.rule("get rayjobs", out=json.dumps(rayjob(**retrying)), set=new, when=[KEY, "Retrying"])
    last = {**DONE, "jobId": "j2", "failed": 1}
    fake.rule("logs s2", out=stamped(1), set={KEY: rayjob(**last)})
    updates = list(target.follow(job()))
    assert texts(updates) == ["line 1", "line 1"]  # the new attempt's own
    assert reasons(updates) == ["attempt 2 of 3: the attempt before failed (AppFailed)"]
    assert ended(updates).attempt == 2


def test_a_job_that_no_pod_hands_in(fake: FakeCluster, target: KubernetesTarget) -> None:
    value, done = rayjob(**RUNNING), rayjob(**DONE)
    value["spec"]["submissionMode"] = done["spec"]["submissionMode"] = "HTTPMode"
    fake.put("rayjobs.ray.io", value)
    fake.put("pods", pod("h", ready=True, labels={**CLUSTER, "ray.io/node-type": "head"}))
    command = "exec h --container=ray-head -- ray job logs .*--follow j1"
    fake.rule(command, out="a\nb\n", rc=1, err="error: lost connection to pod", times=1)
    fake.rule(command, out="a\nb\nb\nc\n", set={KEY: done})
    assert texts(list(target.follow(job()))) == ["a", "b", "b", "c"]


@pytest.mark.parametrize(
    ("after", "message"), [(None, "it was deleted"), ("u2", "another took its name")]
)
def test_a_job_that_goes_away(
    fake: FakeCluster, target: KubernetesTarget, after: str | None, message: str
) -> None:
    new = rayjob(uid=after, **STARTING) if after else None
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.rule("get pods .*job-name", out='{"items": []}', set={KEY: new})
    last = ended(list(target.follow(job())))
    assert (last.phase, last.message) == ("stopped", message)


def test_a_cluster_out_of_reach_for_a_while(
    fake: FakeCluster, target: KubernetesTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**DONE))
    refused = "The connection to the server k8s.test was refused - did you specify"
    fake.rule("get rayjobs", err=refused, rc=1, times=2)
    waiting, last = target.follow(job())
    assert isinstance(waiting, Waiting)
    assert "does not answer" in waiting.reason
    assert isinstance(last, Ended)
    monkeypatch.setattr(watch, "_PATIENCE_S", -1.0)
    fake.rule("get rayjobs", err=refused, rc=1)
    with pytest.raises(KubectlError, match="does not answer"):
        list(target.follow(job()))


def test_losing_the_right_to_look_ends_it(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.rule("get rayjobs", err="error: You must be logged in to the server", rc=1)
    with pytest.raises(KubectlError, match="sign in again"):
        list(target.follow(job()))


def test_whoever_stops_listening_ends_only_their_own_kubectl(
    fake: FakeCluster, target: KubernetesTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("s", labels=SUBMITTER))
    fake.rule("logs s", out=stamped(1), hang=True)
    started = []
    make = watch.Stream

    def kept(*arguments: Any) -> Any:
        started.append(make(*arguments))
        return started[-1]

    monkeypatch.setattr(watch, "Stream", kept)
    updates = target.follow(job())
    assert next(iter(updates)) == LogLine("line 1")
    with pytest.raises(KeyboardInterrupt):
        updates.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert started[0]._process.returncode is not None
    assert not fake.called(" delete ")


def test_time_stamps_of_unequal_length() -> None:
    log, source = JobLog(), Source("j", "p", "u")
    assert "--since-time" not in " ".join(log.begin(source))
    assert log.take(source, "2026-11-23T03:00:01.9Z a") == "a"
    assert log.take(source, "2026-11-23T03:00:01.95Z ") == ""
    assert log.begin(source)[-1] == "--since-time=2026-11-23T03:00:01.95Z"
    assert log.take(source, "2026-11-23T03:00:01.9Z a") is None
    assert log.take(source, "2026-11-23T03:00:01.95Z ") is None
    assert log.take(source, "2026-11-23T03:00:01.951Z b") == "b"


# Commands on the cluster.


def head(fake: FakeCluster) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("pods", pod("h", labels={**CLUSTER, "ray.io/node-type": "head"}))


def test_a_command_on_the_head(fake: FakeCluster, target: KubernetesTarget) -> None:
    head(fake)
    fake.rule("exec h --container=ray-head -- babelray status --run demo", out="one\ntwo\n")
    assert list(target.run("demo", ["status", "--run", "demo"])) == ["one", "two"]


def test_a_command_that_fails_there(fake: FakeCluster, target: KubernetesTarget) -> None:
    head(fake)
    fake.rule("exec h", out="no run\n", err="command terminated with exit code 2\n", rc=2, times=1)
    fake.rule("exec h", err="Error from server: error dialing backend: x\n", rc=1)
    lines = target.run("demo", ["status"])
    assert next(lines) == "no run"
    with pytest.raises(RemoteCommandError) as caught:
        next(lines)
    assert caught.value.exit_status == 2
    with pytest.raises(KubectlError, match="does not answer"):
        list(target.run("demo", ["status"]))


def over_with_image(image: str) -> dict[str, Any]:
    value = rayjob(**DONE)
    template = {"spec": {"containers": [{"image": image}]}}
    value["spec"]["rayClusterSpec"] = {"headGroupSpec": {"template": template}}
    return value


@needs_kubectl
def test_no_machine_to_run_a_command_on(
    fake: FakeCluster, target: KubernetesTarget, tmp_path: Path
) -> None:
    image = "reg.test/babelray@sha256:" + "a" * 64
    fake.put("rayjobs.ray.io", over_with_image(image))
    leaving = pod("h", labels={**CLUSTER, "ray.io/node-type": "head"}, phase="Succeeded")
    fake.put("pods", leaving, pod("t", labels=TOOLBOX, phase="Pending"))
    with pytest.raises(UserError, match="no pod of demo runs now") as caught:
        list(target.run("demo", ["status"]))
    # The commands do what they say, all but the cluster's part.
    lines = str(caught.value).splitlines()
    command = "\n".join(lines[1:4])
    assert "kubectl -n team replace --force -f -" in command
    made = tmp_path / "toolbox.yaml"
    command = command.replace("kubectl -n team replace --force -f -", f"cat > {made}")
    command = command.replace("kubectl ", f"{os.environ['REAL_KUBECTL']} ")
    subprocess.run(["bash", "-ec", f"set -o pipefail\n{command}"], check=True)
    toolbox = yaml.safe_load(made.read_text())
    assert toolbox["metadata"]["name"] == "babelray-toolbox"
    assert toolbox["metadata"]["labels"].items() >= TOOLBOX.items()
    assert [c["image"] for c in toolbox["spec"]["containers"]] == [image]
    assert lines[4] == "  kubectl -n team wait --for=condition=Ready pod/babelray-toolbox"


def test_after_the_end_the_toolbox_runs_commands(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**DONE))
    fake.put("pods", pod("babelray-toolbox", labels=TOOLBOX))
    fake.rule("exec babelray-toolbox --container=toolbox -- babelray status", out="one\n")
    assert list(target.run("demo", ["status"])) == ["one"]


def test_cancelling_takes_all_along(fake: FakeCluster, target: KubernetesTarget) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    said = 'User "eve" cannot delete resource "configmaps" in API group "" in the namespace "team"'
    fake.rule("delete configmaps", err=f"x is forbidden: {said}", rc=1)  # left-overs do no harm
    target.cancel(job())
    assert target.find("demo") is None
    assert fake.called("delete configmaps", "app.kubernetes.io/instance=train-demo")


def test_the_dashboard_on_a_port_of_this_machine(
    fake: FakeCluster, target: KubernetesTarget
) -> None:
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    head_status = {"head": {"serviceName": "c1-head-svc"}}
    fake.put("rayclusters.ray.io", {"metadata": {"name": "c1"}, "status": head_status})
    line = "Forwarding from 127.0.0.1:43211 -> 8265\n"
    fake.rule("port-forward --address=127.0.0.1 service/c1-head-svc :8265", out=line, hang=True)
    with target.dashboard("demo") as url:
        assert url == "http://127.0.0.1:43211"
        assert urllib.request.Request(url).host == "127.0.0.1:43211"


def test_a_dashboard_that_does_not_come(fake: FakeCluster, target: KubernetesTarget) -> None:
    with pytest.raises(UserError, match="no Ray cluster now"), target.dashboard("demo"):
        pass
    fake.put("rayjobs.ray.io", rayjob(**RUNNING))
    fake.put("rayclusters.ray.io", {"metadata": {"name": "c1"}})
    fake.rule("port-forward", err="error: services c1-head-svc: (NotFound)\n", rc=1)
    with pytest.raises(UserError, match="c1-head-svc"), target.dashboard("demo"):
        pass
    assert "context" in target.describe()


# Where it is, when the user's configuration means another place later.


@needs_kubectl
def test_the_place_of_a_launch_is_settled(fake: FakeCluster) -> None:
    where = Place("kubernetes", "/mnt/babelray", overlay="cpu-smoke", nodes="2")
    target = KubernetesTarget(where, poll_s=0.05, sleep=lambda seconds: None)
    assert target.describe() == "Kubernetes, context prod, namespace team"
    target.submit(training())
    assert (target.place.context, target.place.namespace) == ("prod", "team")
    again = KubernetesTarget(target.place)
    assert again.describe() == "Kubernetes, context prod, namespace team"
    again.find("demo")
    assert "--context=prod --namespace=team get rayjobs.ray.io" in fake.calls[-1]


def test_a_pod_has_no_context_to_settle(fake: FakeCluster) -> None:
    fake.rule("config view", err="error: current-context must exist in order to minify", rc=1)
    target = KubernetesTarget(Place("kubernetes", "/mnt/babelray", overlay="cpu-smoke"))
    assert target.describe() == "Kubernetes, the current context"
