"""Costs of pruned networks (`--costs`): file size and latency, measured, as a table and as a figure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from tqdm import tqdm

from compress import SparseLinear, latency, shrink, stored_bytes, to_sparse
from prune import prune_model
from utils import COLORS, MARKERS, NAMES, Row, log_axis, new_figure, stretch_k_axis

BATCH_SIZES = (1, 256)  # images
ROUNDS, ROUND_SECONDS = 5, 0.1  # for every network and batch size
BUSY = 0.5  # of the median: where the quartiles lie further apart, something else ran on the machine


@dataclass(frozen=True)
class CostRow:
    """Costs of one pruned network in one form at one batch size: a line of cost_sparsity.csv."""

    method: str
    k_percent: float
    accuracy_percent: float
    form: str  # "dense" or "sparse" for weights, "shrunk" for units
    stored_bytes: int  # shrunk and compressed
    dense_bytes: int  # of the values of the unpruned state_dict
    batch_size: int
    latency_ms: float = 0.0  # median
    latency_iqr_ms: float = 0.0  # between the quartiles


def measure_costs(model: nn.Module, rows: Sequence[Row], images: Tensor, **pruning: Any) -> list[CostRow]:
    """Measure each row's network, pruned as `pruning` says, in each form that suits it, on 1 and 256 of `images`."""
    turns: list[tuple[CostRow, nn.Module, list[Any]]] = []
    dense_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    for row in rows:
        pruned = prune_model(model, row.method, row.k_percent / 100, **pruning)
        small = shrink(pruned)
        file_bytes = stored_bytes(small)
        forms = {"dense": pruned, "sparse": to_sparse(small)} if row.method == "weight" else {"shrunk": small}
        for form, network in forms.items():
            fields = (row.method, row.k_percent, row.accuracy_percent, form, file_bytes, dense_bytes)
            if form != "sparse" or any(isinstance(layer, SparseLinear) for layer in network.modules()):
                turns += [(CostRow(*fields, size), network, []) for size in BATCH_SIZES]
    for cost, network, times in tqdm(turns * ROUNDS, "costs", leave=False, disable=None):  # None: only on a terminal
        times.append(latency(network, images[: cost.batch_size], ROUND_SECONDS))
    merged = [(cost, times[0].merge(times)[0]) for cost, _, times in turns]
    return [replace(cost, latency_ms=1e3 * time.median, latency_iqr_ms=1e3 * time.iqr) for cost, time in merged]


def break_even(costs: Sequence[CostRow], batch_size: int) -> tuple[float, float | None, str]:
    """Latency of dense kernels in ms, the smallest k in % from which on sparse ones are faster, if any, and words."""
    rows = [row for row in costs if row.batch_size == batch_size]
    unpruned = [row for row in rows if row.form == "dense" or (row.form, row.k_percent) == ("shrunk", 0)]
    dense = float(np.median([row.latency_ms for row in unpruned]))
    if any(row.latency_iqr_ms > BUSY * row.latency_ms for row in rows if row.method == "weight"):
        return dense, None, "the machine is busy: no conclusion"
    times = {(row.form, row.k_percent): row.latency_ms for row in rows}
    slower = max((k for form, k in times if form == "sparse" and times[form, k] >= times["dense", k]), default=-1)
    found = min((k for form, k in times if form == "sparse" and k > slower), default=None)
    without = "sparse kernels do not pay" if "dense" in {row.form for row in rows} else ""  # units alone have none
    return dense, found, without if found is None else f"sparse kernels pay from k = {found:g} % on"


def format_costs(costs: Sequence[CostRow]) -> str:
    """A table for people: file and latency of every network in its fastest form, and when sparse kernels pay."""
    found = {size: break_even(costs, size) for size in sorted({row.batch_size for row in costs})}
    head = "".join(f"{f'batch {size}: ms':>22}{'speed-up':>10}" for size in found)
    lines = [f"{'k %':>13}{'file kB':>9}{'% of dense':>12}{head}", "-" * (34 + len(head))]
    dense, packed = costs[0].dense_bytes, max(row.stored_bytes for row in costs)
    for method, k in dict.fromkeys((row.method, row.k_percent) for row in costs):
        rows = [row for row in costs if (row.method, row.k_percent) == (method, k)]
        file = rows[0].stored_bytes
        lines.append(f"{NAMES[method]:7}{k:6g}{file / 1e3:9,.0f}{100 * file / dense:12.2f}")
        for size, (dense_ms, _, _) in found.items():
            best = min((row for row in rows if row.batch_size == size), key=lambda row: row.latency_ms)
            faster = "busy" if best.latency_iqr_ms > BUSY * best.latency_ms else f"{dense_ms / best.latency_ms:.2f}"
            lines[-1] += f"{f'{best.form} {best.latency_ms:.3g}':>22}{faster:>10}"
    lines.append(f"dense file: {dense / 1e6:.2f} MB, {packed / 1e6:.2f} MB in gzip ({packed / dense:.1%})")
    return "\n".join(lines + [f"batch {size}: {words}" for size, (_, _, words) in found.items() if words])


def plot_cost_sparsity(costs: Sequence[CostRow], title: str) -> Any:
    """A figure of four panels over k: accuracy, file size, the speed-up over dense, beside ms, at two batch sizes."""
    note = "bars: half the interquartile range of the latency to either side of its median"
    figure, (accuracy, file, *speeds) = new_figure(2, 2, title, note)
    for panel in (accuracy, file, *speeds):
        stretch_k_axis(panel, [row.k_percent for row in costs])
        panel.set_xlabel("pruned: k %")
    for method in dict.fromkeys(row.method for row in costs):
        points = {row.k_percent: row for row in costs if row.method == method}
        style: dict[str, Any] = {"color": COLORS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 2}
        accuracy.plot([*points], [row.accuracy_percent for row in points.values()], **style)
        file.plot([*points], [100 * row.stored_bytes / row.dense_bytes for row in points.values()], **style)
    accuracy.set(ylabel="accuracy, %", ylim=(0, 104))
    file.set_ylabel(f"file, % of dense ({costs[0].dense_bytes / 1e6:.2f} MB)")
    log_axis(file, "y")
    for panel, size in zip(speeds, sorted({row.batch_size for row in costs}), strict=True):
        dense, pays_from, words = break_even(costs, size)
        for method, form in dict.fromkeys((row.method, row.form) for row in costs):
            rows = [row for row in costs if (row.method, row.form, row.batch_size) == (method, form, size)]
            k, times, spreads = np.array([(row.k_percent, row.latency_ms, row.latency_iqr_ms) for row in rows]).T
            half = np.minimum(spreads / 2, 0.9 * times)  # no bar ends at infinity
            color, width, dot = ("0.6", 1, 3) if form == "dense" else (COLORS[method], 2, 5)
            label = f"{NAMES[method]}, {form}" + " kernels" * (form != "shrunk")
            panel.plot(k, dense / times, MARKERS[method] + "-", c=color, linewidth=width, markersize=dot, label=label)
            panel.vlines(k, dense / (times + half), dense / (times - half), color, linewidth=1)
        if pays_from is not None:
            panel.axvline(pays_from, color=COLORS["weight"], linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        panel.set_title(words, fontsize=9.5, color=COLORS["weight"])
        panel.set_ylabel(f"times as fast as dense (batch {size})")
        log_axis(panel, "y")
        milliseconds = panel.twinx()
        milliseconds.set(ylim=[dense / speed for speed in panel.get_ylim()], ylabel="ms")
        milliseconds.spines["top"].set_visible(False)
        log_axis(milliseconds, "y")
    accuracy.legend(*speeds[0].get_legend_handles_labels(), loc="lower left", fontsize=9.5, frameon=False)
    return figure
