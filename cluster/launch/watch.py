"""Follows a RayJob: what it waits for, what it writes, until it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from cluster.launch.kubectl import Kubectl, KubectlError
from cluster.launch.pod_logs import JobLog, Source, Stream
from cluster.launch.rayjob import (
    crashing,
    job_of,
    last_line,
    last_warning,
    queue_of,
    queue_reason,
    trouble,
)
from cluster.launch.target import Ended, Job, Kind, LogLine, Update, Waiting

# A cluster that does not answer for so long is reported as an error; it may come back before.
_PATIENCE_S = 600.0
# While the job runs its pods are looked at only now and then.
_POD_LOOK_S = 20.0
# After the job's end its last lines may still be on their way.
_LAST_LINES_S = 15.0
# A connection that says nothing may be dead without anybody knowing.
_SILENCE_S = 300.0
_TRANSIENT = frozenset({"no answer"})

Tell = Callable[[dict[str, Any], str, Kind], Job]


def readable(look: Callable[[], list[Any]]) -> list[Any]:
    """What there is to see; nothing where this user may not look or there is no such kind."""
    try:
        return look()
    except KubectlError as error:
        if error.trouble not in ("forbidden", "no such kind", "not found"):
            raise
        return []


def queue_message(kubectl: Kubectl, rayjob: dict[str, Any]) -> str:
    """Why a suspended job does not start."""
    workloads: list[Any] = []
    if queue_of(rayjob) is not None:
        workloads = readable(lambda: kubectl.list("workloads.kueue.x-k8s.io"))
    return queue_reason(rayjob, workloads)


def follow(
    kubectl: Kubectl,
    job: Job,
    tell: Tell,
    *,
    poll_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Update]:
    """What happens to a job until it is over.

    Raises:
        KubectlError: the cluster no longer lets us look, or has not answered for ten minutes.
    """
    watcher = _Watcher(kubectl, job, tell, poll_s, sleep, clock)
    try:
        yield from watcher.updates()
    finally:
        watcher.close()


class _Watcher:
    def __init__(
        self,
        kubectl: Kubectl,
        job: Job,
        tell: Tell,
        poll_s: float,
        sleep: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self.kubectl, self.job, self.tell = kubectl, job, tell
        self.poll_s, self.sleep, self.clock = poll_s, sleep, clock
        self.log = JobLog()
        self.stream: Stream | None = None
        self.finished: set[tuple[str, str]] = set()
        self.uid: str | None = None
        self.reason: str | None = None
        self.heard_at = self.answered_at = clock()
        self.looked_at = float("-inf")

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def updates(self) -> Iterator[Update]:
        while True:
            try:
                rayjob = self.kubectl.get("rayjobs.ray.io", self.job.id)
                if rayjob is None or self._is_another(rayjob):
                    yield from self._rest(None)
                    gone = "it was deleted" if rayjob is None else "another took its name"
                    yield Ended(replace(self.job, phase="stopped", message=gone))
                    return
                now = job_of(rayjob, self.job.run, self.job.kind)
                if now.is_over:
                    yield from self._rest(rayjob)
                    yield Ended(self.tell(rayjob, self.job.run, self.job.kind))
                    return
                yield from self._waits(now, rayjob)
                source = self._source(rayjob)
            except KubectlError as error:
                yield from self._unanswered(error)
                source = None
            else:
                self.answered_at = self.clock()
            yield from self._lines(source)

    def _is_another(self, rayjob: dict[str, Any]) -> bool:
        uid = rayjob["metadata"].get("uid")
        self.uid = self.uid or uid
        return bool(uid != self.uid)

    def _unanswered(self, error: KubectlError) -> Iterator[Update]:
        if error.trouble not in _TRANSIENT or self.clock() - self.answered_at > _PATIENCE_S:
            raise error
        yield from self._say(f"{error}; trying on, the job itself goes on")

    def _say(self, reason: str | None) -> Iterator[Update]:
        if reason is not None and reason != self.reason:
            yield Waiting(reason)
        self.reason = reason

    def _waits(self, now: Job, rayjob: dict[str, Any]) -> Iterator[Update]:
        attempt = f"attempt {now.attempt} of {now.attempts}: " if now.attempt > 1 else ""
        if now.phase == "queued":
            yield from self._say(attempt + (now.message or queue_message(self.kubectl, rayjob)))
        elif now.phase == "starting":
            reason = now.message or self._start(rayjob)
            yield from self._say(attempt + reason)
        elif self.clock() - self.looked_at >= _POD_LOOK_S:
            self.looked_at = self.clock()
            yield from self._say(self._pods(rayjob, while_running=True))

    def _start(self, rayjob: dict[str, Any]) -> str:
        status = rayjob.get("status") or {}
        if not status.get("jobDeploymentStatus"):
            warning = self._warning("RayJob", self.job.id)
            return warning or "KubeRay has not taken it up yet"
        reason = self._pods(rayjob)
        if reason is not None:
            return reason
        if status.get("jobDeploymentStatus") == "Running":
            return "the cluster is up; the job is handed in"
        return "the Ray cluster starts"

    def _pods(self, rayjob: dict[str, Any], *, while_running: bool = False) -> str | None:
        cluster = (rayjob.get("status") or {}).get("rayClusterName")
        if not cluster:
            return None
        pods = readable(lambda: self.kubectl.list("pods", labels=f"ray.io/cluster={cluster}"))
        if not while_running and rayjob["status"].get("jobDeploymentStatus") == "Running":
            submitter = f"job-name={self.job.id}"
            pods += readable(lambda: self.kubectl.list("pods", labels=submitter))
        if not pods:
            warning = None if while_running else self._warning("RayCluster", cluster)
            return f"the Ray cluster has no pods yet: {warning}" if warning else None
        found = trouble(pods)
        if found is None:
            return None
        reason, pod = found
        if crashed := crashing(pods):
            reason += self._last_words(*crashed)
        if pod is not None and (warning := self._warning("Pod", pod["metadata"]["name"])):
            reason += f"; {warning}"
        return reason

    def _warning(self, kind: str, name: str) -> str | None:
        chosen = f"--field-selector=involvedObject.kind={kind},involvedObject.name={name}"
        return last_warning(readable(lambda: self.kubectl.list("events", more=[chosen])))

    def _last_words(self, pod: str, container: str) -> str:
        for which in (["--previous"], []):
            try:
                text = self.kubectl.text(
                    "logs", pod, f"--container={container}", "--tail=5", *which
                )
            except KubectlError:
                continue
            if line := last_line(text):
                return f"; its log ends: {line}"
        return ""

    def _source(self, rayjob: dict[str, Any]) -> Source | None:
        """Where to read the log: the first pod whose lines have not all been read."""
        status = rayjob.get("status") or {}
        job_id, cluster = status.get("jobId"), status.get("rayClusterName")
        if not job_id or status.get("jobDeploymentStatus") not in ("Running", "Complete", "Failed"):
            return None
        by_exec = (rayjob.get("spec") or {}).get("submissionMode") == "HTTPMode"
        labels = f"job-name={self.job.id}"
        if by_exec:
            labels = f"ray.io/cluster={cluster},ray.io/node-type=head"
        pods = self.kubectl.list("pods", labels=labels)
        for pod in sorted(pods, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            metadata = pod["metadata"]
            phase = (pod.get("status") or {}).get("phase")
            if (job_id, metadata["uid"]) in self.finished or phase not in _READABLE:
                continue
            if by_exec and phase != "Running":
                continue
            return Source(str(job_id), metadata["name"], metadata["uid"], by_exec)
        return None

    def _lines(self, source: Source | None) -> Iterator[Update]:
        """Lines for about as long as a poll takes; sleeps where there is nothing to read."""
        if self.stream is None and source is not None:
            self._connect(source)
        if self.stream is None:
            self.sleep(self.poll_s)
            return
        deadline = self.clock() + self.poll_s
        while self.stream is not None and (left := deadline - self.clock()) > 0:
            yield from self._next(left)
        if self.stream is not None and self.clock() - self.heard_at > _SILENCE_S:
            self.close()  # and again from where it was

    def _connect(self, source: Source) -> None:
        self.stream = Stream(self.kubectl, source, self.log.begin(source))
        self.heard_at = self.clock()

    def _next(self, timeout_s: float) -> Iterator[Update]:
        assert self.stream is not None
        source = self.stream.source
        try:
            line = self.stream.next(timeout_s)
        except TimeoutError:
            return
        except EOFError:
            failed = self.stream.failed()
            self.close()
            is_gone = failed is not None and "not found" in failed
            if is_gone or (failed is None and not self._goes_on(source)):
                self.finished.add((source.job_id, source.uid))
            else:
                self.sleep(min(1.0, self.poll_s))
            return
        self.heard_at = self.clock()
        text = self.log.take(source, line)
        if text is not None:
            yield LogLine(text)

    def _goes_on(self, source: Source) -> bool:
        """Whether the pod may write more, so that the end of the stream was only a cut."""
        if source.by_exec:
            return False
        try:
            pod = self.kubectl.get("pods", source.pod)
        except KubectlError:
            return True
        return pod is not None and (pod.get("status") or {}).get("phase") == "Running"

    def _rest(self, rayjob: dict[str, Any] | None) -> Iterator[Update]:
        """The lines that are still to come of a job that is over."""
        deadline = self.clock() + _LAST_LINES_S
        while self.clock() < deadline:
            if self.stream is None:
                source = None
                if rayjob is not None:
                    try:
                        source = self._source(rayjob)
                    except KubectlError:
                        return
                if source is None:
                    return
                self._connect(source)
            yield from self._next(max(0.05, min(self.poll_s, deadline - self.clock())))


_READABLE = ("Running", "Succeeded", "Failed")
