"""Reckon time, tokens a second, traffic and money of a run on 1 to 512 GPUs: docs/scaling.md.

    python benchmarks/scaling.py          # all tables; writes results, page's tables, figure
    python benchmarks/scaling.py --gpus h100 --nodes 4 --network 400 --model big --price 2.5

The second reckons one cluster. --network is Gb/s of a node, all its adapters together. Nothing was
run on a GPU: scaling_model.py has the formulas, docs/scaling.md says how far off they were.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, machine, write_result
from scaling_data import GPUS, NETWORK_EFFICIENCY, PAPER_STEPS, PAPER_VOCABULARY
from scaling_model import (
    CHECKPOINT_BYTES,
    JOBS,
    Cluster,
    Job,
    Row,
    checks,
    efficiency,
    failures,
    flops_per_target_token,
    num_parameters,
    reckon,
)

PAGE = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "images" / "scaling.svg"
SIZES = (1, 8, 16, 32, 64, 128, 256, 512)
NETWORKS = (25, 100, 400, 3200)
# What nodes of the other kinds are sold with: DGX-1, DGX A100, and eight NDR adapters.
SOLD_WITH = (("v100-16", 400), ("a100-40", 1600), ("a100-80", 1600), ("h200", 3200))
# Of a checkpoint: what the copy of the state and the steps beside the writing cost (checkpoint.py,
# base, one rank on a CPU).
SAVE_S = 0.114 + 3.166


def print_checks(rows: list[dict[str, Any]]) -> None:
    """Published against predicted, milliseconds a step."""
    head = f"{'':40}{'published':>10}{'overlapped':>18}{'one by one':>18}"
    print(f"\npublished steps, ms; the model is set by the first alone\n{head}")
    for row in rows:
        line = f"{row['name']:40}{row['published_ms']:10.1f}"
        for kind in ("overlapped", "serial"):
            if row[f"{kind}_ms"] is not None:
                line += f"{row[f'{kind}_ms']:10.1f} {row[f'{kind}_error']:+7.0%}"
        print(line)


def money(row: Row, price: float | None) -> str:
    """Dollars, or nothing without a price."""
    return "" if price is None else f"{row.gpu_hours * price:,.0f}"


def print_rows(job: Job, gpu: str, networks: tuple[float, ...], price: float | None) -> list[Row]:
    """One job on clusters of one kind."""
    print(
        f"\n{job.name}: {job.steps:,} steps of {job.tokens_per_step:,} tokens a side, {gpu}\n"
        f"{'Gb/s':>6}{'GPUs':>5}{'lanes':>6}{'ms':>8}{'overl.':>8}{'Mtok/s':>8}{'hours':>8}"
        f"{'GPU h':>8}{'$':>8}{'GB out':>8}  bound by"
    )
    found = []
    for network in networks:
        for gpus in SIZES:
            if gpus <= 8 and network != networks[0]:
                continue  # the network does not matter
            row = reckon(job, Cluster(GPUS[gpu], gpus, network))
            name = "-" if gpus <= 8 else f"{network:g}"
            if isinstance(row, str):
                print(f"{name:>6}{gpus:5}  {row}")
                continue
            found.append(row)
            print(
                f"{name:>6}{gpus:5}{row.lanes_per_rank:6}{row.step_s * 1e3:8.1f}"
                f"{row.overlapped_step_s * 1e3:8.1f}{row.target_tokens_per_s / 1e6:8.2f}"
                f"{row.hours:8.2f}{row.gpu_hours:8.0f}{money(row, price):>8}"
                f"{row.node_gb_per_step:8.2f}  {row.bound}"
            )
    return found


def print_failures() -> list[dict[str, float]]:
    """What failures and checkpoints cost, by size."""
    print(f"\n{'GPUs':>5}{'MTBF, h':>9}{'best, min':>10}{'lost':>9}{'lost, 10 min':>13}")
    rows = []
    for gpus in SIZES:
        best, every_10 = failures(gpus, SAVE_S), failures(gpus, SAVE_S, 600.0)
        rows.append({"gpus": gpus, **asdict(best), "lost_share_10_min": every_10.lost_share})
        print(
            f"{gpus:5}{best.mtbf_h:9.0f}{best.best_interval_s / 60:10.0f}"
            f"{best.lost_share:9.3%}{every_10.lost_share:13.3%}"
        )
    return rows


def draw(file: Path, gpu: str) -> None:
    """Hours against GPUs, a line a network, marked by what bounds them."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "babelray"
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    colours = {
        "compute": "#1b9e77",
        "network bandwidth": "#d95f02",
        "CPU launches": "#7570b3",
        "NVLink": "#e6ab02",
        "latency": "#e7298a",
        "optimizer": "#a6761d",
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    seen: set[str] = set()
    for axis, name in zip(axes, ("big, the paper's", "big, large batches"), strict=True):
        (job,) = (job for job in JOBS if job.name == name)
        last = 0
        for network in NETWORKS:
            rows = [reckon(job, Cluster(GPUS[gpu], gpus, network)) for gpus in SIZES]
            known = [row for row in rows if isinstance(row, Row)]
            axis.plot([r.gpus for r in known], [r.hours for r in known], color="#999", zorder=1)
            for row in known:
                colour = colours[row.bound]
                axis.scatter(row.gpus, row.hours, color=colour, s=34, zorder=2)
            seen |= {row.bound for row in known}
            last = max(last, known[-1].gpus)
            axis.annotate(
                f"{network} Gb/s",
                (known[-1].gpus, known[-1].hours),
                xytext=(7, -3),
                textcoords="offset points",
                fontsize=8,
            )
        ideal = reckon(job, Cluster(GPUS[gpu], 1, 0))
        assert isinstance(ideal, Row)
        axis.plot(SIZES, [ideal.hours / n for n in SIZES], "--", color="#bbb", lw=1, zorder=0)
        axis.set(xscale="log", yscale="log", xlabel=f"GPUs ({gpu.upper()}, 8 a node)")
        axis.set_xlim(0.8, 3000)
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.minorticks_off()
        axis.set_title(f"{name}\n{job.steps:,} x {job.tokens_per_step:,} tokens", fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("hours, reckoned")
    ticks = (0.05, 0.1, 0.3, 1, 3, 10, 30)
    axes[0].set_yticks(ticks, [str(t) for t in ticks])
    marks = [
        Line2D([], [], marker="o", ls="", color=colour, label=name)
        for name, colour in colours.items()
        if name in seen
    ]
    marks.append(Line2D([], [], ls="--", color="#bbb", label="one GPU's time / GPUs"))
    axes[0].legend(handles=marks, fontsize=8, title="bound by", title_fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def page_tables() -> dict[str, str]:
    """The tables of docs/scaling.md by name, in Markdown."""
    lines = [
        "| | published | overlapped | error | one by one | error |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in checks():
        cells = [f"[{row['name']}]({row['source']})", f"{row['published_ms']:.1f}"]
        for kind in ("overlapped", "serial"):
            known = row[f"{kind}_ms"] is not None
            cells.append(f"{row[f'{kind}_ms']:.1f}" if known else "")
            cells.append(f"{row[f'{kind}_error']:+.0%}" if known else "")
        if row["calibrates"]:
            cells[3] = cells[5] = "set by it"
        lines.append(f"| {' | '.join(cells)} |")
    tables = {"checks": "\n".join(lines)}
    for job in JOBS:
        if job.name != "base, large batches":
            tables[job.name] = "\n".join(_page_rows(job))
    return tables


def _page_rows(job: Job) -> list[str]:
    lines = [
        "| GPUs | Gb/s a node | ms a step | with overlap | M tokens/s | hours | GPU hours "
        "| TB a node | bound by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    # A choice: scaling.json has all sizes.
    kinds: list[tuple[str, float, int]] = [("h100", 0, 1), ("h100", 0, 8), ("h100", 25, 16)]
    kinds += [("h100", n, gpus) for n in NETWORKS[1:] for gpus in (16, 64, 512)]
    kinds += [(gpu, n, gpus) for gpu, n in SOLD_WITH if gpu != "a100-40" for gpus in (8, 64, 512)]
    refused: dict[str, None] = {}
    for gpu, network, gpus in kinds:
        row = reckon(job, Cluster(GPUS[gpu], gpus, network))
        if isinstance(row, str):
            refused[f"{gpus} GPUs: {row}"] = None
            continue
        between_nodes = f"{network:,}" if gpus > 8 else "–"
        lines.append(
            f"| {gpus} {gpu} | {between_nodes} | {row.step_s * 1e3:.1f} "
            f"| {row.overlapped_step_s * 1e3:.1f} | {row.target_tokens_per_s / 1e6:.2f} "
            f"| {row.hours:.2f} | {row.gpu_hours:,.0f} "
            f"| {row.node_gb_per_step * job.steps / 1e3:,.0f} | {row.bound} |"
        )
    if refused:
        lines += ["", "Not possible: " + "; ".join(refused) + "."]
    return lines


def between(page: str, name: str) -> str:
    """What the page has between the marks of a table."""
    _, _, rest = page.partition(f"<!-- {name}: begin -->\n")
    return rest.partition(f"\n<!-- {name}: end -->")[0]


def fill_page(file: Path) -> None:
    """Put the tables between their marks."""
    page = file.read_text()
    for name, table in page_tables().items():
        before, begin, rest = page.partition(f"<!-- {name}: begin -->\n")
        _, end, after = rest.partition(f"\n<!-- {name}: end -->")
        if not (begin and end):
            raise SystemExit(f"{file}: has no marks for the table {name!r}")
        page = before + begin + table + end + after
    file.write_text(page)


def everything(output: Path, figure: Path) -> None:
    """All tables, the result and the figure."""
    before = machine()
    for model in ("base", "big"):
        print(
            f"{model}: {num_parameters(model, PAPER_VOCABULARY) / 1e6:.1f} M parameters, "
            f"{flops_per_target_token(model, PAPER_VOCABULARY) / 1e9:.3f} GFLOP a target token"
        )
    print(f"products reach {efficiency():.1%} of the peak")
    published = checks()
    print_checks(published)
    rows: list[Row] = []
    for job in JOBS:
        rows += print_rows(job, "h100", NETWORKS, GPUS["h100"].price)
    for gpu, network in SOLD_WITH:
        for job in JOBS:
            rows += print_rows(job, gpu, (network,), GPUS[gpu].price)
    lost = print_failures()
    draw(figure, "h100")
    fill_page(PAGE)
    content = {
        "efficiency": efficiency(),
        "checks": published,
        "rows": [_short(asdict(row)) for row in rows],
        "failures": lost,
    }
    write_result(output, before, content)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits are more than the model knows."""
    return {
        name: _short(value)
        if isinstance(value, dict)
        else float(f"{value:.4g}")
        if isinstance(value, float)
        else value
        for name, value in row.items()
    }


def one(arguments: argparse.Namespace) -> None:
    """One cluster, in full."""
    gpus = arguments.nodes * arguments.gpus_per_node
    job = Job(
        "yours", arguments.model, arguments.tokens_per_step, arguments.steps, arguments.vocabulary
    )
    gpu = GPUS[arguments.gpus]
    cluster = Cluster(
        gpu, gpus, arguments.network, arguments.gpus_per_node, arguments.network_efficiency
    )
    row = reckon(job, cluster, stage=arguments.zero_stage)
    if isinstance(row, str):
        raise SystemExit(f"{gpus} x {arguments.gpus} cannot: {row}")
    price = arguments.price if arguments.price is not None else gpu.price
    size_gb = num_parameters(job.model, job.vocabulary) * CHECKPOINT_BYTES / 1e9
    lost = failures(gpus, SAVE_S)
    print(f"{job.model}, {job.steps:,} steps of {job.tokens_per_step:,} tokens a side")
    print(f"on {arguments.nodes} nodes of {arguments.gpus_per_node} x {arguments.gpus}, ", end="")
    print(f"{arguments.network:g} Gb/s a node, ZeRO {arguments.zero_stage}")
    shown = {
        "bound by": row.bound,
        "a step": f"{row.step_s * 1e3:.1f} ms ({row.overlapped_step_s * 1e3:.1f} with overlap)",
        **{f"  {name}": f"{seconds * 1e3:.1f} ms" for name, seconds in row.parts.items()},
        "lanes": f"{row.lanes_per_rank} a rank of {row.tokens_per_lane:,} tokens: data.lanes="
        f"{row.lanes_per_rank * gpus}, imbalance {row.imbalance:.3f}",
        "target tokens a second": f"{row.target_tokens_per_s:,.0f}",
        "a node sends": f"{row.node_gb_per_step:.2f} GB a step, "
        f"{row.node_gb_per_step * job.steps / 1e3:,.1f} TB in all",
        "time": f"{row.hours:.2f} hours, {row.gpu_hours:,.0f} GPU hours",
        "money": f"{money(row, price)} dollars at {price} a GPU hour" if price else "give --price",
        "checkpoint": f"{size_gb:.2f} GB; best every {lost.best_interval_s / 60:.0f} minutes",
        "failures": f"one in {lost.mtbf_h:,.0f} hours, {lost.lost_share:.2%} of the time lost",
    }
    for name, value in shown.items():
        print(f"{name:24}{value}")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", choices=sorted(GPUS), help="kind; reckons one cluster")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--network", type=float, default=400, help="Gb/s of a node")
    parser.add_argument("--network-efficiency", type=float, default=NETWORK_EFFICIENCY)
    parser.add_argument("--model", choices=("base", "big"), default="big")
    parser.add_argument("--tokens-per-step", type=int, default=25_000)
    parser.add_argument("--steps", type=int, help="default: the paper's")
    parser.add_argument("--vocabulary", type=int, default=PAPER_VOCABULARY)
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    parser.add_argument("--price", type=float, help="dollars a GPU hour")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    arguments = parser.parse_args(argv)
    if arguments.nodes < 1 or arguments.gpus_per_node < 1:
        parser.error("--nodes and --gpus-per-node must be at least 1")
    if arguments.nodes > 1 and arguments.network <= 0:
        parser.error("--network must be more than 0 between nodes")
    if arguments.steps is None:
        arguments.steps = PAPER_STEPS[arguments.model]
    if arguments.gpus is None:
        everything(arguments.output, arguments.figure)
    else:
        one(arguments)


if __name__ == "__main__":
    main()
