"""Rows of numbers, and what people read in them: curves, tables, CSV files, plots."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from utils import atomic_write

if TYPE_CHECKING:  # importing matplotlib takes a second, and only the plots need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLAT_POINTS = 0.5  # a curve is flat where it is within so many points of dense
NEAR_POINTS = 2.5  # below dense: how far down the upper panel of a plot shows
CHANCE = 10.0  # accuracy of a guess among ten classes, in %
# Okabe and Ito's colors, told apart by every kind of color vision.
COLORS = {"weight": "#0072B2", "unit": "#D55E00", "random_weight": "#56B4E9", "random_unit": "#E69F00"}
NAMES = {method: method.replace("_", " ") + "s" for method in COLORS}


@dataclass(frozen=True)
class Row:
    """One point of one network's curve: a line of accuracy_sparsity.csv. Percentages are from 0 to 100."""

    seed: int
    method: str
    scope: str
    k_percent: float
    achieved_percent: float
    weights_kept: int  # non-zero weights of the shrunk network: what has to be stored and multiplied
    accuracy_percent: float
    finetuned_percent: float | None = None


@dataclass(frozen=True)
class CostRow:
    """What one pruned network costs in one form at one batch size: a line of cost_sparsity.csv."""

    method: str
    k_percent: float
    accuracy_percent: float
    form: str  # "dense", "sparse" or "shrunk"
    stored_bytes: int
    batch_size: int
    latency_ms: float  # median
    latency_iqr_ms: float  # between the quartiles


def write_csv(path: Path, rows: Sequence[Row] | Sequence[CostRow]) -> None:
    """Write rows under a header of their field names, whole or not at all; None becomes a blank.

    Raises:
        ValueError: there are no rows.
        OSError: the file cannot be written.
    """
    if not rows:
        raise ValueError("there are no rows to write")
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [column.name for column in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = asdict(row).items()
            writer.writerow({name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in cells})


class Curve(NamedTuple):
    """One method's points over k, averaged over the seeds; each field (points,), in % but for the weights."""

    k: np.ndarray
    mean: np.ndarray
    std: np.ndarray  # sample standard deviation; 0 with one seed
    weights: np.ndarray  # mean number of weights kept


def curves(rows: Sequence[Row], column: str = "accuracy_percent") -> dict[str, Curve]:
    """The mean curve of every method.

    Args:
        rows: of any number of seeds, each with the same points.
        column: "accuracy_percent" or "finetuned_percent".

    Returns:
        Method → curve, in the order of the rows; methods whose column is blank are left out.

    Raises:
        ValueError: no rows, an unknown method, or seeds whose points differ.
    """
    if not rows:
        raise ValueError("there are no rows")
    if unknown := {row.method for row in rows} - NAMES.keys():
        raise ValueError(f"unknown methods {', '.join(unknown)}: expected {', '.join(NAMES)}")
    found = {}
    for method in dict.fromkeys(row.method for row in rows):
        points: dict[float, list[Row]] = {}
        for row in rows:
            if row.method == method and getattr(row, column) is not None:
                points.setdefault(row.k_percent, []).append(row)
        if points:
            values = np.array([[getattr(row, column) for row in point] for point in points.values()])  # (points, seeds)
            std = values.std(axis=1, ddof=1) if values.shape[1] > 1 else np.zeros(len(values))
            weights = np.array([np.mean([row.weights_kept for row in point]) for point in points.values()])
            found[method] = Curve(np.array(list(points)), values.mean(axis=1), std, weights)
    return found


def flat_until(curve: Curve, dense: float) -> float | None:
    """Largest k such that the mean accuracy at it and at every smaller k is within 0.5 points of dense.

    Args:
        curve: k ascending.
        dense: mean accuracy of the unpruned networks in %.

    Returns:
        k in %, or None where the first point already lies lower.
    """
    lower = curve.mean < dense - FLAT_POINTS - 1e-9  # the slack is for binary fractions, far below one image
    flat = int(lower.argmax()) if lower.any() else len(lower)
    return float(curve.k[flat - 1]) if flat else None


def bend(curve: Curve) -> float | None:
    """The k at which the curve bends: where it lies highest above the straight line between its two ends.

    Args:
        curve: k ascending.

    Returns:
        k in %, or None for a curve that nowhere lies above that line.

    Source: the "knee" of Satopaa et al. 2011, Finding a "Kneedle" in a Haystack, without smoothing.
    """
    chord = np.interp(curve.k, curve.k[[0, -1]], curve.mean[[0, -1]])
    above = curve.mean - chord
    return float(curve.k[above.argmax()]) if above.max() > 0 else None


def dense_accuracy(rows: Sequence[Row]) -> float:
    """Mean accuracy in % of the unpruned networks, those at k = 0.

    Raises:
        ValueError: there are none.
    """
    dense = [row.accuracy_percent for row in rows if row.k_percent == 0]
    if not dense:
        raise ValueError("there is no row at k = 0")
    return float(np.mean(dense))


def format_facts(rows: Sequence[Row]) -> str:
    """A line a method: up to which k it is flat, and where it bends."""
    dense = dense_accuracy(rows)
    lines = []
    for column, how in (("accuracy_percent", ""), ("finetuned_percent", ", fine-tuned")):
        for method, curve in curves(rows, column).items():
            flat, knee = flat_until(curve, dense), bend(curve)
            lines.append(
                f"{NAMES[method]}{how}: "
                + ("nowhere flat" if flat is None else f"flat up to k = {flat:g} %")
                + f" (within {FLAT_POINTS} points of dense, {dense:.2f} %)"
                + ("" if knee is None else f", bends at k = {knee:g} %")
            )
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> str:
    """A table for people: one line a k; accuracy (mean ± std over seeds) and weights kept of each method."""
    accuracy, finetuned = curves(rows), curves(rows, "finetuned_percent")
    several = len({row.seed for row in rows}) > 1

    def cells(curve: Curve) -> list[str]:
        pairs = zip(curve.mean, curve.std, strict=True)
        return [f"{mean:.2f} ± {std:.2f}" if several else f"{mean:.2f}" for mean, std in pairs]

    columns = [["k %", *(f"{k:g}" for k in next(iter(accuracy.values())).k)]]
    for method, curve in accuracy.items():
        columns.append([f"{NAMES[method]}: accuracy %", *cells(curve)])
        if method in finetuned:
            columns.append(["fine-tuned %", *cells(finetuned[method])])
        columns.append(["weights kept", *(f"{kept:,.0f}" for kept in curve.weights)])
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


# ── plots ──
# Figures are made without pyplot: no window, no DISPLAY, no state between them.


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)


def _figure(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple["Figure", list["Axes"]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(np.ravel(figure.subplots(rows, columns, **shared)))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=9)
    return figure, panels


def _log_scale(axes: "Axes", which: Literal["x", "y"]) -> None:
    """A logarithmic axis whose ticks read 20, 50, 100, and not as powers of ten."""
    from matplotlib.ticker import LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.minorticks_off()


def _stretch_k(axes: "Axes", ks: np.ndarray) -> None:
    """Scale the k axis by the logarithm of what is left, so that 90 … 99 % take as much room as 0 … 90 %."""
    left_at_100 = 0.4  # %: where k = 100, with nothing left, is drawn
    axes.set_xscale(
        "function",
        functions=(
            lambda k: -np.log10(np.maximum(100 + left_at_100 - k, left_at_100 / 2) / 100),  # the margin beyond 100
            lambda x: 100 + left_at_100 - 100 * 10**-x,
        ),
    )
    axes.set_xticks(ks, [f"{k:g}" for k in ks])
    axes.minorticks_off()
    axes.autoscale(axis="x")  # what was drawn before had its margins on the linear axis


def _draw(axes: "Axes", x: np.ndarray, curve: Curve, method: str, *, dashed: bool = False) -> None:
    thin = method.startswith("random")
    style = ":" if thin else "--" if dashed else "-"
    label = NAMES[method] + (", fine-tuned" if dashed else "")
    marker = "o" if method.endswith("weight") else "s"
    axes.plot(
        x, curve.mean, style, color=COLORS[method], label=label, marker=marker,
        linewidth=1 if thin else 1.8, markersize=3 if thin else 4.5, markerfacecolor="white" if dashed else None,
    )  # fmt: skip
    if curve.std.any():
        band = (curve.mean - curve.std, np.minimum(curve.mean + curve.std, 100))
        axes.fill_between(x, *band, color=COLORS[method], alpha=0.18, linewidth=0)


def plot_accuracy_sparsity(rows: Sequence[Row], title: str) -> "Figure":
    """Accuracy against k: above, the points around dense, with the end of each flat region marked; below, the whole.

    Args:
        rows: the points; with several seeds their mean is drawn in a band of ± one sample standard deviation.
        title: what was trained, in one line.
    """
    figure, panels = _plot_accuracy(rows, title, lambda curve: curve.k)
    _stretch_k(panels[0], np.array(sorted({row.k_percent for row in rows})))  # the panels share it
    _mark_flat(panels[0], rows)
    panels[1].set_xlabel("pruned: k % of each layer (axis stretched by the logarithm of what is left)")
    return figure


def plot_accuracy_weights(rows: Sequence[Row], title: str) -> "Figure":
    """Accuracy against the weights that remain, on a logarithmic axis: the comparison at equal size.

    Args: as `plot_accuracy_sparsity`.
    """
    # A logarithmic axis has no place for none.
    figure, panels = _plot_accuracy(rows, title, lambda curve: np.where(curve.weights > 0, curve.weights, np.nan))
    _log_scale(panels[0], "x")
    panels[0].invert_xaxis()
    panels[1].set_xlabel("weights remaining (logarithmic; fewer to the right)")
    return figure


def _plot_accuracy(
    rows: Sequence[Row], title: str, place: Callable[[Curve], np.ndarray]
) -> tuple["Figure", list["Axes"]]:
    """Every curve of the rows twice, near dense and whole, at the x that `place` gives."""
    figure, panels = _figure(2, 1, (8, 6.4), sharex=True, height_ratios=(2, 3))
    dense = dense_accuracy(rows)
    for panel in panels:
        panel.axhspan(dense - FLAT_POINTS, dense, color="0.93", linewidth=0, zorder=0)
        for level in (dense, CHANCE):
            panel.axhline(level, color="0.6", linewidth=0.8, zorder=0)
        for column in ("accuracy_percent", "finetuned_percent"):
            for method, curve in curves(rows, column).items():
                _draw(panel, place(curve), curve, method, dashed=column == "finetuned_percent")
        panel.set_ylabel("accuracy, %")
    panels[0].set_ylim(dense - NEAR_POINTS, min(dense + NEAR_POINTS / 4, 100))
    panels[1].set_ylim(0, 104)
    _name_level(panels[0], dense, f"dense {dense:.2f} %", 0.995)
    _name_level(panels[0], dense - FLAT_POINTS, f"{FLAT_POINTS} points below", 0.995, below=True)
    _name_level(panels[1], CHANCE, f"chance {CHANCE:.0f} %", 0.005)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    _add_legend(figure, panels[1])
    return figure, panels


def _add_legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)


def _name_level(axes: "Axes", level: float, name: str, end: float, *, below: bool = False) -> None:
    """Name a horizontal line above or below its left (end = 0) or right (1) end."""
    axes.annotate(
        name, (end, level), (0, -2 if below else 2), xycoords=("axes fraction", "data"), textcoords="offset points",
        fontsize=8, color="0.4", ha="right" if end > 0.5 else "left", va="top" if below else "bottom",
    )  # fmt: skip


def _mark_flat(axes: "Axes", rows: Sequence[Row]) -> None:
    """Where the curves of weights and units are flat to; that of the fine-tuned ones only in words."""
    dense, tuned = dense_accuracy(rows), curves(rows, "finetuned_percent")
    ends = {method: flat_until(curve, dense) for method, curve in curves(rows).items() if method in ("weight", "unit")}
    found = sorted((k, method) for method, k in ends.items() if k is not None)
    for place, (k, method) in enumerate(found):
        color = COLORS[method]
        then = flat_until(tuned[method], dense) if method in tuned else None
        words = f"{NAMES[method]} flat to {k:g} %" + ("" if then is None else f"\nfine-tuned: to {then:g} %")
        axes.axvline(k, color=color, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        # The two labels stand above the axes and point away from each other, for their lines may be close.
        axes.annotate(
            words, (k, 1), (0, 3), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=color, fontsize=9, ha="left" if place else "right", va="bottom",
        )  # fmt: skip


def break_even(rows: Sequence[CostRow], batch_size: int) -> float | None:
    """Smallest k from which on the sparse form is faster than the dense one, by the medians.

    Args:
        rows: the costs of one network, with both forms of every weight-pruned copy.
        batch_size: which of the measured ones.

    Returns:
        k in %, or None where it is slower even at the last k.
    """
    forms: dict[str, dict[float, float]] = {"dense": {}, "sparse": {}}
    for row in rows:
        if row.method == "weight" and row.batch_size == batch_size:
            forms[row.form][row.k_percent] = row.latency_ms
    found = None
    for k in sorted(forms["sparse"], reverse=True):
        if forms["sparse"][k] >= forms["dense"][k]:
            break
        found = k
    return found


def pays(k: float | None) -> str:
    """What `break_even` found, in words."""
    return "do not pay" if k is None else f"pay from k = {k:g} % on"


def plot_cost_sparsity(rows: Sequence[CostRow], title: str) -> "Figure":
    """Four panels over k: accuracy, file size, and latency at either batch size, dense as the reference line.

    Units are drawn as the smaller networks that they leave. Weights are drawn in the faster of their two forms, with
    the other as a thin line; the k from which sparse kernels pay is marked.

    Args:
        rows: the costs of one network at two batch sizes.
        title: what was measured and on what, in one line.
    """
    small, large = sorted({row.batch_size for row in rows})
    figure, panels = _figure(2, 2, (11, 7.2))
    accuracy, size, *latencies = panels
    ks = np.array(sorted({row.k_percent for row in rows}))
    for panel in panels:
        _stretch_k(panel, ks)
        panel.set_xlabel("pruned: k %")
    dense_bytes = max(row.stored_bytes for row in rows)
    for method in ("weight", "unit"):
        marker = "o-" if method == "weight" else "s-"
        points = [row for row in rows if row.method == method and row.batch_size == small and row.form != "sparse"]
        k = [row.k_percent for row in points]
        left = [100 * row.stored_bytes / dense_bytes for row in points]
        accuracy.plot(k, [row.accuracy_percent for row in points], marker, color=COLORS[method], label=NAMES[method])
        size.plot(k, left, marker, color=COLORS[method])
    accuracy.set(ylabel="accuracy, %", ylim=(0, 104))
    size.set_ylabel(f"file, % of dense ({dense_bytes / 1e6:.2f} MB)")
    _log_scale(size, "y")
    for panel, batch_size in zip(latencies, (small, large), strict=True):
        for method in ("weight", "unit"):
            _draw_latency(panel, [row for row in rows if row.method == method and row.batch_size == batch_size])
        panel.set_ylabel(f"latency, ms (batch {batch_size})")
        _log_scale(panel, "y")
        k_pays = break_even(rows, batch_size)
        if k_pays is not None:
            panel.axvline(k_pays, color=COLORS["weight"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        panel.set_title(f"sparse kernels {pays(k_pays)}", fontsize=9, color=COLORS["weight"])
    key = "latency: median ± half the interquartile range; gray: dense; dotted: the slower of dense and sparse kernels"
    figure.suptitle(f"{title}\n{key}", fontsize=10)
    _add_legend(figure, accuracy)
    return figure


def _draw_latency(axes: "Axes", rows: Sequence[CostRow]) -> None:
    """One method's latency: the fastest form at every k thick, with bars of its spread; each form thin."""
    color = COLORS[rows[0].method]
    if dense := [row.latency_ms for row in rows if row.form == "dense"]:  # zeros cost them what other weights do
        axes.axhline(float(np.median(dense)), color="0.6", linewidth=0.8, zorder=0)
    for form in dict.fromkeys(row.form for row in rows):
        points = [row for row in rows if row.form == form]
        axes.plot([row.k_percent for row in points], [row.latency_ms for row in points], ":", color=color, linewidth=1)
    best = [
        min((row for row in rows if row.k_percent == k), key=lambda row: row.latency_ms)
        for k in dict.fromkeys(row.k_percent for row in rows)
    ]
    bars = [min(row.latency_iqr_ms / 2, 0.9 * row.latency_ms) for row in best]  # a logarithmic axis has no zero
    marker = "o" if rows[0].method == "weight" else "s"
    k, latency = [row.k_percent for row in best], [row.latency_ms for row in best]
    axes.errorbar(k, latency, bars, color=color, marker=marker, markersize=4, linewidth=1.8, capsize=2)
