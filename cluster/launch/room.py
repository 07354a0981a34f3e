"""Whether the nodes of a cluster have room for a job's pods now: an estimate, not the scheduler."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.checks import Check
from cluster.launch.kubectl import Kubectl
from cluster.launch.sizes import group_index, quantity, read_group

Document = Mapping[str, Any]
# By resource, in base units: cores, bytes, pieces.
Amounts = dict[str, float]

_REQUESTS = (
    "{{range .spec.%s}}{{with .resources}}{{range $name, $amount := .requests}}"
    "{{$name}}={{$amount}},{{end}}{{end}};{{end}}"
)
# A line a pod: NODE|CPU=1,MEMORY=2Gi,;...|...; all that is known of thousands of pods is too much.
POD_LINES = (
    "{{range .items}}{{with .spec.nodeName}}{{.}}{{end}}|"
    + _REQUESTS % "containers"
    + "|"
    + _REQUESTS % "initContainers"
    + '{{"\\n"}}{{end}}'
)
_OWN_OVERLAY = "in an overlay of your own (docs/kubernetes.md, Changing things)"


@dataclass(frozen=True)
class _Pods:
    """Pods of one kind: for a person, their spec, what one needs, and how many."""

    what: str
    spec: Document
    need: Amounts
    number: int = 1

    def usable(self, nodes: Sequence[Document]) -> list[Document]:
        """The nodes that take such a pod when they are empty."""
        return [node for node in nodes if refusal(node, self.spec) is None]

    @property
    def gpus(self) -> float:
        return sum(amount for name, amount in self.need.items() if name.endswith("/gpu"))

    @property
    def size(self) -> str:
        parts = [f"{self.gpus:g} GPU"] if self.gpus else []
        parts += [f"{self.need['cpu']:g} CPU"] if "cpu" in self.need else []
        memory = [f"{self.need['memory'] / 2**30:.3g} GiB"] if "memory" in self.need else []
        return " and ".join([", ".join(parts), *memory] if parts else memory)


def pod_requests(spec: Document) -> Amounts:
    """What the scheduler sets aside for a pod."""
    given = {
        field: [_asked(container) for container in spec.get(field) or []]
        for field in ("containers", "initContainers")
    }
    return _set_aside(given["containers"], given["initContainers"])


def _asked(container: Document) -> Mapping[str, object]:
    resources = container.get("resources") or {}
    return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}


def _set_aside(
    containers: Sequence[Mapping[str, object]], before: Sequence[Mapping[str, object]]
) -> Amounts:
    total: Amounts = defaultdict(float)
    for asked in containers:
        for name, amount in asked.items():
            total[name] += quantity(amount)
    for asked in before:
        for name, amount in asked.items():
            total[name] = max(total[name], quantity(amount))
    total["pods"] = 1
    return total


def node_checks(kubectl: Kubectl, job: Document) -> Iterator[Check]:
    """Whether head, submitter and workers find a place on the nodes now.

    Raises:
        KubectlError: nodes or pods may not be looked at, or not in time.
    """
    nodes = kubectl.list("nodes")
    free, empty = _free(nodes, kubectl), {_name(node): _allocatable(node) for node in nodes}
    cluster, number = job["spec"]["rayClusterSpec"], read_group(job).low
    spec = cluster["workerGroupSpecs"][group_index(job)]["template"]["spec"]
    workers = _Pods("workers", spec, pod_requests(spec), number)
    for what, spec in _single(job):
        pods = _Pods(what, spec, pod_requests(spec))
        if not _place(pods, workers, nodes, free):
            yield _no_place(f"room for {what}", pods, 0, nodes, free, empty)
        _place(pods, workers, nodes, empty)
    fit = sum(_fitting(free[_name(node)], workers.need) for node in workers.usable(nodes))
    if fit >= number:
        found = f"{number} workers of {workers.size} fit now ({fit} would)"
        yield Check("room on the nodes", "ok", found)
    else:
        yield _no_place("room on the nodes", workers, fit, nodes, free, empty)


def _single(job: Document) -> Iterator[tuple[str, Document]]:
    """The pods that a job has one of."""
    spec = job["spec"]
    yield "the head", spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    submitter = spec.get("submitterPodTemplate")
    if submitter and spec.get("submissionMode", "K8sJobMode") == "K8sJobMode":
        yield "the submitter", submitter["spec"]


def _name(node: Document) -> str:
    return str(node["metadata"]["name"])


def _allocatable(node: Document) -> Amounts:
    amounts = (node.get("status") or {}).get("allocatable") or {}
    return {name: quantity(amount) for name, amount in amounts.items()}


def _free(nodes: Sequence[Document], kubectl: Kubectl) -> dict[str, Amounts]:
    """What pods that are there leave of each node."""
    free = {_name(node): _allocatable(node) for node in nodes}
    lines = kubectl.text(
        "get", "pods", "--all-namespaces", f"--output=go-template={POD_LINES}",
        "--field-selector=status.phase!=Succeeded,status.phase!=Failed",
    )  # fmt: skip
    for line in lines.splitlines():
        node, containers, before = line.split("|")
        if node in free:
            for name, amount in _set_aside(_read(containers), _read(before)).items():
                free[node][name] = free[node].get(name, 0.0) - amount
    return free


def _read(text: str) -> list[Mapping[str, object]]:
    """The requests of containers, from a part of a line."""
    return [
        dict(pair.split("=", 1) for pair in container.split(",") if pair)
        for container in text.split(";")
    ]


def _fitting(free: Amounts, need: Amounts) -> int:
    return max(
        0, min(int(free.get(name, 0.0) / amount) for name, amount in need.items() if amount > 0)
    )


def _place(
    pods: _Pods, workers: _Pods, nodes: Sequence[Document], free: dict[str, Amounts]
) -> bool:
    """Take room for one pod, where it costs the fewest workers; whether there was any."""
    usable = {_name(node) for node in workers.usable(nodes)}

    def lost(node: Document) -> int:
        here = free[_name(node)]
        if _name(node) not in usable:
            return 0
        return _fitting(here, workers.need) - _fitting(_less(here, pods.need), workers.need)

    fit = [node for node in pods.usable(nodes) if _fitting(free[_name(node)], pods.need)]
    if fit:
        name = _name(min(fit, key=lost))
        free[name] = _less(free[name], pods.need)
    return bool(fit)


def _less(free: Amounts, need: Amounts) -> Amounts:
    return {name: amount - need.get(name, 0.0) for name, amount in free.items()}


def _no_place(
    name: str,
    pods: _Pods,
    fit: int,
    nodes: Sequence[Document],
    free: Mapping[str, Amounts],
    empty: Mapping[str, Amounts],
) -> Check:
    """What keeps pods from the nodes, and what helps; ``empty``: if nothing but the job ran."""
    usable = pods.usable(nodes)
    room = {_name(node): empty[_name(node)] for node in usable}
    most = sum(_fitting(room[node], pods.need) for node in room)
    found = f"{fit} of {pods.number} {pods.what} of {pods.size} fit now, {most} if all were free"
    if pods.number == 1 and pods.what != "workers":
        found = f"{pods.what} ({pods.size}) fits on no node now"
    excluded = Counter(filter(None, (refusal(node, pods.spec) for node in nodes)))
    if excluded:
        why = ", ".join(f"{reason} ({number})" for reason, number in excluded.most_common())
        found += f"; {len(nodes) - len(usable)} of {len(nodes)} nodes are excluded: {why}"
    if not usable:
        mend = (
            "add nodes that take it, or change its tolerations, selector or affinity "
            + _OWN_OVERLAY
        )
    elif not most:
        found += f"; {_too_small(pods.need, list(room.values()))}"
        mend = f"add larger nodes, or ask for less {_OWN_OVERLAY}"
        mend += ", or give fewer --gpus" if pods.gpus > 1 else ""
    elif most < pods.number:
        mend = "it waits for ever unless nodes are added (by an autoscaler, perhaps): choose fewer "
        mend += "--nodes or --gpus"
    else:
        short = Counter(
            _scarcest(free[node], pods.need)
            for node in room
            if _fitting(free[node], pods.need) < _fitting(room[node], pods.need)
        )
        found += f"; short now: {', '.join(_word(name) for name in short)}"
        mend = "the job waits until there is room"
    return Check(name, "warning", found, mend)


def _too_small(need: Amounts, room: Sequence[Amounts]) -> str:
    """Which resource no node has enough of, even when it is empty."""
    short = []
    for name, amount in need.items():
        best = max(here.get(name, 0.0) for here in room)
        if best < amount:
            has = f"a node has {_amount(name, best)} at most" if best else "no node has any"
            short.append(f"{_word(name)}: {_amount(name, amount)} asked for, {has}")
    return "; ".join(short) or "no node has all of it at once"


def _scarcest(free: Amounts, need: Amounts) -> str:
    return min((n for n in need if need[n] > 0), key=lambda n: free.get(n, 0.0) / need[n])


def _word(name: str) -> str:
    return "CPU" if name == "cpu" else name


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.4g}Gi" if name == "memory" else f"{value:g}"


def refusal(node: Document, pod: Document) -> str | None:
    """Why a node takes no such pod, however empty it is; None if it does."""
    labels = node["metadata"].get("labels") or {}
    spec = node.get("spec") or {}
    if spec.get("unschedulable"):
        return "cordoned"
    for key, value in (pod.get("nodeSelector") or {}).items():
        if labels.get(key) != value:
            return f"{key} is not {value}"
    affinity = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is not None and not any(
        _is_meant(term, labels, _name(node)) for term in required.get("nodeSelectorTerms") or []
    ):
        return "node affinity"
    for taint in spec.get("taints") or []:
        is_tolerated = any(_tolerates(t, taint) for t in pod.get("tolerations") or [])
        if taint.get("effect") != "PreferNoSchedule" and not is_tolerated:
            return f"taint {taint.get('key')}"
    return None


def _is_meant(term: Document, labels: Mapping[str, str], name: str) -> bool:
    """Whether a term of a node selector selects a node; an empty one selects none."""
    rules = [(labels, rule) for rule in term.get("matchExpressions") or []]
    rules += [({"metadata.name": name}, rule) for rule in term.get("matchFields") or []]
    return bool(rules) and all(_fulfils(values, rule) for values, rule in rules)


def _fulfils(values: Mapping[str, str], rule: Document) -> bool:
    value, wanted = values.get(str(rule["key"])), rule.get("values") or []
    operator = rule["operator"]
    if operator in ("Gt", "Lt"):
        if value is None or not value.isdecimal():
            return False
        return int(value) > int(wanted[0]) if operator == "Gt" else int(value) < int(wanted[0])
    fulfilled: bool = {
        "In": value in wanted,
        "NotIn": value not in wanted,  # codespell:ignore
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }[operator]
    return fulfilled


def _tolerates(toleration: Document, taint: Document) -> bool:
    if toleration.get("effect") not in (None, "", taint.get("effect")):
        return False
    if toleration.get("operator") == "Exists":
        return toleration.get("key") in (None, "", taint.get("key"))
    same_key = toleration.get("key") == taint.get("key")
    return same_key and (toleration.get("value") or "") == (taint.get("value") or "")
