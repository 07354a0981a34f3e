"""What the person who launches asks for, as a ``Place`` and a ``Submission``."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cluster.launch.overlays import DEFAULT_OVERLAY
from cluster.launch.target import Place, Submission, Target
from cluster.options import place_option_names
from data_shards.errors import UserError
from trainer.config import RunConfig, parse_config, read_values

# Where the manifests in k8s/ mount the storage that all pods share.
POD_STORAGE = "/mnt/babelray"

# Of corpus=files.
_TEXTS = ("source", "target", "valid_source", "valid_target", "test_source", "test_target")


def choose_place(
    *,
    overlay: str | None = None,
    components: tuple[str, ...] = (),
    nodes: str | None = None,
    gpus: int | None = None,
    image: str | None = None,
    namespace: str | None = None,
    context: str | None = None,
    storage: str | None = None,
    before: Place | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place:
    """Where to: the Ray cluster that RAY_ADDRESS names, or else Kubernetes.

    Args:
        overlay, components, image, namespace, context: of Kubernetes.
        nodes, gpus: how many machines train, and with how many workers each.
        storage: the folder that all machines of a Ray cluster share; in pods it is fixed.
        before: where the run was launched last; what is not given now is taken from there.
        environment: stands in for the process's own, in tests.

    Raises:
        UserError: options of Kubernetes are given for a Ray cluster, or the other way round.
    """
    from cluster.launch import ray_address

    address = ray_address.given(environment)
    asked: dict[str, Any] = {
        "overlay": overlay,
        "components": components,
        "nodes": nodes,
        "gpus": gpus,
        "image": image,
        "namespace": namespace,
        "context": context,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value}
    if not address and storage and not (before is not None and before.kind == "ray"):
        raise UserError(
            f"--storage {storage}: on Kubernetes the storage is what the claim babelray gives, "
            f"mounted at {POD_STORAGE}: change the claim in an overlay of your own, or set "
            "RAY_ADDRESS for a Ray cluster"
        )
    if before is not None and before.kind == ("ray" if address else "kubernetes"):
        kept = replace(before, **given)
        kept = replace(kept, storage=storage) if storage else kept
        return replace(kept, address=address) if address else kept
    if before is not None and not address and not given:
        return before  # a Ray cluster, which the record names
    if address:
        if only := {name: v for name, v in given.items() if name not in {"nodes", "gpus"}}:
            raise UserError(
                f"{', '.join(place_option_names(only))}: only for Kubernetes, but RAY_ADDRESS "
                "names a Ray cluster: leave the option out, or unset RAY_ADDRESS"
            )
        return Place("ray", storage or str(Path.cwd()), address=address, nodes=nodes, gpus=gpus)
    return Place("kubernetes", POD_STORAGE, **{"overlay": DEFAULT_OVERLAY, **given})


def read_config(
    file: Path | None, settings: tuple[str, ...], place: Place, *, before: str | None = None
) -> tuple[RunConfig, str]:
    """The run's configuration, and the YAML text of what differs from the defaults.

    Args:
        file: None takes what the run was launched with ``before``.
        place: paths in the configuration must mean something there.

    Raises:
        UserError: the configuration is wrong, or names a path that only this machine knows.
    """
    if file is None and before is None:
        raise UserError("give the configuration: for example --config configs/base.yaml")
    values = read_values(file) if file is not None else yaml.safe_load(before or "") or {}
    values = _merged(values, read_values(None, settings))
    where = str(file) if file is not None else "as launched before"
    config = parse_config(values, where=where)
    data = values.setdefault("data", {})
    if place.kind == "ray":
        _make_absolute(config, data)
    else:
        _check_paths(config, place.storage)
    return config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def training(run: str, config_text: str, config: RunConfig, target: Target) -> Submission:
    """The job that begins the run, or goes on with it."""
    arguments = ["train", "--name", run, "--runs", runs_there(target.place), "--start-or-resume"]
    arguments += ["--log-format", "json"]
    if not config.data.root.is_absolute() and config.data.dir is None:
        arguments += ["--set", f"data.root={target.storage}/data"]
    defaults = RunConfig().trainer
    if target.place.kind == "kubernetes" and config.trainer.metrics_host == defaults.metrics_host:
        # Prometheus comes from another pod.
        arguments += ["--set", "trainer.metrics_host=0.0.0.0"]
    workers = target.workers()
    if workers is not None:
        most = int(workers.rpartition(":")[2])
        if most > config.data.lanes:
            raise UserError(
                f"{workers} workers, but the run has data.lanes {config.data.lanes}, and every "
                "worker takes at least one: ask for fewer machines (--nodes, --gpus), or set "
                f"data.lanes={most}"
            )
        arguments += ["--workers", workers]
    return Submission(run, "train", tuple(arguments), config_text)


def runs_there(place: Place) -> str:
    """The folder of runs on the cluster."""
    return f"{place.storage.rstrip('/')}/runs"


def without_runs(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """A command's arguments without ``--runs DIR``, which means another folder there."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--runs":
            skip = True
        elif not argument.startswith("--runs="):
            kept.append(argument)
    return tuple(kept)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _make_absolute(config: RunConfig, data: dict[str, Any]) -> None:
    """Paths as whoever launches means them; the job has a working directory of its own."""
    if config.data.corpus == "files":
        for name in _TEXTS:
            value = getattr(config.data, name)
            if value is not None:
                data[name] = os.path.abspath(value)
    mirror = config.data.mirror
    if mirror is not None and not _is_url(mirror):
        data["mirror"] = os.path.abspath(mirror)


def _check_paths(config: RunConfig, storage: str) -> None:
    data = config.data
    paths = {f"data.{name}": getattr(data, name) for name in ("dir", "cache_dir", "mirror")}
    if data.corpus == "files":
        paths |= {f"data.{name}": getattr(data, name) for name in _TEXTS}
    paths["recovery.storage"] = config.recovery.storage
    paths["recovery.staging"] = config.recovery.staging
    for key, value in paths.items():
        if value is not None and not _is_url(str(value)) and not os.path.isabs(value):
            raise UserError(
                f"{key} {value}: a path of this machine means nothing in a pod: copy the file to "
                f"the cluster's storage and give its path there, such as {storage}/texts/train.en"
            )


def _is_url(text: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None
