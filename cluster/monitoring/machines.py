"""Cluster: the machines under the runs, through our metrics and Ray's own."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as dm

from cluster.monitoring import promql as q
from cluster.monitoring.panels import (
    RAY_NODES_ID,
    RAY_UTILIZATION_ID,
    Query,
    Row,
    assemble,
    bars,
    curve,
    number,
    states,
)

FULL = ((None, "green"), (0.8, "orange"), (0.95, "red"))


def draw() -> dm.Dashboard:
    """The dashboard to look for a slow, full or lost machine."""
    rows = [_glance(), _together(), _ranks(), _by_machine(), _ray(), _gpus()]
    return assemble("cluster", "The machines: who is there, how busy, how full, how even.", rows)


def _ray_metric(name: str, *matchers: str) -> str:
    return f"ray_{name}{{{','.join((q.INSTANCE, *matchers))}}}"


def _each(name: str, factor: str = "") -> list[Query]:
    return [(f"max by (instance) ({_ray_metric(name)}){factor}", "{{instance}}")]


def _share(used: str, total: str) -> str:
    return f"sum({_ray_metric(used)}) / sum({_ray_metric(total)})"


def _glance() -> Row:
    up = f'up{{job="babelray",{q.INSTANCE}}}'
    return Row(
        "At a glance",
        [
            number(
                "Machines that answer",
                "Machines whose babelray metrics Prometheus can read.",
                f"sum({up})",
                "short",
                legend="machines",
            ),
            number(
                "Machines that do not",
                "Machines that should answer and do not.",
                f"count({up} == 0) or vector(0)",
                "short",
                legend="machines",
                steps=((None, "green"), (1, "orange")),
            ),
            number(
                "Live ranks",
                "Worker processes that live, of the chosen runs.",
                f"sum by (run) ({q.babelray('live_ranks', q.INSTANCE)})",
                "short",
            ),
            number(
                "CPU cores",
                "Of the Ray cluster.",
                f"sum({_ray_metric('node_cpu_count')})",
                "short",
                legend="cores",
            ),
            number(
                "CPU",
                "How busy the cores are.",
                f"avg({_ray_metric('node_cpu_utilization')}) / 100",
                "percentunit",
                legend="CPU",
                decimals=0,
                sparkline=True,
            ),
            number(
                "Memory",
                "Used, of all machines together.",
                _share("node_mem_used", "node_mem_total"),
                "percentunit",
                legend="memory",
                decimals=0,
                steps=FULL,
            ),
            number(
                "Fullest disk",
                "The fullest of the machines' disks.",
                f"max({_ray_metric('node_disk_utilization_percentage')}) / 100",
                "percentunit",
                legend="disk",
                decimals=0,
                steps=FULL,
            ),
            number(
                "Slowest rank",
                "Rank that needed the most time of its own a token.",
                f"{q.newest('slowest_rank')} or {q.newest('world_size')} * 0",
                "short",
            ),
        ],
    )


def _together() -> Row:
    nodes = curve(
        "Machines",
        "Machines of the Ray cluster, and those whose babelray metrics can be read.",
        [
            (f"count({_ray_metric('node_cpu_count')})", "Ray cluster"),
            (f'sum(up{{job="babelray",{q.INSTANCE}}})', "babelray"),
        ],
        "short",
        least=0,
        decimals=0,
    ).id(RAY_NODES_ID)
    busy = curve(
        "How busy the machines are",
        "All machines together.",
        [
            (f"avg({_ray_metric('node_cpu_utilization')}) / 100", "CPU"),
            (_share("node_mem_used", "node_mem_total"), "memory"),
            (f"max({_ray_metric('node_disk_utilization_percentage')}) / 100", "fullest disk"),
        ],
        "percentunit",
        least=0,
        most=1,
    ).id(RAY_UTILIZATION_ID)
    return Row("Together", [nodes, busy])


def _ranks() -> Row:
    live = q.babelray("live_ranks", q.INSTANCE)
    busy = q.babelray("rank_busy_seconds")
    return Row(
        "Ranks",
        [
            bars(
                "Own time of a step, by rank",
                "Mean time of a step that a rank spent on its own: a bar that stands out is a "
                "straggler.",
                [
                    (
                        f"sort_desc(max by (run, rank) ({busy}))",
                        "{{run}} rank {{rank}}",
                    )
                ],
                "s",
            ),
            curve(
                "Own time of a step: slowest, median, fastest rank",
                "The gap between the curves is time that the faster ranks wait.",
                [
                    (f"max by (run) ({busy})", "{{run}} slowest"),
                    (f"quantile by (run) (0.5, {busy})", "{{run}} median"),
                    (f"min by (run) ({busy})", "{{run}} fastest"),
                ],
                "s",
                least=0,
            ),
            curve(
                "Live ranks by machine",
                "A machine that falls to 0 has lost its ranks; they are started again.",
                [(f"max by (run, instance) ({live})", "{{run}} {{instance}}")],
                "short",
                stacked=True,
                least=0,
                decimals=0,
            ),
            curve(
                "Waiting for data, by machine",
                "Part of the ranks' time: one machine above the others has a slow disk or network.",
                [
                    (
                        q.share_of_step("data_wait", by="run, instance"),
                        "{{run}} {{instance}}",
                    )
                ],
                "percentunit",
                least=0,
            ),
        ],
    )


def _by_machine() -> Row:
    network = [
        (f"max by (instance) ({_ray_metric('node_network_receive_speed')})", "{{instance}} in"),
        (f"-max by (instance) ({_ray_metric('node_network_send_speed')})", "{{instance}} out"),
    ]
    disk = [
        (f"max by (instance) ({_ray_metric('node_disk_io_read_speed')})", "{{instance}} read"),
        (f"-max by (instance) ({_ray_metric('node_disk_io_write_speed')})", "{{instance}} written"),
    ]
    memory = (
        f"max by (instance) ({_ray_metric('node_mem_used')})"
        f" / max by (instance) ({_ray_metric('node_mem_total')})"
    )
    return Row(
        "By machine",
        [
            curve(
                "CPU",
                "How busy the cores of a machine are.",
                _each("node_cpu_utilization", " / 100"),
                "percentunit",
                least=0,
                most=1,
            ),
            curve(
                "Memory",
                "Used part; Ray ends the workers of a machine that nears 95 %.",
                [(memory, "{{instance}}")],
                "percentunit",
                least=0,
                most=1,
                steps=FULL,
            ),
            curve(
                "Network",
                "Received upwards, sent downwards.",
                network,
                "Bps",
            ),
            curve("Disk", "Read upwards, written downwards.", disk, "Bps"),
            curve(
                "Disk, used part",
                "A full disk stops checkpoints.",
                _each("node_disk_utilization_percentage", " / 100"),
                "percentunit",
                least=0,
                most=1,
                steps=FULL,
            ),
            curve(
                "Memory by kind of process",
                "Resident memory of Ray's processes, of kinds with more than 100 MB together; "
                "ray::… are workers and actors.",
                [
                    (
                        f"sum by (Component) ({_ray_metric('component_rss_bytes')}) > 1e8",
                        "{{Component}}",
                    )
                ],
                "bytes",
                stacked=True,
                least=0,
            ),
        ],
    )


def _ray() -> Row:
    answers = ((0, "does not answer", "red"), (1, "answers", "green"))
    return Row(
        "Ray and Prometheus",
        [
            states(
                "Targets",
                "Whether Prometheus could read the metrics of each machine.",
                [(f'up{{job=~"babelray|ray",{q.INSTANCE}}}', "{{job}} {{instance}}")],
                answers,
            ),
            curve(
                "Actors by state",
                "Ray's actors: workers, their controller and what serves them.",
                [('sum by (State) (ray_actors{Source="gcs"})', "{{State}}")],
                "short",
                least=0,
                decimals=0,
            ),
        ],
    )


def _gpus() -> Row:
    by_gpu = "max by (instance, GpuIndex)"
    used, free = _ray_metric("node_gram_used"), _ray_metric("node_gram_available")
    return Row(
        "GPUs and energy (where there are any)",
        [
            curve(
                "GPU",
                "How busy a GPU is; busy is not fast, see MFU on Run.",
                [
                    (
                        f"{by_gpu} ({_ray_metric('node_gpus_utilization')}) / 100",
                        "{{instance}} GPU {{GpuIndex}}",
                    )
                ],
                "percentunit",
                least=0,
                most=1,
            ),
            curve(
                "GPU memory",
                "Used part of a GPU's memory, by whatever process.",
                [
                    (
                        f"{by_gpu} ({used}) / ({by_gpu} ({used}) + {by_gpu} ({free}))",
                        "{{instance}} GPU {{GpuIndex}}",
                    )
                ],
                "percentunit",
                least=0,
                most=1,
                steps=FULL,
            ),
            curve(
                "GPU memory of the ranks",
                "The fullest rank's, as PyTorch sees it: allocated to tensors, reserved, and the "
                "peak.",
                [
                    (
                        f"max by (run, kind) ({q.babelray('gpu_memory_bytes')})",
                        "{{run}} {{kind}}",
                    )
                ],
                "bytes",
                least=0,
            ),
            curve(
                "GPU temperature",
                "Hot GPUs slow down: a straggler may be one.",
                [
                    (
                        f"{by_gpu} ({_ray_metric('node_gpu_temperature_celsius')})",
                        "{{instance}} GPU {{GpuIndex}}",
                    )
                ],
                "celsius",
            ),
            curve(
                "GPU power",
                "As the driver tells it.",
                [
                    (
                        f"{by_gpu} ({_ray_metric('node_gpu_power_milliwatts')}) / 1000",
                        "{{instance}} GPU {{GpuIndex}}",
                    )
                ],
                "watt",
                least=0,
            ),
            curve(
                "Power of the run",
                "Of the machines' GPUs and CPU packages, as far as they tell it.",
                [(q.rate("energy_joules_total", by="run, source"), "{{run}} {{source}}")],
                "watt",
                stacked=True,
                least=0,
            ),
        ],
        collapsed=True,
    )
