"""What the person who launches asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.launch import order
from cluster.launch.target import Place
from data_shards.errors import UserError
from tests.targets import FakeTarget
from trainer.config import RunConfig, parse_config

PODS = Place("kubernetes", "/mnt/babelray", overlay="gpu")
TINY = Path(__file__).resolve().parents[4] / "configs" / "tiny.yaml"


def ray(storage: str = "/shared") -> Place:
    return Place("ray", storage, address="http://head:8265")


def test_kubernetes_by_default() -> None:
    assert order.choose_place(environment={}) == PODS


def test_what_is_given_goes_over_the_last_launch() -> None:
    before = Place("kubernetes", "/data", overlay="spot", components=("s3",), nodes="4", gpus=8)
    place = order.choose_place(before=before, nodes="2", environment={})
    assert place == Place(
        "kubernetes", "/data", overlay="spot", components=("s3",), nodes="2", gpus=8
    )


def test_ray_address_is_a_ray_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    environment = {"RAY_ADDRESS": "http://head:8265"}
    assert order.choose_place(environment=environment) == ray(str(tmp_path))


def test_machines_of_a_ray_cluster() -> None:
    place = order.choose_place(
        nodes="2",
        gpus=8,
        storage="/shared",
        environment={"RAY_API_SERVER_ADDRESS": "http://head:8265"},
    )
    assert (place.nodes, place.gpus, place.address) == ("2", 8, "http://head:8265")


def test_a_ray_cluster_is_found_again_without_its_address() -> None:
    assert order.choose_place(before=ray(), environment={}) == ray()


def test_another_kind_of_place_than_before() -> None:
    environment = {"RAY_ADDRESS": "http://head:8265"}
    place = order.choose_place(before=PODS, storage="/shared", environment=environment)
    assert place == ray()


def test_options_of_kubernetes_are_refused_for_ray() -> None:
    with pytest.raises(UserError, match="--component: only for Kubernetes, but RAY_ADDRESS"):
        order.choose_place(
            components=("kueue",), nodes="2", environment={"RAY_ADDRESS": "http://head:8265"}
        )


def test_the_storage_of_pods_is_fixed() -> None:
    with pytest.raises(UserError, match="--storage /data: on Kubernetes the storage is what the"):
        order.choose_place(storage="/data", environment={})


def test_the_text_holds_only_what_differs() -> None:
    config, text = order.read_config(TINY, ("trainer.max_steps=7",), PODS)
    assert config.trainer.max_steps == 7
    again, same = order.read_config(None, (), PODS, before=text)
    assert (again, same) == (config, text)
    assert "adam_beta1" not in text


def test_settings_go_over_the_last_launch_and_keep_the_rest() -> None:
    _, text = order.read_config(TINY, (), PODS)
    config, _ = order.read_config(None, ("data.lanes=2",), PODS, before=text)
    assert config.data.lanes == 2
    assert config.data.corpus == "embedded"
    assert config.data.vocabulary_size == 1500


def test_a_configuration_is_needed() -> None:
    with pytest.raises(UserError, match="give the configuration"):
        order.read_config(None, (), PODS)


@pytest.mark.parametrize(
    "settings",
    [
        ("data.corpus=files", "data.source=/mnt/x/a.en", "data.target=a.de"),
        ("recovery.storage=checkpoints",),
        ("data.mirror=../raw",),
        ("data.dir=data/x",),
    ],
)
def test_a_path_of_this_machine_is_refused_for_pods(settings: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="a path of this machine means nothing in a pod"):
        order.read_config(TINY, settings, PODS)


def test_urls_and_absolute_paths_pass() -> None:
    settings = ("recovery.storage=s3://bucket/x", "data.mirror=https://mirror", "data.dir=/mnt/d")
    config, _ = order.read_config(TINY, settings, PODS)
    assert config.recovery.storage == "s3://bucket/x"
    assert config.data.dir == Path("/mnt/d")


def test_paths_for_a_shared_file_system_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ("data.corpus=files", "data.source=a.en", "data.target=a.de", "data.mirror=raw")
    _, text = order.read_config(TINY, settings, ray())
    config, _ = order.read_config(None, (), ray(), before=text)
    assert config.data.source == str(tmp_path / "a.en")
    assert config.data.target == str(tmp_path / "a.de")
    assert config.data.mirror == str(tmp_path / "raw")


def submit(place: Place, *, workers: str | None = None, **data: object) -> list[str]:
    config = parse_config({"data": data}, where="test") if data else RunConfig()
    return list(order.training("one", "", config, FakeTarget(place, workers=workers)).arguments)


def test_the_arguments_in_pods() -> None:
    assert submit(PODS, workers="8") == [
        "train", "--name", "one", "--runs", "/mnt/babelray/runs", "--start-or-resume",
        "--log-format", "json", "--set", "data.root=/mnt/babelray/data",
        "--set", "trainer.metrics_host=0.0.0.0", "--workers", "8",
    ]  # fmt: skip


def test_the_arguments_on_a_ray_cluster() -> None:
    assert submit(ray()) == [
        "train", "--name", "one", "--runs", "/shared/runs", "--start-or-resume",
        "--log-format", "json", "--set", "data.root=/shared/data",
    ]  # fmt: skip


def test_a_folder_of_data_that_was_chosen_is_kept() -> None:
    assert not any("data.root" in word for word in submit(PODS, root="/mnt/other"))
    assert not any("data.root" in word for word in submit(PODS, dir="/mnt/other/x"))


@pytest.mark.parametrize("workers", ["9", "2:9"])
def test_more_workers_than_lanes_are_refused(workers: str) -> None:
    with pytest.raises(UserError, match=r"data\.lanes 8, .* or set data\.lanes=9"):
        submit(PODS, workers=workers)


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (("one", "--runs", "r", "--json"), ("one", "--json")),
        (("--runs=r", "one"), ("one",)),
        (("one",), ("one",)),
    ],
)
def test_the_folder_of_runs_is_another_one_there(
    typed: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    assert order.without_runs(typed) == kept
