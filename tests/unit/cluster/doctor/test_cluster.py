"""What is made of the machines' answers."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from cluster.doctor import cluster
from cluster.doctor.sizes import checkpoint_bytes
from cluster.launch.jobs_api import token_problem
from model.config import ModelConfig
from model.size import num_parameters
from trainer.config import load_config


def nodes(**gpus: int) -> list[dict[str, object]]:
    return [
        {"NodeManagerAddress": name, "NodeID": name, "Resources": {"GPU": count} if count else {}}
        for name, count in gpus.items()
    ]


def test_versions_that_differ_are_named() -> None:
    same = {"ray": "2.60.0", "babelray": "0.1.0"}
    assert cluster.versions({"a": same, "b": same}).outcome == "ok"
    check = cluster.versions({"a": same, "b": same, "c": {**same, "babelray": None}})
    assert check.outcome == "failure"
    assert check.found == "babelray: c has none; others have 0.1.0"
    many = {**same, "click": "8.1", "rich": "14.0"}
    check = cluster.versions({"a": many, "b": many})
    assert check.found == "alike everywhere: babelray 0.1.0, ray 2.60.0, 2 more packages"
    check = cluster.versions({"a": many, "b": {**many, "rich": None}, "c": many})
    assert check.found == "rich: b has none; others have 14.0"
    assert "is on no machine" in cluster.versions({"a": {"babelray": None}}).found


def test_gpus() -> None:
    assert cluster.gpus(nodes(a=0), {"a": []}).outcome == "ok"
    check = cluster.gpus(nodes(a=8, b=8), {"a": ["H100"] * 8, "b": ["H100"] * 8})
    assert (check.outcome, check.found) == ("ok", "16 on 2 machines: H100")
    assert cluster.gpus(nodes(a=8, b=8), {"a": ["H100"], "b": ["A100"]}).outcome == "warning"
    assert "a 8, b 4" in cluster.gpus(nodes(a=8, b=4), {"a": [], "b": []}).found
    check = cluster.gpus(nodes(a=0), {"a": ["H100"]})
    assert (check.outcome, check.found) == ("failure", "a have GPUs that Ray does not offer")


def test_clocks() -> None:
    assert cluster.clocks({"a": (0.0, 0.001), "b": (0.2, 0.001)}).outcome == "ok"
    check = cluster.clocks({"a": (0.1, 0.001), "b": (-9.0, 0.001)})
    assert (check.outcome, check.found) == ("warning", "a is 9.1 s ahead of b")
    assert cluster.clocks({"a": (0.0, 0.0), "b": (5.0, 6.0)}).outcome == "ok", "not sure enough"


def test_authentication() -> None:
    public = [{"NodeManagerAddress": "10.0.0.1"}]
    assert cluster.authentication(None, public, "token").outcome == "ok"
    assert cluster.authentication("token", public, None).outcome == "ok"
    assert cluster.authentication("disabled", public, None).outcome == "warning"
    assert cluster.authentication("token", public, "disabled").outcome == "warning"
    local = [{"NodeManagerAddress": "127.0.0.2"}]
    assert cluster.authentication("disabled", local, None).outcome == "ok"


def test_health_checks() -> None:
    assert cluster.health([None, None], num_nodes=2).outcome == "warning"
    check = cluster.health([None, {}], num_nodes=2)
    assert check.outcome == "warning"
    assert "about 65 s" in check.found
    assert cluster.health([{}], num_nodes=1).outcome == "ok"
    quick = {"period_ms": "1000", "timeout_ms": "2000", "failure_threshold": "3"}
    settings = {f"RAY_health_check_{key}": value for key, value in quick.items()}
    check = cluster.health([settings], num_nodes=2)
    assert (check.outcome, "about 9 s" in check.found) == ("ok", True)


def test_a_folder_that_is_another_one_on_one_machine() -> None:
    files = {"a": "x/0", "b": "x/1", "c": "x/2"}
    every = dict.fromkeys(files.values(), 0.1)
    check = cluster.shared("runs", Path("/mnt"), dict.fromkeys(files, every), files, "mount it")
    assert check.outcome == "ok"
    seen = {"a": {"x/0": 0.1, "x/2": 0.1}, "b": {"x/1": 0.1}, "c": {"x/0": 0.1, "x/2": 0.1}}
    check = cluster.shared("runs", Path("/mnt"), seen, files, "mount it")
    assert check.outcome == "failure"
    assert check.found.startswith("/mnt on b is not the folder of that name on ")
    late = {**every, "x/1": 4.2}
    check = cluster.shared("runs", Path("/mnt"), {"a": late, "b": every}, files, "mount it")
    assert (check.outcome, "after 4.2 s" in check.found) == ("warning", True)


def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    [check] = cluster.checks(load_config(None), runs=tmp_path)
    assert (check.outcome, check.found) == ("failure", "RAY_ADDRESS names none")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    [check] = cluster.checks(load_config(None), runs=tmp_path)
    assert check.outcome == "failure"
    assert check.found.startswith("no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1")
    assert (check.mend or "").startswith("start it with ray start --head")


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> NoReturn:
        error = AuthenticationError("InvalidAuthToken: it is missing")
        raise token_problem(error) or AssertionError

    class AuthenticationError(Exception):
        pass

    monkeypatch.setattr(cluster, "connect", refuse)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    [check] = cluster.checks(load_config(None), runs=tmp_path)
    assert check.found == "the Ray cluster asks for a token, or another one"
    assert (check.mend or "").startswith("export RAY_AUTH_MODE=token")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(preset="tiny"),
        ModelConfig(preset="base"),
        ModelConfig(preset="tiny", norm="post", positions="learned", tie_embeddings=False),
        ModelConfig(preset="tiny", encoder_layers=2, decoder_layers=3, d_ff=100),
    ],
)
def test_parameters_are_those_of_the_model(config: ModelConfig) -> None:
    import torch

    from model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config, 1000)
    assert num_parameters(config, 1000) == sum(part.numel() for part in model.parameters())


def test_a_moving_average_makes_checkpoints_larger() -> None:
    plain = checkpoint_bytes(load_config(None))
    assert checkpoint_bytes(load_config(None, ("trainer.ema_decay=0.99",))) == plain * 16 // 12
