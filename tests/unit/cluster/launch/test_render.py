"""Rendering an overlay for a run, by the real kustomize."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch import render as rendering
from cluster.launch.kubectl import Kubectl
from cluster.launch.overlays import split_image
from cluster.launch.render import Rendering, entrypoint, job_name, render, render_overlay
from cluster.launch.sizes import node_range, quantity, read_group, scaled, workers_of
from cluster.launch.target import Kind, Place, Submission
from data_shards.errors import UserError

pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="no kubectl on PATH")
STORAGE = "/mnt/babelray"
CONFIG = "trainer:\n  max_steps: 7\n"


def place(**values: Any) -> Place:
    return Place("kubernetes", STORAGE, **{"overlay": "cpu-smoke", **values})


def training(run: str = "demo", workers: str = "2", **values: Any) -> Submission:
    arguments = ("train", "--name", run, "--workers", workers, "--start-or-resume")
    return Submission(run, "train", arguments, values.get("config", CONFIG))


def of_kind(rendered: Rendering, kind: str) -> list[dict[str, Any]]:
    return [document for document in rendered.documents if document["kind"] == kind]


@pytest.fixture(scope="module")
def trained() -> Rendering:
    where = place(nodes="3", image="reg.test:5000/x/babelray:v1", namespace="team")
    return render(where, training("My.Run", "3"), Kubectl())


def test_a_run_is_put_into_its_overlay(trained: Rendering) -> None:
    name = job_name("My.Run", "train")
    job = trained.job
    assert (trained.name, trained.namespace) == (name, "team")
    assert job["metadata"]["annotations"]["babelray.dev/run"] == "My.Run"
    assert job["spec"]["entrypoint"] == (
        "babelray train --config /etc/babelray/run.yaml --name My.Run --workers 3 --start-or-resume"
    )
    [submitter] = job["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["args"] == [job["spec"]["entrypoint"]]
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    images = {line.split()[-1] for line in trained.text.splitlines() if " image: " in line}
    assert images == {"reg.test:5000/x/babelray:v1"}


def test_what_belongs_to_the_run_has_its_name_and_the_rest_its_own(trained: Rendering) -> None:
    [config] = of_kind(trained, "ConfigMap")
    [budget] = of_kind(trained, "PodDisruptionBudget")
    [claim] = of_kind(trained, "PersistentVolumeClaim")
    assert config["metadata"]["name"] == budget["metadata"]["name"] == trained.name
    assert config["data"] == {"run.yaml": CONFIG}
    assert claim["metadata"]["name"] == "babelray"
    instance = "app.kubernetes.io/instance"
    assert budget["spec"]["selector"]["matchLabels"][instance] == trained.name
    cluster = trained.job["spec"]["rayClusterSpec"]
    for part in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert part["template"]["metadata"]["labels"][instance] == trained.name
        mounted = [
            v["configMap"]["name"] for v in part["template"]["spec"]["volumes"] if "configMap" in v
        ]
        assert mounted == [trained.name]
    assert "train-babelray" not in trained.text
    assert len(of_kind(trained, "RayJob")) == 1
    assert {d["metadata"].get("namespace") for d in trained.documents} == {"team"}


def test_the_text_is_kustomizes_own_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Rendering
) -> None:
    class Kept:
        def __enter__(self) -> str:
            return str(tmp_path)

        def __exit__(self, *exception: object) -> None: ...

    monkeypatch.setattr(rendering, "_folder", Kept)
    where = place(nodes="3", image="reg.test:5000/x/babelray:v1", namespace="team")
    text = render(where, training("My.Run", "3"), Kubectl()).text
    again = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert text == again.stdout == trained.text
    assert len(trained.parts) == len(trained.documents)


def test_a_check_has_a_name_of_its_own_and_no_second_attempt() -> None:
    arguments = ("doctor", "--workers", "2")
    rendered = render(place(), Submission("any", "doctor", arguments), Kubectl())
    assert rendered.name == "doctor"
    assert rendered.job["spec"]["backoffLimit"] == 0
    assert not of_kind(rendered, "PodDisruptionBudget")
    assert "--config" not in rendered.job["spec"]["entrypoint"]
    [config] = of_kind(rendered, "ConfigMap")  # the pods mount one
    assert config["metadata"]["name"] == "doctor"


@pytest.mark.parametrize(
    ("values", "arguments", "pods", "gpus"),
    [
        ({"overlay": "gpu-multi-node", "nodes": "2", "gpus": 4}, (), 1, 4),
        ({"overlay": "spot", "components": ("elastic",), "nodes": "1:4"}, (), 1, 1),
        ({"overlay": "gpu-multi-node", "gpus": 4}, ("--actors=2:9",), 3, 4),
    ],
)
def test_an_evaluation_has_one_machine_of_the_runs_size_or_as_many_as_it_asks_for(
    values: dict[str, Any], arguments: tuple[str, ...], pods: int, gpus: int
) -> None:
    submission = Submission("demo", "evaluate", ("evaluate", "demo", *arguments))
    rendered = render(place(**values), submission, Kubectl())
    group = read_group(rendered.job)
    assert rendered.name == "evaluate-demo"
    assert (group.low, group.high, group.gpus) == (pods, pods, gpus)
    assert not [d for d in of_kind(rendered, "ConfigMap") if "run.yaml" in d["data"]]


def test_gpus_of_a_worker_bring_cpus_and_memory_along() -> None:
    one = render_overlay(place(overlay="gpu", gpus=1, nodes="1"), "train", Kubectl())
    four = render_overlay(place(overlay="gpu", gpus=4, nodes="2"), "train", Kubectl())
    assert workers_of(four.group) == "8"
    small, large = (
        r.job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "resources"
        ]
        for r in (one, four)
    )
    assert large["requests"]["nvidia.com/gpu"] == large["limits"]["nvidia.com/gpu"] == "4"
    for amount in ("cpu", "memory"):
        assert quantity(large["limits"][amount]) == 4 * quantity(small["limits"][amount])


def test_an_elastic_run_has_a_range() -> None:
    where = place(components=("elastic",), nodes="1:4")
    rendered = render(where, training(workers="1:4"), Kubectl())
    [group] = rendered.job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [1, 1, 4]
    assert workers_of(rendered.group) == "1:4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"overlay": "gpus"}, "no overlay 'gpus': did you mean gpu"),
        ({"overlay": "./nowhere"}, "holds no kustomization.yaml"),
        ({"components": ("kueu",)}, "no component 'kueu': did you mean kueue"),
        ({"nodes": "0"}, "--nodes 0: give a number from 1"),
        ({"nodes": "3:2"}, "--nodes 3:2"),
        ({"nodes": "1:4"}, "add --component elastic"),
        ({"gpus": 2}, "have no GPUs"),
        ({"image": "reg.test/babelray"}, "neither tag nor digest"),
    ],
)
def test_what_cannot_be_rendered(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render_overlay(place(**values), "train", Kubectl())


def overlay(folder: Path, *documents: dict[str, Any], more: str = "") -> Place:
    folder.mkdir()
    (folder / "all.yaml").write_text(yaml.safe_dump_all(documents))
    (folder / "kustomization.yaml").write_text(f"resources: [all.yaml]\n{more}")
    return place(overlay=str(folder))


def test_an_overlay_of_ones_own_needs_the_labels(tmp_path: Path) -> None:
    where = overlay(
        tmp_path / "mine", {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "x"}}
    )
    with pytest.raises(UserError, match="renders 0 RayJobs with the label"):
        render_overlay(where, "train", Kubectl())


def test_kustomizes_own_words_reach_the_user(tmp_path: Path) -> None:
    where = overlay(tmp_path / "mine", more="patches: 3\n")
    with pytest.raises(UserError, match=r"the manifests do not render.*patches"):
        render_overlay(where, "train", Kubectl())


def test_manifests_that_would_not_work_are_refused(trained: Rendering) -> None:
    with pytest.raises(UserError, match=r"would not work:\n  RayJob train-demo, .*--workers 9"):
        render(place(nodes="2"), training(workers="9"), Kubectl())


def test_a_configuration_that_no_pod_would_see_is_refused() -> None:
    submission = Submission("demo", "evaluate", ("evaluate",), CONFIG)
    with pytest.raises(UserError, match="mounts no ConfigMap"):
        render(place(), submission, Kubectl())


def test_names_of_jobs() -> None:
    assert job_name("demo", "train") == "train-demo"
    assert job_name("x", "doctor") == "doctor"
    kinds: tuple[Kind, ...] = ("train", "evaluate")
    names = [
        job_name(run, kind)
        for kind in kinds
        for run in ("Demo", "demo", "de.mo", "de-mo", "a" * 90, "a" * 91, "base-20261123-031713")
    ]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= 47
        assert name.replace("-", "").isalnum()
        assert name == name.lower()
        assert name[-1] != "-"


@pytest.mark.parametrize("word", ["a b", "$HOME", "it's", "x;y", "", "[1]", "*", "~"])
def test_words_that_shells_would_change_are_refused(word: str) -> None:
    with pytest.raises(UserError, match="cannot be passed on"):
        entrypoint(Submission("demo", "train", ("train", word)))


def test_images_and_numbers() -> None:
    assert split_image("babelray") == ("babelray", None, None)
    assert split_image("reg:5000/babelray") == ("reg:5000/babelray", None, None)
    assert split_image("reg:5000/b:1@sha256:ab") == ("reg:5000/b", "1", "sha256:ab")
    assert node_range("2") == (2, 2)
    assert [quantity(text) for text in ("500m", "2Gi", 3, "1k")] == [0.5, 2.0**31, 3.0, 1000.0]


def test_quantities() -> None:
    given = {"1Ei": 2.0**60, "2E": 2e18, "1e3": 1e3, "1E-2": 0.01, "+3u": 3e-6, ".5Gi": 2.0**29}
    assert {text: quantity(text) for text in given} == pytest.approx(given)
    for text in ("much", "1Xi", "1.2.3", "Gi", ""):
        with pytest.raises(UserError, match="no quantity"):
            quantity(text)


def test_scaling_keeps_shares_and_shared_memory() -> None:
    resources = {"cpu": "6", "memory": "10Gi", "nvidia.com/gpu": "2", "rdma/ib": "1"}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}}
    spec = {"containers": [{"resources": {"limits": resources}}], "volumes": [shm]}
    changed = dict(scaled({"template": {"spec": spec}, "rayStartParams": {"num-gpus": "2"}}, 3))
    at = "/template/spec/containers/0/resources/limits"
    assert changed == {
        f"{at}/cpu": "9",
        f"{at}/memory": "15Gi",
        f"{at}/nvidia.com~1gpu": "3",
        "/template/spec/volumes/0/emptyDir/sizeLimit": "6Gi",
        "/rayStartParams/num-gpus": "3",
    }
    with pytest.raises(UserError, match="--gpus 0"):
        list(scaled({"template": {"spec": spec}}, 0))
