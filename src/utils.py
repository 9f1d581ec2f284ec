"""Small functions: l2; rows of results, and what people read in them: facts, a table, a CSV file, the plots."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from system import write_file

if TYPE_CHECKING:  # matplotlib is imported where a plot is drawn: one that is broken costs the plots alone
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLAT_POINTS = 0.5  # a curve is flat where it is no more than so many points below dense
NEAR_POINTS = 2.5  # below dense: how far down the upper panel of a plot shows
CHANCE = 10.0  # accuracy of a guess among ten classes, in %
GUESSING = 15.0  # a network below has learned nothing: the largest class alone makes up to 12 % of the images
MANY_SEEDS = 8  # more are drawn as a band
TEXT = 9.5  # points
# Okabe and Ito's colors, told apart by every kind of color vision.
COLORS = {"weight": "#0072B2", "unit": "#D55E00", "random_weight": "#56B4E9", "random_unit": "#E69F00"}
MARKERS = {"weight": "o", "unit": "s", "random_weight": "^", "random_unit": "v"}
NAMES = {method: method.replace("_", " ") + "s" for method in COLORS}
FINETUNED = ", fine-tuned"  # ends the name of a curve
# Networks of others that have a place beside ours: Han et al. 2015; Guo et al. 2016, dynamic network surgery;
# Molchanov et al. 2017, sparse variational dropout. Name, weights left of 266,200, accuracy in %.
Published = tuple[str, int, float]
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
    weights_kept: int  # non-zero weights of the shrunk network: what has to be stored and multiplied
    accuracy_percent: float
    finetuned_percent: float | None = None


class Curve(NamedTuple):
    """One method's points over k, ascending."""

    method: str
    k: np.ndarray  # (points,) %
    mean: np.ndarray  # (points,) accuracy over the seeds, %
    values: np.ndarray  # (points, seeds) accuracy, %
    weights: np.ndarray  # (points, seeds) weights kept


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Name → curve of every method, then those after fine-tuning; ValueError unless each seed has one row for each k.

    >>> list(curves([Row(0, "weight", "layer", 50, 50, 1000, 97.0, 98.0)]))
    ['weights', 'weights, fine-tuned']
    """
    found = {}
    for column, suffix in (("accuracy_percent", ""), ("finetuned_percent", FINETUNED)):
        for method in dict.fromkeys(row.method for row in rows):
            if method not in NAMES:
                raise ValueError(f"unknown method {method!r}: expected {', '.join(NAMES)}")
            own = [row for row in rows if row.method == method]
            points = {(row.k_percent, row.seed): (getattr(row, column), row.weights_kept) for row in own}
            ks, seeds = sorted({k for k, _ in points}), dict.fromkeys(seed for _, seed in points)
            if not len(own) == len(points) == len(ks) * len(seeds):
                raise ValueError(f"{NAMES[method]}: expected one row for each k of each seed")
            grid = np.array([[points[k, seed] for seed in seeds] for k in ks], float)  # (points, seeds, 2); None is nan
            if not np.isnan(values := grid[..., 0]).any():
                found[NAMES[method] + suffix] = Curve(method, np.array(ks), values.mean(axis=1), values, grid[..., 1])
    return found


def dense_accuracy(rows: Sequence[Row]) -> float:
    """Mean accuracy in % of the unpruned networks, those at k = 0; ValueError where there are none."""
    dense = [row.accuracy_percent for row in rows if row.k_percent == 0]
    if not dense:
        raise ValueError("there is no row at k = 0")
    return float(np.mean(dense))


def flat_until(curve: Curve, dense: float) -> float | None:
    """Largest k in % up to which the mean accuracy is never more than 0.5 points below `dense`, in %.

    None where nothing is pruned up to there, or the dense network only guesses.

    >>> rows = [Row(0, "unit", "layer", k, k, 100 - k, a) for k, a in [(0, 98.0), (50, 97.6), (99, 20.0)]]
    >>> flat_until(curves(rows)["units"], dense=98.0)
    50.0
    """
    lower = [*(curve.mean < dense - FLAT_POINTS - 1e-9), True]  # the slack is for binary fractions, far below one image
    last = lower.index(True) - 1
    pruned = last > 0 and (curve.weights[last] < curve.weights[0]).any()
    return float(curve.k[last]) if pruned and dense >= GUESSING else None


def bend(curve: Curve, dense: float) -> float | None:
    """The k in % at which the curve bends: where it lies highest above the straight line between its two ends.

    None where it nowhere lies above that line, is flat to its end, or a dense network only guesses.
    Source: the "knee" of Satopaa et al. 2011, Finding a "Kneedle" in a Haystack, without smoothing.

    >>> rows = [Row(0, "unit", "layer", k, k, 100 - k, a) for k, a in [(0, 98.0), (90, 95.0), (99, 20.0)]]
    >>> bend(curves(rows)["units"], dense=98.0)
    90.0
    """
    above = curve.mean - np.interp(curve.k, curve.k[[0, -1]], curve.mean[[0, -1]])
    bent = above.max() > 0 and dense >= GUESSING and flat_until(curve, dense) != curve.k[-1]
    return float(curve.k[above.argmax()]) if bent else None


def format_facts(rows: Sequence[Row]) -> str:
    """A line a curve: up to which k it is flat, and where it bends; in brackets the range over several seeds."""
    seeds = dict.fromkeys(row.seed for row in rows)
    groups = [rows, *([row for row in rows if row.seed == seed] for seed in seeds)]
    (found, dense), *alone = [(curves(group), dense_accuracy(group)) for group in groups]
    means = f"flat: no more than {FLAT_POINTS} points below" if dense >= GUESSING else "no better than a guess"
    lines = [f"dense: {dense:.2f} %; {means}"]
    for name, curve in found.items():
        facts = []
        for find, verb, otherwise in ((flat_until, "flat up to", "nowhere flat"), (bend, "bends at", "")):
            k, ks = find(curve, dense), sorted(find(own[name], own_dense) or 0 for own, own_dense in alone)
            ends = dict.fromkeys(digits(end) if end else "none" for end in (ks[0], ks[-1]))
            spread = f" [seeds: {' to '.join(ends)}]" if len(seeds) > 1 else ""
            facts.append(f"{verb} k = {digits(k)} %{spread}" if k else otherwise)
        lines.append(f"{name}: {'; '.join(filter(None, facts))}")
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> str:
    """A table for people, two methods side by side: a line a k; accuracy (mean ± std over seeds) and weights kept."""
    found, blocks = curves(rows), []
    methods = [name for name in found if not name.endswith(FINETUNED)]
    for pair in filter(None, (methods[:2], methods[2:])):
        columns = [["k %", *map(digits, found[pair[0]].k)]]
        for name in pair:
            for header, curve in ((f"{name}: accuracy %", found[name]), ("fine-tuned %", found.get(name + FINETUNED))):
                columns += [[header, *_mean_and_std(curve)]] if curve else []
            columns.append(["weights kept", *(f"{kept.mean():,.0f}" for kept in found[name].weights)])
        padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
        header, *lines = map("  ".join, zip(*padded, strict=True))
        blocks.append("\n".join([header, "-" * len(header), *lines]))
    return "\n\n".join(blocks)


def _mean_and_std(curve: Curve) -> list[str]:
    several = curve.values.shape[1] > 1
    points = zip(curve.mean, curve.values.std(axis=1, ddof=several), strict=True)
    return [f"{mean:.2f}" + f" ± {std:.2f}" * several for mean, std in points]


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclasses, whole or not at all; None as a blank, k_percent with all digits, other fractions with six."""
    if not rows:
        raise ValueError("there are no rows to write")
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.name for column in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in asdict(row).items()}
        writer.writerow(cells | {"k_percent": digits(row.k_percent)})
    write_file(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote, to draw a figure once more; ValueError names a file that is not of rows."""
    optional: list[Any] = [lambda cell, read=read: read(cell) if cell else None for read in (int, float)]
    reads = (optional[0], str, str, float, float, int, float, optional[1])
    try:
        header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        if header != [column.name for column in fields(Row)]:
            raise ValueError(f"its columns are {', '.join(header)}")
        return [Row(*(read(cell) for read, cell in zip(reads, line, strict=True))) for line in lines]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a file of rows: {error}") from error


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as .png, .pdf or .svg, whole or not at all; ValueError for other suffixes."""
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=200)
    write_file(path, data.getvalue())


# ── plots ──


def plot_accuracy_sparsity(rows: Sequence[Row], title: str) -> "Figure":
    """Accuracy against k: above, the points close to dense, with the end of each flat region marked; below, the whole.

    The mean of several seeds is drawn bold, every seed thin; more than eight as a band from lowest to highest.
    """
    figure, (near, whole) = _plot_accuracy(rows, title, lambda curve: curve.k[:, None])
    figure.draw_without_rendering()  # lays it out: then the axis knows how many labels it has room for
    stretch_k_axis(whole, [row.k_percent for row in rows])  # the panels share it
    pruned = "each layer" if {row.scope for row in rows} == {"layer"} else "all layers together"
    whole.set_xlabel(f"pruned: k % of {pruned} (axis stretched toward 100 %)")
    flat = {name: flat_until(curve, dense_accuracy(rows)) for name, curve in curves(rows).items()}
    marks = sorted((k, method) for method in ("weight", "unit") if (k := flat.get(NAMES[method])))
    for (k, method), (side, gap) in zip(
        marks, (("right", -3), ("left", 3)), strict=False
    ):  # words point away from each other
        tuned, color = flat.get(NAMES[method] + FINETUNED), COLORS[method]
        words = f"{NAMES[method]} flat to {digits(k)} %" + (f"\nfine-tuned: to {digits(tuned)} %" if tuned else "")
        near.axvline(k, color=color, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        look: dict[str, Any] = {"color": color, "size": TEXT, "ha": side}
        near.annotate(words, (k, 1), (gap, 4), near.get_xaxis_transform(), "offset points", **look)
    return figure


def plot_accuracy_weights(rows: Sequence[Row], title: str, published: Sequence[Published] = ()) -> "Figure":
    """Accuracy against the weights that remain, with networks of others beside, such as `LENET_300_100`."""
    sizes = [row.weights_kept for row in rows] + [weights for _, weights, _ in published]
    none = 10 ** np.floor(np.log10(min(filter(None, sizes), default=1) / 2))  # a logarithmic axis has no place for 0
    figure, (_, whole) = _plot_accuracy(rows, title, lambda curve: np.maximum(curve.weights, none), published)
    log_axis(whole, "x")
    if 0 in sizes:
        whole.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value > 1.01 * none else "none")
    whole.set_xlabel("weights remaining (logarithmic; fewer to the right)")
    whole.invert_xaxis()
    return figure


def _plot_accuracy(
    rows: Sequence[Row], title: str, x: Callable[[Curve], np.ndarray], published: Sequence[Published] = ()
) -> tuple["Figure", list["Axes"]]:
    """Every curve of the rows twice, close to dense and whole, at its x, (points, seeds or 1)."""
    dense, found, seeds = dense_accuracy(rows), curves(rows), len({row.seed for row in rows})
    many = "thin: each" if seeds <= MANY_SEEDS else "pale: lowest to highest"
    notes = [f"bold: mean, {many} of {seeds} seeds"] if seeds > 1 else []
    if published:
        notes.append("gray: others' LeNet-300-100, which starts from 266,200 weights, ours from 2,386,000")
    figure, panels = new_figure(2, 1, title, "; ".join(notes), sharex=True, height_ratios=(2, 3))
    highest = max(*(curve.values.max() for curve in found.values()), *(accuracy for *_, accuracy in published), dense)
    levels = {f"dense {dense:.2f} %": dense, f"{FLAT_POINTS} points below": dense - FLAT_POINTS}
    near = ("close to dense", (dense - NEAR_POINTS, highest + 0.25), levels)
    whole = ("whole range", (0, 104), {"_dense": dense, f"chance {CHANCE:.0f} %": CHANCE})
    for panel, (words, limits, levels) in zip(panels, (near, whole), strict=True):
        for name, curve in found.items():
            _draw(panel, name, curve, x(curve))
        for (name, weights, accuracy), marker in zip(published, "DPX*dph", strict=False):
            panel.plot(weights, accuracy, marker, label=name if panel is panels[0] else None, color="0.4", markersize=6)
        panel.axhspan(dense - FLAT_POINTS, dense, color="0.93", linewidth=0, zorder=0)
        for name, level in levels.items():
            panel.axhline(level, label=name, color="0.4", linewidth=0.6, zorder=0)
        panel.set(ylabel=f"{words}: accuracy, %", ylim=limits)
        label_ends(panel)
    return figure, panels


def _draw(axes: "Axes", name: str, curve: Curve, x: np.ndarray) -> None:
    """One curve: its mean, and every seed or their range."""
    color, random, tuned = COLORS[curve.method], curve.method.startswith("random"), name.endswith(FINETUNED)
    style: dict[str, Any] = {"color": color, "linestyle": (("-", "--"), (":", "-."))[random][tuned]}
    dots: dict[str, Any] = {"marker": MARKERS[curve.method], "markerfacecolor": "white" if tuned else color}
    size: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5} if random else {"linewidth": 2, "markersize": 5}
    axes.plot(x.mean(axis=1), curve.mean, label=name, **style, **dots, **size)
    if curve.values.shape[1] > MANY_SEEDS:
        lowest, highest = curve.values.min(axis=1), curve.values.max(axis=1)
        axes.fill_between(x.mean(axis=1), lowest, highest, color=color, alpha=0.15, linewidth=0)
    elif curve.values.shape[1] > 1:
        axes.plot(x, curve.values, linewidth=0.7, alpha=0.5, **style)


def new_figure(rows: int, columns: int, title: str, note: str = "", **shared: Any) -> tuple["Figure", list["Axes"]]:
    """A figure with a title, a note in small print below, and its panels in reading order; `shared` is of subplots."""
    from matplotlib.figure import Figure  # not pyplot: no window, no DISPLAY, no state between figures

    figure = Figure(figsize=(8, 6.6), layout="constrained")
    for write, text, points in ((figure.suptitle, title, 10.5), (figure.supxlabel, note, 8.5)):
        write(text.replace("$", r"\$"), x=0.01, ha="left", size=points, wrap=True)  # wrapping minds no parse_math=False
    panels = list(np.ravel(figure.subplots(rows, columns, **shared)))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=TEXT)
    return figure, panels


def stretch_k_axis(axes: "Axes", ks: Sequence[float]) -> None:
    """Scale a k axis, in %, by the logarithm of what is left; ticks too close for their labels are moved apart."""
    k = np.unique(ks)
    labels = [digits(value) for value in k]
    width = (6 * max(map(len, labels)) + 4) / (axes.bbox.width / axes.figure.dpi * 72)  # of a label, part of the axis
    least = min(width, 1 / max(len(k) - 1, 1))  # between two points
    left = np.log(np.maximum(100 - k, 0.4 * min((100 - k)[k < 100], default=1)))  # that is where k = 100 is drawn
    gaps = -np.diff(left) / (left[0] - left[-1])  # (points - 1,), their sum is 1
    spare = np.maximum(gaps - least, 0)
    gaps = least + (1 - least * len(gaps)) * spare / (spare.sum() or 1)
    knots, at = [k[0] - 1, *k, k[-1] + 1], [-0.04, *np.cumsum([0, *gaps]), 1.04]
    axes.set_xscale("function", functions=(lambda x: np.interp(x, knots, at), lambda x: np.interp(x, at, knots)))
    axes.set_xlim(knots[0], knots[-1])
    every = int(np.ceil(width / least))  # counted from the right: the largest k has a label
    axes.set_xticks(k, [label if (len(k) - 1 - i) % every == 0 else "" for i, label in enumerate(labels)])
    axes.minorticks_off()


def log_axis(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks that read 20, 50, 100, as they have room; call it after drawing."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = np.ptp(np.log10(axis.get_view_interval()))
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if decades >= 1 else MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.minorticks_off()


def label_ends(axes: "Axes") -> None:
    """Label the lines of a finished panel in the margin to its right, at the height of their ends, without overlap."""
    to_axes = axes.transScale + axes.transLimits
    lines: Any = axes.get_lines()
    ends = [(to_axes.transform((1, line.get_ydata()[-1]))[1], line) for line in lines]
    ends = [(height, line) for height, line in ends if 0 <= height <= 1 and not line.get_label().startswith("_")]
    ends.sort(key=lambda end: end[0])
    heights = np.array([height for height, _ in ends])
    least = 13 / (axes.bbox.height / axes.figure.dpi * 72)  # between two lines of text
    for _ in range(300):
        push = np.maximum(least - np.diff(heights), 0) / 2
        heights = np.clip(heights - [*push, 0] + [0, *push], least / 2, 1 - least / 2)
    for height, (_, line) in zip(heights, ends, strict=True):
        leader = {"arrowstyle": "-", "linestyle": ":", "color": line.get_color(), "relpos": (0, 0.5), "shrinkB": 4}
        look: dict[str, Any] = {"color": line.get_color(), "size": TEXT, "va": "center", "arrowprops": leader}
        place = (line.get_xydata()[-1], (1.025, height), line.get_transform(), "axes fraction")
        axes.annotate(line.get_label(), *place, **look)
