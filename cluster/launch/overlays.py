"""The manifests that come with babelray: where overlays and components lie, and their image."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_shards.errors import UserError

DEFAULT_OVERLAY = "gpu"


def manifests_dir() -> Path:
    """The folder of the manifests that come with babelray."""
    spec = find_spec("k8s")
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "overlays").is_dir():
            return Path(place)
    raise UserError("the manifests of babelray (package k8s) are not installed: install it anew")


def overlay_dir(overlay: str | None) -> Path:
    """The folder of an overlay given by name or by path.

    Raises:
        UserError: there is none; the message names those there are.
    """
    return _chosen(overlay or DEFAULT_OVERLAY, "overlays", "overlay")


def component_dir(component: str) -> Path:
    """The folder of a component given by name or by path.

    Raises:
        UserError: there is none; the message names those there are.
    """
    return _chosen(component, "components", "component")


def _chosen(given: str, folder: str, what: str) -> Path:
    if "/" in given or given in (".", ".."):
        path = Path(given).resolve()
        if not any((path / f"kustomization.{end}").is_file() for end in ("yaml", "yml")):
            raise UserError(f"--{what} {given}: {path} holds no kustomization.yaml")
        return path
    known = sorted(p.parent.name for p in (manifests_dir() / folder).glob("*/kustomization.yaml"))
    if given not in known:
        close = get_close_matches(given, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"no {what} {given!r}: {hint}there are {', '.join(known) or 'none'}; "
            "a folder of your own is given by its path, such as ./my-overlay"
        )
    return (manifests_dir() / folder / given).resolve()


def split_image(image: str) -> tuple[str, str | None, str | None]:
    """Name, tag and digest of an image."""
    name, _, digest = image.partition("@")
    head, colon, tag = name.rpartition(":")
    if colon and "/" not in tag:
        return head, tag, digest or None
    return name, None, digest or None


def head_image(job: Mapping[str, Any]) -> str:
    """The image that the head of a RayJob runs."""
    template = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    return str(template["spec"]["containers"][0]["image"])
