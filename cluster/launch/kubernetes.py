"""Kubernetes as a place that takes jobs: a RayJob of KubeRay for each, through kubectl."""

from __future__ import annotations

import queue
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from cluster.checks import Check
from cluster.launch import pod_logs, watch
from cluster.launch.kubectl import Kubectl, KubectlError, complaint, ending
from cluster.launch.overlays import head_image, manifests_dir
from cluster.launch.rayjob import facts, is_ours, job_of, uses_tokens
from cluster.launch.render import COMPONENT_LABEL, Rendering, job_name, render, render_overlay
from cluster.launch.sizes import workers_of
from cluster.launch.target import (
    Job,
    Kind,
    Place,
    RemoteCommandError,
    Submission,
    Update,
)
from data_shards.errors import UserError

FIELD_MANAGER = "babelray"
_FORWARDING = re.compile(r"Forwarding from (127\.0\.0\.1:\d+) ->")
_DASHBOARD_PORT = 8265
_TOOLBOX = "babelray-toolbox"
_FORWARD_TIMEOUT_S = 20.0
# A RayJob that is deleted stops its job and takes its cluster along; pods have a grace period.
_DELETE_TIMEOUT_S = 240.0


class KubernetesTarget:
    """A namespace of a Kubernetes cluster with KubeRay.

    Args:
        place: where, and how large; context and namespace None are kubectl's current ones.
        kubectl: another way to call it, for tests.
        poll_s: how often the cluster is asked while a job is followed (seconds).
    """

    def __init__(
        self,
        place: Place,
        kubectl: Kubectl | None = None,
        *,
        poll_s: float = 2.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.place = place
        self.kubectl = kubectl or Kubectl(place.context, place.namespace)
        self._poll_s = poll_s
        self._sleep = sleep

    @property
    def storage(self) -> str:
        """The folder in the pods that all of them share."""
        return self.place.storage

    def describe(self) -> str:
        """Where that is, for a person."""
        there = self.kubectl if self.place.context else self._settled
        context = f"context {there.context}" if there.context else "the current context"
        namespace = there.namespace
        return f"Kubernetes, {context}" + (f", namespace {namespace}" if namespace else "")

    @cached_property
    def _settled(self) -> Kubectl:
        return self.kubectl.settled()

    @cached_property
    def _plain(self) -> Rendering:
        return render_overlay(self.place, "train", self.kubectl)

    def workers(self) -> str | None:
        """Nodes times GPUs (or CPUs, where there are none): "16", or "8:64" where elastic."""
        return workers_of(self._plain.group)

    def preflight(self, submission: Submission) -> Iterator[Check]:
        """What would keep the job from running, looked at before anything is changed."""
        from cluster.launch.preflight import cluster_checks

        rendering = render(self.place, submission, self.kubectl)
        yield from cluster_checks(self._for(rendering), rendering.documents)

    def render(self, submission: Submission) -> str:
        """The YAML that ``submit`` applies, from kustomize alone."""
        return render(self.place, submission, self.kubectl).text

    def _for(self, rendering: Rendering) -> Kubectl:
        """kubectl for the namespace that the manifests name, if they name one."""
        if self.kubectl.namespace is None and rendering.namespace is not None:
            return replace(self.kubectl, namespace=rendering.namespace)
        return self.kubectl

    @cached_property
    def _there(self) -> Kubectl:
        """kubectl for where the jobs are; an overlay of the user's may name the namespace."""
        if self.kubectl.namespace is not None or self.place.overlay is None:
            return self.kubectl
        if "/" not in self.place.overlay:
            return self.kubectl  # ours name none
        return self._for(self._plain)

    def find(self, run: str, kind: Kind = "train") -> Job | None:
        """The run's RayJob of that kind with its facts; None if there is none."""
        rayjob = self._rayjob(run, kind)
        if rayjob is None or not is_ours(rayjob, run):
            return None
        return self._told(rayjob, run, kind)

    def _rayjob(self, run: str, kind: Kind) -> dict[str, Any] | None:
        return self._there.get("rayjobs.ray.io", job_name(run, kind))

    def _told(self, rayjob: dict[str, Any], run: str, kind: Kind) -> Job:
        job = job_of(rayjob, run, kind)
        cluster = (rayjob.get("status") or {}).get("rayClusterName")
        pods: list[Any] = []
        if cluster and not job.is_over:
            pods = watch.readable(
                lambda: self._there.list("pods", labels=f"ray.io/cluster={cluster}")
            )
        if job.phase == "queued" and job.message is None:
            job = replace(job, message=watch.queue_message(self._there, rayjob))
        more = facts(rayjob, pods)
        if cluster and uses_tokens(rayjob) and not job.is_over:
            more += (("token of the dashboard", self._token_command(rayjob)),)
        return replace(job, facts=more)

    def _token_command(self, rayjob: dict[str, Any]) -> str:
        auth = rayjob["spec"]["rayClusterSpec"].get("authOptions") or {}
        secret = auth.get("secretName") or rayjob["status"]["rayClusterName"]
        get = self._there.for_person("get", "secret", secret, "-o", "jsonpath='{.data.auth_token}'")
        return f"{get} | base64 -d"

    def submit(self, submission: Submission) -> Job:
        """Apply the RayJob and what it needs; one that is over makes room for it.

        Storage claims that exist already are left as they are: most of them cannot be changed.
        From then on ``place`` names the context and the namespace, so that it can be found again
        when the user's configuration means others.
        """
        rendering = render(self.place, submission, self.kubectl)
        kubectl = self._for(rendering)
        name = rendering.name
        self._make_room(kubectl, name, submission)
        text = _without_present_claims(kubectl, rendering)
        apply = ["apply", "--server-side", f"--field-manager={FIELD_MANAGER}", "--filename=-"]
        kubectl.text(*apply, given=text)
        rayjob = kubectl.get("rayjobs.ray.io", name)
        if rayjob is None:
            raise UserError(f"the RayJob {name} was applied and is gone: somebody deletes it")
        settled = kubectl.settled()
        self.place = replace(self.place, context=settled.context, namespace=settled.namespace)
        return self._told(rayjob, submission.run, submission.kind)

    def _make_room(self, kubectl: Kubectl, name: str, submission: Submission) -> None:
        present = kubectl.get("rayjobs.ray.io", name)
        if present is None:
            return
        run, kind = submission.run, submission.kind
        if not is_ours(present, run):
            raise UserError(
                f"there is a RayJob {name} already that is not of the run {run}: choose another "
                f"--name, or look at it with `{kubectl.for_person('describe', 'rayjob', name)}`"
            )
        job = job_of(present, run, kind)
        if not job.is_over:
            raise UserError(
                f"the {_DOING[kind]} of {run} is {job.phase} already (RayJob {name}): follow it "
                f"with `babelray logs {run} --follow`, end it with `babelray stop {run}`"
            )
        self._delete(kubectl, name)

    def _delete(self, kubectl: Kubectl, name: str) -> None:
        """Delete a RayJob and wait for all that it owns."""
        kubectl.text(
            "delete", "rayjobs.ray.io", name, "--ignore-not-found", "--cascade=foreground",
            f"--timeout={_DELETE_TIMEOUT_S:g}s", timeout_s=_DELETE_TIMEOUT_S + 20,
        )  # fmt: skip
        # A submitter left behind would be taken for the new RayJob's: it has the same name.
        deadline = time.monotonic() + _DELETE_TIMEOUT_S
        label = f"ray.io/originated-from-cr-name={name}"
        while left := [*kubectl.list("rayclusters.ray.io", labels=label), *_job(kubectl, name)]:
            if time.monotonic() > deadline:
                names = ", ".join(f"{o['kind']} {o['metadata']['name']}" for o in left)
                raise UserError(
                    f"the old RayJob {name} is deleted, but {names} stays: see why with "
                    f"`{kubectl.for_person('describe', 'rayclusters')}`, then launch again"
                )
            self._sleep(self._poll_s)

    def follow(self, job: Job) -> Iterator[Update]:
        """What a job waits for, what it writes, and its end; through all its attempts."""
        return watch.follow(self._there, job, self._told, poll_s=self._poll_s, sleep=self._sleep)

    def run(self, run: str, arguments: Sequence[str]) -> Iterator[str]:
        """Run ``babelray`` in the run's head pod, or else in the toolbox; the lines it prints."""
        pod, container = self._head(run) or self._toolbox(run)
        command = ["exec", pod, f"--container={container}", "--", "babelray", *arguments]
        for line, status in pod_logs.remote_lines(self._there, command):
            if status is None:
                yield line
            elif status > 0:
                raise RemoteCommandError(status)
            elif status < 0:
                raise complaint(line, self._there)

    def _clusters(self, run: str) -> Iterator[tuple[dict[str, Any], str]]:
        kinds: tuple[Kind, ...] = ("train", "evaluate")
        for kind in kinds:
            rayjob = self._rayjob(run, kind)
            cluster = ((rayjob or {}).get("status") or {}).get("rayClusterName")
            if rayjob is not None and cluster and is_ours(rayjob, run):
                yield rayjob, str(cluster)

    def _head(self, run: str) -> tuple[str, str] | None:
        for _, cluster in self._clusters(run):
            labels = f"ray.io/cluster={cluster},ray.io/node-type=head"
            if pod := self._running(labels):
                return pod, "ray-head"
        return None

    def _running(self, labels: str) -> str | None:
        for pod in self._there.list("pods", labels=labels):
            is_leaving = pod["metadata"].get("deletionTimestamp")
            if (pod.get("status") or {}).get("phase") == "Running" and not is_leaving:
                return str(pod["metadata"]["name"])
        return None

    def _toolbox(self, run: str) -> tuple[str, str]:
        """The pod with the storage that stays after a run's end, if somebody started it.

        Raises:
            UserError: nobody did; the message has the commands.
        """
        if pod := self._running(f"{COMPONENT_LABEL}=toolbox"):
            return pod, "toolbox"
        rayjob = self._rayjob(run, "train") or self._rayjob(run, "evaluate")
        image = head_image(rayjob or self._plain.job)
        replace_it = self._there.for_person("replace", "--force", "-f", "-")
        wait = self._there.for_person("wait", "--for=condition=Ready", f"pod/{_TOOLBOX}")
        delete = self._there.for_person("delete", "pod", _TOOLBOX)
        raise UserError(
            f"no pod of {run} runs now, so nothing there can read its files. Start a small one "
            f"with the storage at {self.storage}, then give the same command again:\n"
            f"  kubectl kustomize {shlex.quote(str(manifests_dir() / 'toolbox'))} \\\n"
            f"    | kubectl set image --local -f - toolbox={shlex.quote(image)} -o yaml \\\n"
            f"    | {replace_it}\n"
            f"  {wait}\n"
            f"It ends by itself after eight hours, or with: {delete}"
        )

    def cancel(self, job: Job) -> None:
        """Delete the RayJob with its cluster, its configuration and its disruption budget."""
        self._delete(self._there, job.id)
        try:
            self._there.text(
                "delete", "configmaps,poddisruptionbudgets.policy", "--ignore-not-found",
                f"--selector=app.kubernetes.io/instance={job.id}",
            )  # fmt: skip
        except KubectlError as error:
            if error.trouble != "forbidden":  # left-overs that cost nothing
                raise

    @contextmanager
    def dashboard(self, run: str) -> Iterator[str]:
        """The URL of a port on this machine that leads to the run's Ray dashboard."""
        for _, cluster in self._clusters(run):
            found = self._there.get("rayclusters.ray.io", cluster)
            if found is not None:
                head = (found.get("status") or {}).get("head") or {}
                service = head.get("serviceName") or f"{cluster}-head-svc"
                break
        else:
            raise UserError(
                f"{run} has no Ray cluster now, so there is no dashboard: its cluster goes when "
                "the job is over; the run's files tell what happened"
            )
        arguments = ["port-forward", "--address=127.0.0.1", f"service/{service}"]
        process = self._there.lasting(*arguments, f":{_DASHBOARD_PORT}")
        with ending(process):
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.put(line)
                lines.put(None)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            try:
                yield f"http://{_forwarded(lines, self._there)}"
            finally:
                process.terminate()
                reader.join(timeout=5)


_DOING: dict[Kind, str] = {"train": "training", "evaluate": "evaluation", "doctor": "check"}


def _forwarded(lines: queue.SimpleQueue[str | None], kubectl: Kubectl) -> str:
    """The local address that port-forward chose."""
    said = ""
    deadline = time.monotonic() + _FORWARD_TIMEOUT_S
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            raise complaint(said, kubectl)
        if found := _FORWARDING.search(line):
            return found[1]
        said += line
    raise UserError(
        f"kubectl port-forward did not come up within {_FORWARD_TIMEOUT_S:g} s: {said.strip()}"
    )


def _job(kubectl: Kubectl, name: str) -> list[dict[str, Any]]:
    """The submitter's Job, if it is there and may be looked at."""
    found = watch.readable(lambda: [kubectl.get("jobs.batch", name)])
    return [job for job in found if job is not None]


def _without_present_claims(kubectl: Kubectl, rendering: Rendering) -> str:
    claims = [d["metadata"]["name"] for d in rendering.documents if d["kind"] == _CLAIM]
    present = {name for name in claims if kubectl.get(_CLAIM.lower(), name) is not None}
    if not present:
        return rendering.text
    kept = [
        text
        for text, document in zip(rendering.parts, rendering.documents, strict=True)
        if not (document["kind"] == _CLAIM and document["metadata"]["name"] in present)
    ]
    return "---\n".join(kept)


_CLAIM = "PersistentVolumeClaim"
