"""Calling kubectl: what it says when something is wrong becomes one message with the mend."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from cluster.launch.kubectl import Kubectl, KubectlError, complaint
from tests.kubernetes import FakeCluster

needs_kubectl = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on PATH")
CONFIG = """
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "SERVER"}}]
users: [{name: u, user: {}}]
contexts: [{name: here, context: {cluster: c, user: u, namespace: team}}]
current-context: here
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(tmp_path, monkeypatch)


def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "config").write_text(text)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))


def fails(kubectl: Kubectl, *arguments: str) -> KubectlError:
    with pytest.raises(KubectlError) as caught:
        kubectl.text(*(arguments or ("get", "pods", "--output=json")))
    return caught.value


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = fails(Kubectl())
    assert error.trouble == "not installed"
    assert "kubernetes.io/docs/tasks/tools" in str(error)
    with pytest.raises(KubectlError, match="not on PATH"):
        Kubectl().lasting("logs", "x")


@needs_kubectl
def test_the_real_kubectl_without_a_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    error = fails(Kubectl())
    assert error.trouble == "no context"
    assert "kubectl config use-context" in str(error)
    assert fails(Kubectl(), "config", "view", "--minify").trouble == "no context"


@needs_kubectl
def test_the_real_kubectl_with_a_wrong_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path, monkeypatch, CONFIG)
    error = fails(Kubectl(context="elsewhere"))
    assert error.trouble == "no context"
    assert "'elsewhere'" in str(error)
    assert "get-contexts" in str(error)


@needs_kubectl
def test_the_real_kubectl_with_a_dead_server_and_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path, monkeypatch, CONFIG.replace("SERVER", "http://127.0.0.1:1"))
    error = fails(Kubectl(context="here"))
    assert error.trouble == "no answer"
    assert "127.0.0.1:1 was refused" in str(error)
    assert "memcache" not in str(error)
    with pytest.raises(KubectlError, match="does not answer"):
        Kubectl().may("create", "pods")
    config(tmp_path, monkeypatch, "{{{")
    assert fails(Kubectl()).trouble == "no context"


@pytest.mark.parametrize(
    ("stderr", "trouble", "words"),
    [
        (
            'Error from server (Forbidden): rayjobs.ray.io is forbidden: User "eve" cannot list '
            'resource "rayjobs" in API group "ray.io" in the namespace "team"',
            "forbidden",
            "you may not list rayjobs.ray.io in the namespace team",
        ),
        (
            'Error from server (Forbidden): pods "x" is forbidden: exceeded quota: small',
            "refused",
            "exceeded quota: small",
        ),
        ('Error from server (NotFound): namespaces "t" not found', "not found", '"t" not found'),
        ('error: the server doesn\'t have a resource type "rayjobs"', "no such kind", "rayjobs"),
        (
            'error: resource mapping not found for name: "x" namespace: "" from "STDIN": no '
            'matches for kind "RayJob" in version "ray.io/v1"',
            "no such kind",
            "knows no RayJob",
        ),
        ("error: You must be logged in to the server (Unauthorized)", "not signed in", "sign in"),
        ("Please enter Username: error: EOF", "not signed in", "sign in"),
        ("Unable to connect to the server: dial tcp: no such host", "no answer", "no such host"),
        ("Unable to connect to the server: x509: certificate has expired", "no answer", "x509"),
        (
            'Error: Apply failed with 1 conflict: conflict with "helm": .spec.x',
            "conflict",
            'conflict with "helm"',
        ),
        (
            'The RayJob "x" is invalid: spec.backoffLimit: Invalid value: -1',
            "refused",
            "spec.backoffLimit: Invalid value: -1",
        ),
        ("", "refused", "did not say why"),
    ],
)
def test_what_kubectl_complains_of(stderr: str, trouble: str, words: str) -> None:
    error = complaint(f'E1123 03:17 1 memcache.go:265] "Unhandled"\n{stderr}\n', Kubectl("prod"))
    assert error.trouble == trouble
    assert words in str(error)
    assert "memcache" not in str(error)
    assert error.exit_status == 2


def test_a_kubectl_that_hangs_is_told_of(fake: FakeCluster) -> None:
    fake.rule("get pods", hang=True)
    before = time.monotonic()
    with pytest.raises(KubectlError, match=r"gave no answer within 0\.3 s") as caught:
        Kubectl(timeout_s=0.3).list("pods")
    assert caught.value.trouble == "no answer"
    assert time.monotonic() - before < 10


def test_calls_name_context_and_namespace_and_have_a_bound(fake: FakeCluster) -> None:
    kubectl = Kubectl(context="prod", namespace="team")
    assert kubectl.get("pods", "none") is None
    [call] = fake.calls
    assert call.startswith("--context=prod --namespace=team get pods none --output=json")
    assert "--request-timeout=10s" in call
    assert kubectl.for_person("get", "pods") == "kubectl --context prod -n team get pods"


def test_output_that_is_no_object(fake: FakeCluster) -> None:
    fake.rule("version", out="hello")
    with pytest.raises(KubectlError, match="no JSON object but: 'hello'"):
        Kubectl().json("version")


def test_rights_are_asked_with_their_subresource(fake: FakeCluster) -> None:
    fake.rule("can-i get pods --subresource=log", out="no - not for you\n", rc=1)
    assert not Kubectl().may("get", "pods/log")
    assert Kubectl().may("get", "pods")
