"""Small functions: l2; rows of results, and what people read in them: facts, a table, a CSV file, the plots."""

import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from system import say, write_file

if TYPE_CHECKING:  # matplotlib is imported where a plot is drawn: one that is broken costs the plots alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLAT_POINTS = 0.5  # below dense: a curve is flat to there
GUESSING = 15.0  # accuracy in %: less is no better than a guess among ten classes
MANY_SEEDS = 8  # more are drawn as a band
TEXT = 9.5  # points
# Okabe and Ito's colors, told apart by every kind of color vision.
COLORS = {"weight": "#0072B2", "unit": "#D55E00", "random_weight": "#56B4E9", "random_unit": "#E69F00"}
MARKERS = {"weight": "o", "unit": "s", "random_weight": "^", "random_unit": "v"}
NAMES = {method: method.replace("_", " ") + "s" for method in COLORS}
FINETUNED = ", fine-tuned"  # ends the name of a curve
Published = tuple[str, int, float]  # others' network beside ours: its name, weights left of 266,200, accuracy in %
LENET_300_100 = (("Han 2015", 22_000, 98.4), ("Guo 2016", 4_800, 98.0), ("Molchanov 2017", 3_900, 98.1))
digits = partial(np.format_float_positional, trim="-")  # all that a k has: 99.99999 and 99.999991 differ


def l2(weight: torch.Tensor) -> torch.Tensor:
    """L2 norm, (out,), of every unit of a weight, (out, …).

    >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


@dataclass(frozen=True)
class Row:
    """One point of one network's curve: a line of accuracy_sparsity.csv. Percentages are from 0 to 100."""

    seed: int | None  # None where a loaded network's is unknown
    method: str
    scope: str
    k_percent: float
    achieved_percent: float
    weights_kept: int  # non-zero ones of the shrunk network, fine-tuned if that was asked for: stored and multiplied
    accuracy_percent: float
    finetuned_percent: float | None = None


class Curve(NamedTuple):
    """One method's points over k, ascending."""

    method: str
    finetuned: bool
    k: np.ndarray  # (points,) %
    mean: np.ndarray  # (points,) accuracy over the seeds, %
    values: np.ndarray  # (points, seeds) accuracy, %
    weights: np.ndarray  # (points, seeds) weights kept


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Name → curve of every method, then those after fine-tuning; ValueError unless every seed has one row a k."""
    found = {}
    for finetuned, method in product((False, True), dict.fromkeys(row.method for row in rows)):
        own = sorted((row for row in rows if row.method == method), key=lambda row: (row.k_percent, row.seed or 0))
        k, seeds = sorted({row.k_percent for row in own}), dict.fromkeys(row.seed for row in own)
        if method not in NAMES or [(row.k_percent, row.seed) for row in own] != list(product(k, seeds)):
            raise ValueError(f"{method}: expected one of {', '.join(NAMES)}, with one row for each k of each seed")
        points = [(row.weights_kept, row.finetuned_percent if finetuned else row.accuracy_percent) for row in own]
        weights, values = np.array(points, float).T.reshape(2, len(k), len(seeds))  # None becomes nan
        if not np.isnan(values).any():
            name = NAMES[method] + FINETUNED * finetuned
            found[name] = Curve(method, finetuned, np.array(k), values.mean(axis=1), values, weights)
    return found


def dense_accuracy(rows: Sequence[Row]) -> float:
    """Mean accuracy in % of the unpruned networks, those at k = 0; ValueError where there are none."""
    dense = [row.accuracy_percent for row in rows if row.k_percent == 0]
    if not dense:
        raise ValueError("there is no row at k = 0")
    return float(np.mean(dense))


def flat_until(curve: Curve, dense: float) -> float | None:
    """Largest k in % up to which the mean is never over 0.5 points below `dense`; None: nothing is pruned, or a guess.

    >>> rows = [Row(0, "unit", "layer", k, k, 100 - k, a) for k, a in [(0, 98.0), (50, 97.6), (99, 20.0)]]
    >>> flat_until(curves(rows)["units"], dense=98.0)
    50.0
    """
    last = [*(curve.mean < dense - FLAT_POINTS - 1e-9), True].index(True) - 1  # with some slack for binary fractions
    pruned = last > 0 and (curve.weights[last] < curve.weights[0]).any()
    return float(curve.k[last]) if pruned and dense >= GUESSING else None


def bend(curve: Curve, dense: float) -> float | None:
    """The k in % at which the curve lies highest above the line between its ends; None for a curve flat to its end.

    Source: the "knee" of Satopaa et al. 2011, Finding a "Kneedle" in a Haystack, without smoothing.
    """
    above = curve.mean - np.interp(curve.k, curve.k[[0, -1]], curve.mean[[0, -1]])
    bent = above.max() > 0 and dense >= GUESSING and flat_until(curve, dense) != curve.k[-1]
    return float(curve.k[above.argmax()]) if bent else None


def format_facts(rows: Sequence[Row]) -> str:
    """A line a curve: up to which k it is flat, and where it bends; in brackets the range over several seeds."""
    seeds = [[row for row in rows if row.seed == seed] for seed in dict.fromkeys(row.seed for row in rows)]
    found = [(curves(group), dense_accuracy(group)) for group in (rows, *seeds)]
    names, dense = found[0]
    means = f"flat: no more than {FLAT_POINTS} points below" if dense >= GUESSING else "no better than a guess"
    lines = [f"dense: {dense:.2f} %; {means}"]
    for name in names:
        facts = []
        for find, verb, otherwise in ((flat_until, "flat up to", "nowhere flat"), (bend, "bends at", "")):
            k, *ks = (find(own[name], own_dense) or 0 for own, own_dense in found)  # of the mean; of every seed
            ends = dict.fromkeys(digits(end) if end else "none" for end in (min(ks), max(ks)))
            fact = f"{verb} k = {digits(k)} %" if k else otherwise
            spread = f" [seeds: {' to '.join(ends)}]" if fact and len(ks) > 1 and any(ks) else ""
            facts.append(fact + spread)
        lines.append(f"{name}: {'; '.join(filter(None, facts))}")
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> str:
    """A table for people, two methods side by side: a line a k; accuracy (mean ± std over seeds) and weights kept."""
    found, blocks = curves(rows), []
    methods = [name for name, curve in found.items() if not curve.finetuned]
    for pair in filter(None, (methods[:2], methods[2:])):
        columns = [["k %", *map(digits, found[pair[0]].k)]]
        for name in pair:
            for header, curve in ((f"{name}: accuracy %", found[name]), ("fine-tuned %", found.get(name + FINETUNED))):
                if curve:
                    spread = [f" ± {seeds.std(ddof=1):.2f}" if len(seeds) > 1 else "" for seeds in curve.values]
                    columns.append([header, *map("{:.2f}{}".format, curve.mean, spread)])
            columns.append(["weights kept", *(f"{kept.mean():,.0f}" for kept in found[name].weights)])
        widths = [max(map(len, column)) for column in columns]
        header, *lines = ("  ".join(map(str.rjust, line, widths)) for line in zip(*columns, strict=True))
        blocks.append("\n".join([header, "-" * len(header), *lines]))
    return "\n\n".join(blocks)


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclasses, whole or not at all; None as a blank, k_percent with all digits, other fractions with six.

    Raises: OSError: the folder takes no file; it names the one, elsewhere, that holds the rows all the same.
    """
    if not rows:
        raise ValueError("there are no rows to write")
    text = io.StringIO()
    lines = [asdict(row) | {"k_percent": digits(row.k_percent)} for row in rows]
    table = [[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in line.values()] for line in lines]
    csv.writer(text, lineterminator="\n").writerows([lines[0], *table])
    data = text.getvalue().encode()
    try:
        write_file(path, data)
    except OSError as error:
        write_file(rescued := Path(tempfile.mkdtemp(), path.name), data)
        raise OSError(f"{error}; the rows are in {rescued}") from error
    say(f"wrote {path}")


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure in the format of its suffix, whole or not at all; ValueError: matplotlib does not know it."""
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=200)
    write_file(path, data.getvalue())
    say(f"wrote {path}")


def plot_accuracy_sparsity(rows: Sequence[Row], title: str) -> "Figure":
    """Accuracy against k, close to dense and whole, with the ends of flat regions; means bold, seeds thin."""
    found, dense = curves(rows), dense_accuracy(rows)
    figure, near, whole = _plot_accuracy(found, dense, title, lambda curve: curve.k[:, None])
    figure.draw_without_rendering()  # lays it out: then the axis knows how many labels it has room for
    stretch_k_axis(whole, [row.k_percent for row in rows])  # the panels share it
    pruned = "each layer" if {row.scope for row in rows} == {"layer"} else "all layers together"
    whole.set_xlabel(f"pruned: k % of {pruned} (axis stretched toward 100 %)")
    flat = {name: flat_until(curve, dense) for name, curve in found.items()}
    ends = sorted((k, method) for method in ("weight", "unit") if (k := flat.get(NAMES[method])))
    for (k, method), ha, dx in zip(ends, ("right", "left"), (-3, 3), strict=False):  # their words point outward
        color, tuned = COLORS[method], flat.get(NAMES[method] + FINETUNED)
        text = f"{NAMES[method]} flat to {digits(k)} %" + (f"\nfine-tuned: to {digits(tuned)} %" if tuned else "")
        near.axvline(k, color=color, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        near.annotate(text, (k, 1), (dx, 4), near.get_xaxis_transform(), "offset points", color=color, size=TEXT, ha=ha)
    return figure


def plot_accuracy_weights(rows: Sequence[Row], title: str, published: Sequence[Published] = ()) -> "Figure":
    """Accuracy against the weights that remain, with networks of others beside, such as `LENET_300_100`."""
    sizes = [row.weights_kept for row in rows] + [weights for _, weights, _ in published]
    none = 10 ** np.floor(np.log10(min(filter(None, sizes), default=1) / 2))  # a logarithmic axis has no place for 0
    found, dense = curves(rows), dense_accuracy(rows)
    shown = {name: curve for name, curve in found.items() if name + FINETUNED not in found}  # of these sizes
    figure, _, whole = _plot_accuracy(shown, dense, title, lambda curve: np.maximum(curve.weights, none), published)
    log_axis(whole, "x")
    if 0 in sizes:
        whole.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value > 1.01 * none else "none")
    whole.set_xlabel("weights remaining (logarithmic; fewer to the right)")
    whole.invert_xaxis()
    return figure


def _plot_accuracy(found: dict[str, Curve], dense: float, title: str, x: Callable, published: Any = ()) -> Any:
    """Every curve at its x, (points, seeds or 1), in two panels: close to dense, and the whole range."""
    seeds = max(curve.values.shape[1] for curve in found.values())
    spread = "thin: each" if seeds <= MANY_SEEDS else "pale: lowest to highest"
    notes = [f"bold: mean, {spread} of {seeds} seeds"] if seeds > 1 else []
    if published:
        notes.append("gray: others' LeNet-300-100, which starts from 266,200 weights, ours from 2,386,000")
    figure, (near, whole) = new_figure(2, 1, title, "; ".join(notes), sharex=True, height_ratios=(2, 3))
    highest = max(dense, *(curve.values.max() for curve in found.values()), *(accuracy for *_, accuracy in published))
    near.set(ylabel="close to dense: accuracy, %", ylim=(dense - 2.5, highest + 0.25))
    whole.set(ylabel="whole range: accuracy, %", ylim=(0, 104))
    gray: dict[str, Any] = {"color": "0.4", "linewidth": 0.6, "zorder": 0}
    for panel, label, level in ((near, f"{FLAT_POINTS} points below", dense - FLAT_POINTS), (whole, "chance 10 %", 10)):
        for name, curve in found.items():
            _draw_curve(panel, name, curve, x(curve))
        for (name, weights, accuracy), marker in zip(published, "DPX*dph", strict=False):
            panel.plot(weights, accuracy, marker, label=name if panel is near else None, color="0.4", markersize=6)
        panel.axhspan(dense - FLAT_POINTS, dense, color="0.93", linewidth=0, zorder=0)
        panel.axhline(dense, label=f"dense {dense:.2f} %" if panel is near else None, **gray)
        panel.axhline(level, label=label, **gray)
        label_ends(panel)
    return figure, near, whole


def _draw_curve(panel: "Axes", name: str, curve: Curve, x: np.ndarray) -> None:
    """Draw the mean over x, (points, seeds or 1), with markers; a few seeds as thin lines, many as a band."""
    plain, tuned, width, size = (":", "-.", 1.2, 3.5) if curve.method.startswith("random") else ("-", "--", 2, 5)
    line: dict[str, Any] = {"color": COLORS[curve.method], "linestyle": tuned if curve.finetuned else plain}
    dots: dict[str, Any] = {"marker": MARKERS[curve.method], "markerfacecolor": "white" if curve.finetuned else None}
    panel.plot(x.mean(axis=1), curve.mean, label=name, linewidth=width, markersize=size, **line, **dots)
    seeds, lowest, highest = curve.values.shape[1], curve.values.min(axis=1), curve.values.max(axis=1)
    if seeds > MANY_SEEDS:
        panel.fill_between(x.mean(axis=1), lowest, highest, color=line["color"], alpha=0.15, linewidth=0)
    elif seeds > 1:
        panel.plot(x, curve.values, linewidth=0.7, alpha=0.5, **line)


def new_figure(rows: int, columns: int, title: str, note: str = "", **shared: Any) -> tuple["Figure", list["Axes"]]:
    """A figure with a title, a note in small print below, and its panels in reading order; `shared` is of subplots."""
    from matplotlib.figure import Figure  # not pyplot: no window, no DISPLAY, no state between figures

    figure = Figure(figsize=(8, 6.6), layout="constrained")
    figure.suptitle(title.replace("$", r"\$"), x=0.01, ha="left", size=10.5, wrap=True)  # wrapped text is parsed for $
    figure.supxlabel(note.replace("$", r"\$"), x=0.01, ha="left", size=8.5, wrap=True)
    figure.subplots(rows, columns, **shared)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=TEXT)
    return figure, figure.axes


def stretch_k_axis(axes: "Axes", ks: Sequence[float]) -> None:
    """Scale a k axis, in %, by the logarithm of what is left; ticks too close for their labels are moved apart."""
    k = np.unique(ks)
    points = axes.bbox.width / axes.figure.dpi * 72
    width = (6 * max(map(len, map(digits, k))) + 4) / points  # of a label, part of the axis
    least = min(width, 1 / max(len(k) - 1, 1))  # between two points
    left = np.log(np.maximum(100 - k, 0.4 * min((100 - k)[k < 100], default=1)))  # that is where k = 100 is drawn
    gaps = -np.diff(left) / (left[0] - left[-1])  # (points - 1,), their sum is 1
    spare = np.maximum(gaps - least, 0)
    gaps = least + (1 - least * len(gaps)) * spare / (spare.sum() or 1)
    knots, at = [k[0] - 1, *k, k[-1] + 1], [-0.04, *np.cumsum([0, *gaps]), 1.04]
    axes.set_xscale("function", functions=(lambda x: np.interp(x, knots, at), lambda x: np.interp(x, at, knots)))
    axes.set_xlim(knots[0], knots[-1])
    shown = k[:: -int(np.ceil(width / least))]  # counted from the right: the largest k has a label
    axes.set_xticks(k, [digits(value) if value in shown else "" for value in k])
    axes.minorticks_off()


def log_axis(axes: "Axes", which: str) -> None:
    """Make an axis, "x" or "y", logarithmic, with ticks that read 20, 50, 100, as there is room; to be called last."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    decades = np.ptp(np.log10(axis.get_view_interval()))
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if decades >= 1 else MaxNLocator(5))
    axis.set_major_formatter("{x:,.10g}")
    axes.minorticks_off()


def label_ends(axes: "Axes") -> None:
    """Label the lines of a finished panel in the margin to its right, at the height of their ends, without overlap."""
    labelled, to_axes = list[Any](axes.get_legend_handles_labels()[0]), axes.transScale + axes.transLimits
    ends = {line: to_axes.transform(line.get_xydata()[-1])[1] for line in labelled}
    lines = sorted((line for line in ends if 0 <= ends[line] <= 1), key=lambda line: ends[line])
    heights = np.array([ends[line] for line in lines])
    least = 13 / (axes.bbox.height / axes.figure.dpi * 72)  # between two lines of text
    for _ in range(300):
        push = np.maximum(least - np.diff(heights), 0) / 2
        heights = np.clip(heights - [*push, 0] + [0, *push], least / 2, 1 - least / 2)
    for height, line in zip(heights, lines, strict=True):
        leader = {"arrowstyle": "-", "linestyle": ":", "color": line.get_color(), "relpos": (0, 0.5), "shrinkB": 4}
        at = line.get_xydata()[-1], (1.025, height), line.get_transform(), "axes fraction"
        axes.annotate(line.get_label(), *at, color=line.get_color(), size=TEXT, va="center", arrowprops=leader)
