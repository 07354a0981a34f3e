"""Renders an overlay for one run, with the kustomize that is in kubectl and nothing else.

A generated kustomization lies over the overlay: it names the run's objects, sets entrypoint, number
and size of the workers, image and configuration, and leaves out what another kind of job needs. So
its folder can be kept and applied with kubectl alone.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from cluster.launch.kubectl import Kubectl
from cluster.launch.overlays import (
    DEFAULT_OVERLAY,
    component_dir,
    head_image,
    overlay_dir,
    split_image,
)
from cluster.launch.patches import change, deletion, escape, names_of, patch, renamed, strings
from cluster.launch.sizes import (
    Group,
    group_index,
    node_range,
    read_group,
    scaled,
)
from cluster.launch.target import Kind, Place, Submission
from data_shards.errors import UserError

CONFIG_FILE = "/etc/babelray/run.yaml"
RUN_ANNOTATION = "babelray.dev/run"
INSTANCE_LABEL = "app.kubernetes.io/instance"
NAME_LABEL = "app.kubernetes.io/name"
COMPONENT_LABEL = "app.kubernetes.io/component"

# KubeRay's bound (it adds to the name), and it must be a DNS-1035 label.
_MAX_NAME = 47
_COMPONENT: dict[Kind, str] = {"train": "training", "doctor": "training", "evaluate": "evaluation"}
# The entrypoint is a shell's command line on the head, without quotes.
_SAFE_WORD = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
_PER_RUN = ("RayJob", "PodDisruptionBudget")
_NO_CONFIG = "# This job needs no configuration.\n"

Document = dict[str, Any]


@dataclass(frozen=True)
class Rendering:
    """What an overlay renders to.

    Attributes:
        text: YAML, exactly as kustomize wrote it.
        documents: the same, parsed.
        job: the RayJob among them.
    """

    text: str
    documents: tuple[Document, ...]
    job: Document

    @property
    def parts(self) -> list[str]:
        """The text of each document."""
        return re.split(r"^---\n", self.text, flags=re.MULTILINE)

    @property
    def name(self) -> str:
        """The RayJob's name."""
        return str(self.job["metadata"]["name"])

    @property
    def namespace(self) -> str | None:
        """The namespace that the manifests themselves name."""
        namespace = self.job["metadata"].get("namespace")
        return str(namespace) if namespace else None

    @property
    def group(self) -> Group:
        """The workers it asks for."""
        return read_group(self.job)


def job_name(run: str, kind: Kind) -> str:
    """The RayJob's name for a run: the same run gives the same name, another run another."""
    if kind == "doctor":
        return "doctor"
    slug = re.sub(r"[^a-z0-9-]", "-", run.lower()).strip("-")
    name = f"{kind}-{slug}"
    if slug == run and len(name) <= _MAX_NAME:
        return name
    digest = hashlib.sha256(run.encode()).hexdigest()[:8]
    return f"{name[: _MAX_NAME - 9].rstrip('-')}-{digest}"


def render_overlay(place: Place, kind: Kind, kubectl: Kubectl) -> Rendering:
    """The overlay with its components and the place's sizes, before a run is put into it."""
    with _folder() as folder:
        return _render(place, kind, kubectl, folder, None)[0]


def render(place: Place, submission: Submission, kubectl: Kubectl) -> Rendering:
    """What is applied for a submission.

    Raises:
        UserError: overlay, component, size or argument is not possible, kustomize refuses the
            manifests, or they would not do what they say (``cluster.launch.lint``).
    """
    with _folder() as folder:
        rendering, plain = _render(place, submission.kind, kubectl, folder, submission)
    # Monitors and policies that all jobs share may name what only the other job has.
    chosen = _find_job(plain, submission.kind, place)
    others = [d for d in plain if d["kind"] == "RayJob" and d is not chosen]
    configs = [d for d in [_find_config(plain)] if d is not None]
    _refuse_problems([*rendering.documents, *others, *configs])
    return rendering


def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="babelray-launch-")


def _render(
    place: Place, kind: Kind, kubectl: Kubectl, folder: str, submission: Submission | None
) -> tuple[Rendering, list[Document]]:
    """The rendering, and what the overlay is without what launch puts over it."""
    # Symbolic links on the way would make the relative paths wrong.
    top = Path(folder).resolve()
    bottom = _base(place, top)
    write_kustomization(top, bottom)
    plain = _parse(kubectl.kustomize(top))
    _find_job(plain, kind, place)
    write_kustomization(top, {**bottom, **_over(place, kind, plain, submission, top)})
    text = kubectl.kustomize(top)
    documents = tuple(_parse(text))
    return Rendering(text, documents, _find_job(documents, kind, place)), plain


def write_kustomization(folder: Path, content: Mapping[str, object]) -> None:
    """The kustomization file of a folder."""
    head = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    text = yaml.safe_dump({**head, **content}, sort_keys=False, width=1000)
    (folder / "kustomization.yaml").write_text(text, encoding="utf-8")


def _base(place: Place, folder: Path) -> dict[str, object]:
    def relative(path: Path) -> str:  # kustomize takes no absolute ones
        return os.path.relpath(path, folder)

    content: dict[str, object] = {"resources": [relative(overlay_dir(place.overlay))]}
    if place.components:
        content["components"] = [relative(component_dir(name)) for name in place.components]
    if place.namespace:
        content["namespace"] = place.namespace
    return content


def _over(
    place: Place,
    kind: Kind,
    documents: Sequence[Document],
    submission: Submission | None,
    folder: Path,
) -> dict[str, object]:
    """What the generated kustomization adds to the overlay."""
    job = _find_job(documents, kind, place)
    patches: list[dict[str, object]] = []
    content: dict[str, object] = {"patches": patches}
    if image := _image(place, job):
        content["images"] = [image]
    changes = _sizes(place, kind, job, submission)
    if submission is None:
        if changes:
            patches.append(patch(job, changes))
        return content
    old, new = str(job["metadata"]["name"]), job_name(submission.run, kind)
    config = _find_config(documents)
    names = {old: new}
    is_mounted = config is not None and config["metadata"]["name"] in set(strings(job["spec"]))
    if submission.config is not None and not is_mounted:
        raise UserError(
            f"the RayJob {old} of the overlay {place.overlay or DEFAULT_OVERLAY} mounts no "
            "ConfigMap with the key run.yaml: the run's configuration would not reach the cluster"
        )
    if config is not None:
        patches.append(deletion(config))
    if config is not None and is_mounted:
        names |= dict.fromkeys(names_of(config), new)
        content["configMapGenerator"] = [_config_map(new, submission, folder)]
        if namespace := job["metadata"].get("namespace"):
            content["namespace"] = namespace
    for document in documents:
        if document.get("kind") not in _PER_RUN:
            continue
        if document is job:
            changes += list(renamed(document, names))
            changes += _identity(document, new, submission)
            patches.append(patch(document, changes))
        elif _belongs(document, old, kind):
            more = [*renamed(document, names), *_identity(document, new, submission)]
            more += [change("/metadata/name", new)]
            patches.append(patch(document, more))
        else:
            patches.append(deletion(document))
    return content


def _belongs(document: Document, job: str, kind: Kind) -> bool:
    """Whether a disruption budget is the job's; a check of a minute needs none."""
    if document["kind"] != "PodDisruptionBudget" or kind == "doctor":
        return False
    return job in set(strings(document))


def _identity(document: Document, name: str, submission: Submission) -> list[dict[str, object]]:
    """The changes that say whose object it is, and what a RayJob runs."""
    metadata = document["metadata"]
    changes: list[dict[str, object]] = [
        change(f"/metadata/{field}", {})
        for field in ("labels", "annotations")
        if not metadata.get(field)
    ]
    changes += [
        change(f"/metadata/labels/{escape(INSTANCE_LABEL)}", name),
        change(f"/metadata/annotations/{escape(RUN_ANNOTATION)}", submission.run),
    ]
    if document["kind"] == "RayJob":
        changes += _commands(document, entrypoint(submission))
        if submission.kind == "doctor":
            changes.append(change("/spec/backoffLimit", 0))
    return changes


def _commands(job: Document, line: str) -> list[dict[str, object]]:
    """A command line where KubeRay reads it, and where the pod that hands it in does."""
    changes = [change("/spec/entrypoint", line)]
    if job["spec"].get("submitterPodTemplate"):
        changes.append(change("/spec/submitterPodTemplate/spec/containers/0/args", [line]))
    return changes


def entrypoint(submission: Submission) -> str:
    """The command line that the head runs.

    Raises:
        UserError: an argument would mean something to the shells it passes.
    """
    words = ["babelray", *submission.arguments]
    if submission.config is not None:
        words[2:2] = ["--config", CONFIG_FILE]
    for word in words:
        if not _SAFE_WORD.fullmatch(word):
            raise UserError(
                f"the argument {word!r} cannot be passed on to the cluster, whose shells would "
                "change it: letters, digits and _./:=,@%+- only; put it into the configuration"
            )
    return " ".join(words)


def _sizes(
    place: Place, kind: Kind, job: Document, submission: Submission | None
) -> list[dict[str, object]]:
    """The changes of number and size of the workers."""
    nodes, gpus = place.nodes, place.gpus
    if kind == "evaluate":
        # A test set is small: one machine as large as the run's, or as many as it asks for.
        asked = _option(submission.arguments, "--actors") if submission else None
        most = (asked or "").rpartition(":")[2]
        ranks = gpus or read_group(job).ranks
        nodes = str(max(1, -(-int(most) // ranks))) if most.isdecimal() else "1"
    changes: list[dict[str, object]] = []
    if nodes is None and gpus is None:
        return changes
    at = f"/spec/rayClusterSpec/workerGroupSpecs/{group_index(job)}"
    if nodes is not None:
        low, high = node_range(nodes)
        if low != high and not read_group(job).autoscales:
            raise UserError(
                f"--nodes {nodes}: the overlay {place.overlay or DEFAULT_OVERLAY} has a fixed "
                "number of workers: add --component elastic, or give one number"
            )
        for field, value in (("replicas", low), ("minReplicas", low), ("maxReplicas", high)):
            changes.append(change(f"{at}/{field}", value))
    if gpus is not None:
        spec = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][group_index(job)]
        changes += [change(at + path, value) for path, value in scaled(spec, gpus)]
    return changes


def _option(arguments: Sequence[str], name: str) -> str | None:
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _image(place: Place, job: Document) -> dict[str, str] | None:
    """The ``images`` entry that puts the chosen image in the place of the overlay's."""
    if place.image is None:
        return None
    present, _, _ = split_image(head_image(job))
    name, tag, digest = split_image(place.image)
    entry = {"name": present, "newName": name}
    if digest:
        entry["digest"] = digest
    elif tag:
        entry["newTag"] = tag
    else:
        raise UserError(
            f"--image {place.image} has neither tag nor digest: "
            f"give {place.image}:TAG, or better {place.image}@sha256:..."
        )
    return entry


def _config_map(name: str, submission: Submission, folder: Path) -> dict[str, object]:
    (folder / "run.yaml").write_text(submission.config or _NO_CONFIG, encoding="utf-8")
    return {
        "name": name,
        "files": ["run.yaml"],
        "options": {
            "disableNameSuffixHash": True,
            "labels": {
                NAME_LABEL: "babelray",
                COMPONENT_LABEL: _COMPONENT[submission.kind],
                INSTANCE_LABEL: name,
            },
            "annotations": {RUN_ANNOTATION: submission.run},
        },
    }


def _find_config(documents: Sequence[Document]) -> Document | None:
    for document in documents:
        if document.get("kind") == "ConfigMap" and "run.yaml" in (document.get("data") or {}):
            return document
    return None


def _find_job(documents: Sequence[Document], kind: Kind, place: Place) -> Document:
    component = _COMPONENT[kind]
    found = [
        document
        for document in documents
        if document.get("kind") == "RayJob"
        and (document["metadata"].get("labels") or {}).get(COMPONENT_LABEL) == component
    ]
    if len(found) != 1:
        raise UserError(
            f"the overlay {place.overlay or DEFAULT_OVERLAY} renders {len(found)} RayJobs with the "
            f"label {COMPONENT_LABEL}: {component}, and one is needed"
        )
    return found[0]


def _parse(text: str) -> list[Document]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(text, Loader=loader) if document]


def _refuse_problems(documents: Sequence[Document]) -> None:
    from cluster.launch.lint import lint

    problems = lint(documents)
    if problems:
        lines = [f"{p.kind} {p.name}, {p.where}: {p.what}; {p.mend}" for p in problems]
        raise UserError("these manifests would not work:\n  " + "\n  ".join(lines))
