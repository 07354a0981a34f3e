"""``babelray serve`` before anything is started: what is asked for, and what is refused."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import cluster.serve
from cluster.cli import cli
from cluster.serve import ServeOptions, _limits, _max_num_best, _url, check_address
from cluster.serve_limits import digest
from data_shards.errors import UserError
from trainer.config import EvaluationConfig, RunConfig


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(RunConfig().to_json())
    return tmp_path / "runs"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(cluster.serve, "serve", lambda *a, **k: calls.append(a))
    monkeypatch.delenv("BABELRAY_TOKEN", raising=False)
    return calls


def serve(runs: Path, *arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(
        cli, ["serve", "demo", "--runs", str(runs), *map(str, arguments)], env=environment
    )


def test_the_defaults_are_for_this_machine_alone(runs: Path, asked: list[Any]) -> None:
    assert serve(runs).exit_code == 0
    [(run_dir, checkpoint, evaluation, options)] = asked
    assert (run_dir, checkpoint, evaluation) == (runs / "demo", "best", EvaluationConfig())
    assert options == ServeOptions()
    assert options.host == "127.0.0.1"


def test_what_was_asked_for_is_handed_over(runs: Path, asked: list[Any]) -> None:
    done = serve(
        runs, "--checkpoint", "average", "--host", "0.0.0.0", "--port", 81, "--token", "abc",
        "--replicas", "1:4", "--max-characters", 99, "--rate", 5, "--set", "evaluation.beam=2",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    [(_, checkpoint, evaluation, options)] = asked
    assert (checkpoint, evaluation.beam) == ("average", 2)
    assert options == ServeOptions("0.0.0.0", 81, "abc", (1, 4), 99, 5)


def test_the_network_is_met_with_a_rate(runs: Path, asked: list[Any]) -> None:
    serve(runs, "--host", "0.0.0.0")
    serve(runs, "--host", "0.0.0.0", "--rate", 0)
    assert [call[3].rate for call in asked] == [600, None]


def test_the_token_comes_from_a_file_or_the_environment(
    runs: Path, asked: list[Any], tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("from-file\n")
    serve(runs, "--token-file", file)
    serve(runs, BABELRAY_TOKEN="from-environment")
    assert [call[3].token for call in asked] == ["from-file", "from-environment"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--replicas", "0"], "at least 1"),
        (["--replicas", "3:2"], "the least first"),
        (["--replicas", "many"], "1:4"),
        (["--port", "0"], "--port"),
        (["--max-characters", "0"], "--max-characters"),
        (["--token", ""], "openssl rand"),
        (["--token", "two words"], "openssl rand"),
        (["--token", "schlüssel"], "openssl rand"),
        (["--token-file", "no-such-file"], "no-such-file"),
        (["--set", "trainer.seed=2"], "only evaluation."),
        (["--set", "evaluation.beam=0"], "evaluation.beam"),
    ],
)
def test_refused(runs: Path, asked: list[Any], arguments: list[str], part: str) -> None:
    done = serve(runs, *arguments)
    assert done.exit_code == 2
    assert part in done.output
    assert asked == []


def test_an_empty_token_in_the_environment_is_not_none(runs: Path, asked: list[Any]) -> None:
    done = serve(runs, BABELRAY_TOKEN="")
    assert done.exit_code == 2
    assert "openssl rand" in done.output
    assert asked == []


def test_a_port_in_use_names_the_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: .*in use: choose another with --port"):
            check_address("127.0.0.1", port)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(UserError, match=f"--host {host}"):
        check_address(host, 0)


def test_on_loopback_the_name_is_checked_unless_a_token_is() -> None:
    assert _limits(ServeOptions()).hosts == {"127.0.0.1", "localhost", "::1"}
    with_token = _limits(ServeOptions(token="abc"))
    assert (with_token.hosts, with_token.token) == (None, digest("abc"))
    assert _limits(ServeOptions(host="0.0.0.0")).hosts is None


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"search": "greedy"}, 1),
        ({"beam": 4}, 4),
        ({"beam": 64}, 16),
        ({"search": "sample"}, 16),
    ],
)
def test_as_many_alternatives_as_the_search_keeps(settings: dict[str, Any], most: int) -> None:
    assert _max_num_best(EvaluationConfig(**settings)) == most


def test_where_it_listens() -> None:
    assert _url(ServeOptions(), True) == "http://127.0.0.1:8000/"
    assert _url(ServeOptions(host="::1", port=81), True) == "http://[::1]:81/"
    assert "head node" in _url(ServeOptions(), False)
    assert "every node" in _url(ServeOptions(host="0.0.0.0"), False)


@pytest.mark.parametrize(
    ("options", "is_warned"),
    [
        (ServeOptions(host="0.0.0.0"), True),
        (ServeOptions(host="0.0.0.0", token="abc"), False),
        (ServeOptions(), False),
    ],
)
def test_an_open_server_is_warned_of(
    options: ServeOptions, is_warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(**_: Any) -> Any:
        raise UserError("far enough")

    monkeypatch.setattr(cluster.serve, "check_address", lambda host, port: None)
    monkeypatch.setattr("trainer.run.load_model", lambda run_dir, checkpoint: None)
    monkeypatch.setattr(cluster.serve.session, "connect", connect)
    said: list[str] = []
    with pytest.raises(UserError, match="far enough"):
        cluster.serve.serve(Path("demo"), "best", EvaluationConfig(), options, say=said.append)
    assert [line.startswith("warning: whoever reaches 0.0.0.0:8000") for line in said] == [
        True
    ] * is_warned
