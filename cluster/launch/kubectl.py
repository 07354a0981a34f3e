"""Runs kubectl, and says what it complains of as one message with the mend.

kubectl brings the user's way of signing in, proxies and contexts with it. No shell is involved,
nothing is asked for (standard input is closed), and every call has an end.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_shards.errors import UserError

# conflict: another field manager owns a field; refused: the API server said no, in its words.
Trouble = Literal[
    "not installed", "no context", "no answer", "not signed in", "forbidden", "not found",
    "no such kind", "conflict", "refused",
]  # fmt: skip

# One request; kubectl tries several for a server it does not know yet.
REQUEST_TIMEOUT_S = 10
_TIMEOUT_S = 40.0

_NO_CONTEXT = re.compile(
    r"current-context must exist|no configuration has been provided|"
    r"connection to the server localhost:8080 was refused|invalid configuration"
)
_WRONG_CONTEXT = re.compile(r"context was not found|context \S+ does not exist")
_BAD_FILE = re.compile(r"error loading config file")
_NO_ANSWER = re.compile(
    r"connection to the server \S+ was refused|Unable to connect to the server|dial tcp|"
    r"no such host|i/o timeout|Client\.Timeout|deadline exceeded|TLS handshake timeout|"
    r"connection refused|connection reset|network is unreachable|unexpected EOF|"
    r"ServiceUnavailable|currently unable to handle the request|error dialing backend|"
    r"lost connection to pod|x509:"
)
_NOT_SIGNED_IN = re.compile(
    r"must be logged in|Unauthorized|provide credentials|getting credentials|Please enter Username"
)
_FORBIDDEN = re.compile(
    r'cannot (?P<verb>\w+) resource "(?P<resource>[^"]+)"(?: in API group "(?P<group>[^"]*)")?'
    r'(?:.*? in the namespace "(?P<namespace>[^"]+)")?'
)
_NO_KIND = re.compile(
    r"doesn't have a resource type \"?(\S+?)\"?$|no matches for kind \"(\S+)\"", re.M
)
_FAILED = re.compile(r'^E\d{4} .*"command failed" err="(.*)"$', re.MULTILINE)
_NOISE = re.compile(r"^(?:[EWI]\d{4} .*|Warning: .*|Please enter Username:\s*)$", re.MULTILINE)


class KubectlError(UserError):
    """What kubectl complained of, and the mend."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.trouble = trouble


@dataclass(frozen=True)
class Kubectl:
    """kubectl for one context and namespace; None leaves the choice to the user's configuration.

    ``timeout_s`` bounds each call that has an answer (seconds).
    """

    context: str | None = None
    namespace: str | None = None
    program: str = "kubectl"
    timeout_s: float = _TIMEOUT_S

    def command(self, *arguments: str) -> list[str]:
        """The words of a call, for this context and namespace."""
        place = []
        if self.context:
            place.append(f"--context={self.context}")
        if self.namespace:
            place.append(f"--namespace={self.namespace}")
        return [self.program, *place, *arguments]

    def for_person(self, *arguments: str) -> str:
        """The same call as a person would type it."""
        place = f" --context {self.context}" if self.context else ""
        place += f" -n {self.namespace}" if self.namespace else ""
        return f"kubectl{place} {' '.join(arguments)}"

    def text(
        self, *arguments: str, given: str | None = None, timeout_s: float | None = None
    ) -> str:
        """What a call prints.

        Raises:
            KubectlError: it failed, or gave no answer in time.
        """
        done = self._run(arguments, given, timeout_s or self.timeout_s)
        if done.returncode != 0:
            raise complaint(f"{done.stdout[-200:]}\n{done.stderr}", self)
        return done.stdout

    def _run(
        self, arguments: Sequence[str], given: str | None, timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        request = [f"--request-timeout={REQUEST_TIMEOUT_S}s"]
        if arguments[0] in ("kustomize", "config", "delete", "apply"):
            request = []  # these reach no server, or may wait on purpose
        try:
            return subprocess.run(
                [*self.command(*arguments), *request],
                # An empty input: nothing may be asked for.
                input=given or "",
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise not_installed(self.program) from None
        except subprocess.TimeoutExpired:
            raise KubectlError(
                "no answer",
                f"kubectl {arguments[0]} gave no answer within {timeout_s:g} s: is the cluster "
                f"within reach? try it yourself: {self.for_person('get', '--raw', '/version')}",
            ) from None

    def settled(self) -> Kubectl:
        """The same, with the context and namespace that the user's configuration means now.

        In a pod there is no such configuration, and nothing to settle.
        """
        try:
            view = self.json("config", "view", "--minify", "--output=json")
        except KubectlError:
            return self
        contexts = view.get("contexts") or [{}]
        namespace = (contexts[0].get("context") or {}).get("namespace")
        return replace(
            self,
            context=self.context or view.get("current-context") or None,
            namespace=self.namespace or namespace or None,
        )

    def may(self, verb: str, resource: str) -> bool:
        """Whether this user has a right, by what the API server says.

        ``resource`` is a plural with its group, and may have a subresource: "pods/log".

        Raises:
            KubectlError: the server did not say.
        """
        what, _, part = resource.partition("/")
        more = [f"--subresource={part}"] if part else []
        done = self._run(["auth", "can-i", verb, what, *more], None, self.timeout_s)
        answer = done.stdout.split()
        if answer[:1] in (["yes"], ["no"]):
            return answer[0] == "yes"
        raise complaint(f"{done.stdout[-200:]}\n{done.stderr}", self)

    def json(self, *arguments: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The object that a call prints as JSON.

        Raises:
            KubectlError: the call failed, or printed no JSON.
        """
        text = self.text(*arguments, timeout_s=timeout_s)
        try:
            value = json.loads(text) if text.strip() else {}
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise KubectlError(
                "refused", f"kubectl {arguments[0]} printed no JSON object but: {text[:200]!r}"
            )
        return value

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """One object; None if there is none of that name."""
        return self.json("get", kind, name, "--output=json", "--ignore-not-found") or None

    def list(self, kind: str, *, labels: str | None = None, more: Sequence[str] = ()) -> list[Any]:
        """The objects of a kind, those with ``labels`` only if given."""
        chosen = [f"--selector={labels}"] if labels else []
        items = self.json("get", kind, "--output=json", *chosen, *more).get("items")
        return items if isinstance(items, list) else []

    def lasting(self, *arguments: str, split: bool = False) -> subprocess.Popen[str]:
        """A call that goes on; standard error comes with the output unless ``split``.

        Raises:
            KubectlError: kubectl is not installed.
        """
        try:
            return subprocess.Popen(
                self.command(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE if split else subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                bufsize=1,
            )
        except FileNotFoundError:
            raise not_installed(self.program) from None

    def kustomize(self, folder: Path) -> str:
        """What the kustomization in a folder renders to.

        Raises:
            KubectlError: it is wrong, in kustomize's words.
        """
        try:
            return self.text("kustomize", str(folder))
        except KubectlError as error:
            if error.trouble == "not installed":
                raise
            raise KubectlError(
                error.trouble, f"the manifests do not render ({folder}): {error}"
            ) from None


def not_installed(program: str) -> KubectlError:
    """Nothing of that name can be run."""
    return KubectlError(
        "not installed",
        f"{program} is not on PATH, and launching on Kubernetes needs it: "
        "https://kubernetes.io/docs/tasks/tools says how to install it",
    )


def complaint(stderr: str, kubectl: Kubectl) -> KubectlError:
    """What kubectl wrote when it failed, as an error whose message has the mend."""
    # What kustomize complains of comes as a line of a log.
    stderr = _FAILED.sub(r"\1", stderr)
    said = "\n".join(line for line in _NOISE.sub("", stderr).splitlines() if line.strip())
    last = said.strip() or "it failed and did not say why"
    where = f"context {kubectl.context}" if kubectl.context else "the current context"
    if _BAD_FILE.search(stderr):
        return KubectlError("no context", f"kubectl cannot read its configuration: {last}")
    if _WRONG_CONTEXT.search(said):
        return KubectlError(
            "no context",
            f"kubectl knows no context {kubectl.context!r}: give one of those that "
            "`kubectl config get-contexts` lists",
        )
    if _NO_CONTEXT.search(said):
        return KubectlError(
            "no context",
            "kubectl has no cluster to talk to: choose one with `kubectl config use-context NAME` "
            "or --context NAME (or set KUBECONFIG); `kubectl config get-contexts` lists them",
        )
    if _NOT_SIGNED_IN.search(stderr):
        return KubectlError(
            "not signed in",
            f"the cluster ({where}) does not know who you are: sign in again, then try "
            f"`{kubectl.for_person('auth', 'whoami')}`; kubectl said: {last}",
        )
    if "(Forbidden)" in said or "is forbidden" in said:
        return _forbidden(last, kubectl)
    if kind := _NO_KIND.search(said):
        name = kind[1] or kind[2]
        return KubectlError(
            "no such kind",
            f"the cluster ({where}) knows no {name}: install what brings it "
            "(KubeRay's operator for RayJob; docs/kubernetes.md has the commands)",
        )
    if "(NotFound)" in said:
        return KubectlError("not found", f"{last}")
    if _NO_ANSWER.search(stderr):
        return KubectlError(
            "no answer",
            f"the cluster ({where}) does not answer: {_one_line(last)}; is it up, and is this "
            f"machine allowed to reach it? try `{kubectl.for_person('get', '--raw', '/version')}`",
        )
    if "conflict" in said and "Apply failed" in said:
        return KubectlError(
            "conflict",
            "somebody else set fields that this launch would change:\n"
            f"{last}\nput your changes into an overlay of your own (--overlay DIR), or let go of "
            "the fields there",
        )
    return KubectlError("refused", f"kubectl was refused: {last}")


def _forbidden(said: str, kubectl: Kubectl) -> KubectlError:
    found = _FORBIDDEN.search(said)
    if found is None:  # a quota, an admission check, pod security
        return KubectlError("refused", f"the cluster refuses it: {said}")
    resource = found["resource"] + (f".{found['group']}" if found["group"] else "")
    where = f" in the namespace {found['namespace']}" if found["namespace"] else ""
    flag = f" -n {found['namespace']}" if found["namespace"] else ""
    context = f" --context {kubectl.context}" if kubectl.context else ""
    return KubectlError(
        "forbidden",
        f"you may not {found['verb']} {resource}{where}: ask for that right; "
        f"`kubectl{context} auth can-i {found['verb']} {resource}{flag}` tells when you have it",
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A child that does not outlive the block."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
