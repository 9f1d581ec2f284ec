"""Small functions: l2; rows of results, and what people read in them: facts, a table, a CSV file, the plots.

>>> points = [(0, 98.0), (50, 98.1), (80, 97.6), (90, 95.0), (99, 20.0)]  # (k %, accuracy %)
>>> rows = [Row(0, "weight", "layer", k, k, 1000 - 10 * k, accuracy) for k, accuracy in points]
>>> curve, dense = curves(rows)["weight"], dense_accuracy(rows)
>>> flat_until(curve, dense), bend(curve, dense)
(80.0, 90.0)
"""

import csv
import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from system import write_file

if TYPE_CHECKING:  # importing torch or matplotlib takes a second, and few of these functions need them
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

FLAT_POINTS = 0.5  # a curve is flat where it is no more than so many points below dense
NEAR_POINTS = 2.5  # below dense: how far down the upper panel of a plot shows
CHANCE = 10.0  # accuracy of a guess among ten classes, in %
GUESSING = 15.0  # a network below has learned nothing: the largest class alone makes up to 12 % of the images
MANY_SEEDS = 8  # more are drawn as a band
# Okabe and Ito's colors, told apart by every kind of color vision.
COLORS = {"weight": "#0072B2", "unit": "#D55E00", "random_weight": "#56B4E9", "random_unit": "#E69F00"}
MARKERS = {"weight": "o", "unit": "s", "random_weight": "^", "random_unit": "v"}
NAMES = {method: method.replace("_", " ") + "s" for method in COLORS}
COLUMNS = {"accuracy_percent": "", "finetuned_percent": ", fine-tuned"}  # and what follows the method's name


def l2(weight: "Tensor") -> "Tensor":
    """L2 norm, (out,), of every unit of a weight, (out, …).

    >>> import torch
    >>> l2(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    import torch

    return torch.linalg.vector_norm(weight.flatten(1), dim=1)


# ── rows and curves ──


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


class Curve(NamedTuple):
    """One method's points over k, ascending."""

    k: np.ndarray  # (points,) %
    mean: np.ndarray  # (points,) accuracy over the seeds, %
    values: np.ndarray  # (points, seeds) accuracy, %
    weights: np.ndarray  # (points, seeds) weights kept


def curves(rows: Sequence[Row], column: str = "accuracy_percent") -> dict[str, Curve]:
    """The curve of every method, in the order of the rows; methods whose column is blank are left out.

    Raises:
        ValueError: no rows, an unknown method, or not one row for each k of each seed.
    """
    if not rows:
        raise ValueError("there are no rows")
    found = {}
    for method in dict.fromkeys(row.method for row in rows):
        if method not in NAMES:
            raise ValueError(f"unknown method {method!r}: expected {', '.join(NAMES)}")
        own = sorted((row for row in rows if row.method == method), key=lambda row: (row.k_percent, row.seed))
        k, seeds = sorted({row.k_percent for row in own}), sorted({row.seed for row in own})
        if [(row.k_percent, row.seed) for row in own] != [(point, seed) for point in k for seed in seeds]:
            raise ValueError(f"{NAMES[method]}: expected one row for each k of each seed")
        if getattr(own[0], column) is not None:
            values = np.array([getattr(row, column) for row in own], float).reshape(len(k), -1)
            weights = np.array([row.weights_kept for row in own]).reshape(len(k), -1)
            found[method] = Curve(np.array(k, float), values.mean(axis=1), values, weights)
    return found


def dense_accuracy(rows: Sequence[Row]) -> float:
    """Mean accuracy in % of the unpruned networks, those at k = 0; ValueError where there are none."""
    dense = [row.accuracy_percent for row in rows if row.k_percent == 0]
    if not dense:
        raise ValueError("there is no row at k = 0")
    return float(np.mean(dense))


def flat_until(curve: Curve, dense: float) -> float | None:
    """Largest k such that the mean accuracy at it and at every smaller k is no more than 0.5 points below dense.

    Returns:
        k in %, or None where nothing is pruned up to there, or a dense network of that accuracy in % only guesses.
    """
    lower = [*(curve.mean < dense - FLAT_POINTS - 1e-9), True]  # the slack is for binary fractions, far below one image
    last = lower.index(True) - 1
    pruned = last > 0 and (curve.weights[last] < curve.weights[0]).any()
    return float(curve.k[last]) if pruned and dense >= GUESSING else None


def bend(curve: Curve, dense: float) -> float | None:
    """The k at which the curve bends: where it lies highest above the straight line between its two ends.

    Returns:
        k in %, or None where it nowhere lies above that line, is flat to its end, or a dense network only guesses.

    Source: the "knee" of Satopaa et al. 2011, Finding a "Kneedle" in a Haystack, without smoothing.
    """
    above = curve.mean - np.interp(curve.k, curve.k[[0, -1]], curve.mean[[0, -1]])
    bent = above.max() > 0 and dense >= GUESSING and flat_until(curve, dense) != curve.k[-1]
    return float(curve.k[above.argmax()]) if bent else None


# ── text ──


def format_facts(rows: Sequence[Row]) -> str:
    """A line a method: up to which k it is flat, and where it bends; in brackets the range over several seeds."""
    dense, seeds = dense_accuracy(rows), sorted({row.seed for row in rows})
    ones = [_facts([row for row in rows if row.seed == seed]) for seed in seeds] if len(seeds) > 1 else []
    means = f"flat: no more than {FLAT_POINTS} points below" if dense >= GUESSING else "no better than a guess"
    lines = [f"dense: {dense:.2f} %; {means}"]
    for name, found in _facts(rows).items():
        flat, knee = (_with_range(k, [one[name][i] for one in ones]) for i, k in enumerate(found))
        lines.append(f"{name}: " + (f"flat up to {flat}" if flat else "nowhere flat") + (knee and f"; bends at {knee}"))
    return "\n".join(lines)


def _facts(rows: Sequence[Row]) -> dict[str, tuple[float | None, float | None]]:
    """Name of each curve → up to which k it is flat, at which it bends."""
    dense = dense_accuracy(rows)
    return {name: (flat_until(curve, dense), bend(curve, dense)) for name, _, curve in _named_curves(rows)}


def _named_curves(rows: Sequence[Row]) -> list[tuple[str, str, Curve]]:
    """Name, method and points of every curve, the fine-tuned ones last."""
    found = {how: curves(rows, column) for column, how in COLUMNS.items()}
    return [(NAMES[method] + how, method, curve) for how, own in found.items() for method, curve in own.items()]


def _with_range(k: float | None, ones: list[float | None]) -> str:
    """A k in words, with the lowest and the highest of several seeds in brackets; nothing for None."""
    ends = ["none" if one is None else _digits(one) for one in sorted(ones, key=lambda one: one or 0)]
    seeds = " to ".join(dict.fromkeys([*ends[:1], *ends[-1:]]))
    return "" if k is None else f"k = {_digits(k)} %" + (seeds and f" [seeds: {seeds}]")


def _digits(k: float) -> str:
    """A k with all of its digits: 99.99999 and 99.999991 are different points."""
    return str(float(k)).removesuffix(".0")


def format_table(rows: Sequence[Row]) -> str:
    """A table for people, two methods side by side: a line a k; accuracy (mean ± std over seeds) and weights kept."""
    accuracy, finetuned = curves(rows), curves(rows, "finetuned_percent")
    blocks = []
    for pair in filter(None, (list(accuracy)[:2], list(accuracy)[2:])):
        columns = [["k %", *map(_digits, accuracy[pair[0]].k)]]
        for method in pair:
            columns.append([f"{NAMES[method]}: accuracy %", *_cells(accuracy[method])])
            if method in finetuned:
                columns.append(["fine-tuned %", *_cells(finetuned[method])])
            columns.append(["weights kept", *(f"{kept:,.0f}" for kept in accuracy[method].weights.mean(axis=1))])
        padded = [[cell.rjust(max(map(len, column))) for cell in column] for column in columns]
        header, *lines = ["  ".join(cells) for cells in zip(*padded, strict=True)]
        blocks.append("\n".join([header, "-" * len(header), *lines]))
    return "\n\n".join(blocks)


def _cells(curve: Curve) -> list[str]:
    if curve.values.shape[1] == 1:
        return [f"{mean:.2f}" for mean in curve.mean]
    return [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(curve.mean, curve.values.std(axis=1, ddof=1), strict=True)]


# ── files ──


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclasses under a header of their field names, whole or not at all; ValueError where there are none.

    None becomes a blank; k_percent keeps all of its digits, other fractions six.
    """
    if not rows:
        raise ValueError("there are no rows to write")
    text = io.StringIO()
    writer = csv.DictWriter(text, [column.name for column in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {name: f"{cell:.6g}" if isinstance(cell, float) else cell for name, cell in asdict(row).items()}
        writer.writerow(cells | {"k_percent": _digits(row.k_percent)})
    write_file(path, text.getvalue().encode())


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote, to draw a figure once more; ValueError names a file that is not of rows."""
    reads: list[Any] = [int, str, str, float, float, int, float, lambda cell: float(cell) if cell else None]
    try:
        header, *lines = csv.reader(io.StringIO(path.read_text(encoding="utf-8")))
        if header != [column.name for column in fields(Row)]:
            raise ValueError(f"its columns are {', '.join(header)}")
        return [Row(*(read(cell) for read, cell in zip(reads, line, strict=True))) for line in lines]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is not a file of rows: {error}") from error


def save_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as .png, .pdf or .svg, whole or not at all; ValueError for other suffixes."""
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:], dpi=200, metadata=undated)
    write_file(path, data.getvalue())


# ── plots ──
# Figures are made without pyplot: no window, no DISPLAY, no state between them.


class Published(NamedTuple):
    """A pruned LeNet-300-100 of other people's, to be drawn beside ours."""

    name: str  # short: it stands beside the point
    weights: int
    accuracy_percent: float
    source: str


LENET_300_100 = (
    Published("Han 2015", 22_000, 98.4, "Han et al. 2015"),
    Published("Guo 2016", 4_800, 98.0, "Guo et al. 2016 (dynamic network surgery)"),
    Published("Molchanov 2017", 3_900, 98.1, "Molchanov et al. 2017 (sparse variational dropout)"),
)


def plot_accuracy_sparsity(rows: Sequence[Row], title: str) -> "Figure":
    """Accuracy against k: above, the points close to dense, with the end of each flat region marked; below, the whole.

    The mean of several seeds is drawn bold, every seed thin; more than eight as a band from lowest to highest.
    """
    figure, panels = _plot_accuracy(rows, title, lambda curve: np.broadcast_to(curve.k[:, None], curve.values.shape))
    figure.draw_without_rendering()  # lays it out: then the axis knows how many labels it has room for
    stretch_k_axis(panels[1], [row.k_percent for row in rows])  # the panels share it
    pruned = "each layer" if {row.scope for row in rows} == {"layer"} else "all layers together"
    panels[1].set_xlabel(f"pruned: k % of {pruned} (axis stretched toward 100 %)")
    _mark_flat(panels[0], _facts(rows))
    return figure


def _mark_flat(axes: "Axes", facts: dict[str, tuple[float | None, float | None]]) -> None:
    """Mark up to where the curves of weights and units are flat; for the fine-tuned ones only in words."""
    flats = {m: [facts.get(NAMES[m] + how, (None,))[0] for how in COLUMNS.values()] for m in ("weight", "unit")}
    found = sorted((flat, method, then) for method, (flat, then) in flats.items() if flat)
    for (flat, method, then), side in zip(found, ("right", "left"), strict=False):  # words point away from each other
        words = f"{NAMES[method]} flat to {_digits(flat)} %" + (f"\nfine-tuned: to {_digits(then)} %" if then else "")
        axes.axvline(flat, color=COLORS[method], linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
        at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "ha": side}
        axes.annotate(words, (flat, 1), (-3 if side == "right" else 3, 4), color=COLORS[method], fontsize=9.5, **at)


def plot_accuracy_weights(rows: Sequence[Row], title: str, published: Sequence[Published] = ()) -> "Figure":
    """Accuracy against the weights that remain, on a logarithmic axis: the comparison at equal size.

    Drawn as `plot_accuracy_sparsity`, with networks of others beside, such as `LENET_300_100`.
    """
    sizes = [row.weights_kept for row in rows] + [point.weights for point in published]
    none, most = min(filter(None, sizes), default=1) / 2.5, max(sizes)  # a logarithmic axis has no place for 0
    figure, panels = _plot_accuracy(rows, title, lambda curve: np.maximum(curve.weights, none), published)
    log_axis(panels[1], "x")
    panels[1].set_xlabel("weights remaining (logarithmic; fewer to the right)")
    low, high = panels[1].get_xlim()
    room = (high / low) ** 0.12  # that a label takes
    ticks = {most, *(tick for tick in panels[1].get_xticks() if max(low, none * room) < tick < most / room)}
    names = {tick: f"{tick:,.0f}" for tick in ticks} | ({none: "none"} if 0 in sizes else {})
    panels[1].set_xticks(list(names), list(names.values()))
    panels[1].invert_xaxis()
    return figure


def _plot_accuracy(
    rows: Sequence[Row], title: str, place: Callable[[Curve], np.ndarray], published: Sequence[Published] = ()
) -> tuple["Figure", list["Axes"]]:
    """Every curve of the rows twice, close to dense and whole, at the x, (points, seeds), that `place` gives."""
    figure, (near, whole) = new_figure(2, 1, (8, 6.6), sharex=True, height_ratios=(2, 3))
    dense, seeds, drawn = dense_accuracy(rows), len({row.seed for row in rows}), _named_curves(rows)
    for panel, words in ((near, "close to dense"), (whole, "whole range")):
        for name, method, curve in drawn:
            _draw(panel, place(curve), curve, method, name)
        for point, marker in zip(published, "DPX*dph", strict=False):
            label = point.name if panel is near else None
            panel.plot(point.weights, point.accuracy_percent, marker, color="0.4", markersize=6, label=label)
        panel.axhspan(dense - FLAT_POINTS, dense, color="0.93", linewidth=0, zorder=0)
        box = {"color": "white", "alpha": 0.8, "pad": 1}
        panel.text(0.008, 0.05, words, transform=panel.transAxes, weight="bold", color="0.25", bbox=box)
        panel.set_ylabel("accuracy, %")
    level: dict[str, Any] = {"color": "0.4", "linewidth": 0.6, "zorder": 0}
    near.axhline(dense, label=f"dense {dense:.2f} %", **level)
    near.axhline(dense - FLAT_POINTS, label=f"{FLAT_POINTS} points below", **level)
    whole.axhline(dense, **level)
    whole.axhline(CHANCE, label=f"chance {CHANCE:.0f} %", **level)
    highest = max(dense, *(curve.values.max() for *_, curve in drawn), *(point.accuracy_percent for point in published))
    near.set_ylim(dense - NEAR_POINTS, highest + 0.25)
    whole.set_ylim(0, 104)
    for panel in (near, whole):
        label_ends(panel)
    notes = [f"bold: mean, {'thin: each' if seeds <= MANY_SEEDS else 'pale: lowest to highest'} of {seeds} seeds"]
    sources = ", ".join(point.source for point in published)
    notes += [f"gray: {sources} start from the 266,200 weights of LeNet-300-100, ours from 2,386,000"] * bool(published)
    add_title(figure, title, "; ".join(notes[seeds == 1 :]))
    return figure, [near, whole]


def _draw(axes: "Axes", x: np.ndarray, curve: Curve, method: str, name: str) -> None:
    """One curve at the x, (points, seeds): its mean, and every seed or their range."""
    random, tuned = method.startswith("random"), name != NAMES[method]
    style: dict[str, Any] = {"color": COLORS[method], "linestyle": (("-", "--"), (":", "-."))[random][tuned]}
    size: dict[str, Any] = {"linewidth": 1.2, "markersize": 3.5} if random else {"linewidth": 2, "markersize": 5}
    face = "white" if tuned else COLORS[method]
    axes.plot(x.mean(axis=1), curve.mean, label=name, marker=MARKERS[method], markerfacecolor=face, **style, **size)
    if x.shape[1] > MANY_SEEDS:
        lowest, highest = curve.values.min(axis=1), curve.values.max(axis=1)
        axes.fill_between(x.mean(axis=1), lowest, highest, color=COLORS[method], alpha=0.15, linewidth=0)
    elif x.shape[1] > 1:
        axes.plot(x, curve.values, linewidth=0.7, alpha=0.5, **style)


def new_figure(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple["Figure", list["Axes"]]:
    """A figure of (width, height) inches and its panels, in reading order; `shared` goes to matplotlib's subplots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = list(np.ravel(figure.subplots(rows, columns, **shared)))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.tick_params(labelsize=9.5)
    return figure, panels


def add_title(figure: "Figure", title: str, note: str = "") -> None:
    """Write a title above and a note in small print below, wrapped where they would run out of the figure."""
    for write, text, size in ((figure.suptitle, title, 10.5), (figure.supxlabel, note, 8.5)):
        words = write(text, x=0.01, ha="left", fontsize=size, parse_math=False)
        for room in range(200, 20, -5):  # characters
            if words.get_window_extent().x1 < figure.bbox.x1:
                break
            words.set_text("\n".join(textwrap.fill(line, room, break_on_hyphens=False) for line in text.splitlines()))


def stretch_k_axis(axes: "Axes", ks: Sequence[float]) -> None:
    """Scale a k axis, in %, by the logarithm of what is left, so that 90 … 99 take as much room as 0 … 90.

    Of the points `ks`, in any order, those too close for their labels are moved apart, or some go without.
    """
    k = np.unique(np.array(ks, float))
    labels = [_digits(value) for value in k]
    width = (6 * max(map(len, labels)) + 4) / (axes.bbox.width / axes.figure.dpi * 72)  # of a label, part of the axis
    left = np.log(np.maximum(100 - k, 0.4 * min((100 - k)[k < 100], default=1)))  # that is where k = 100 is drawn
    gaps = (left[:-1] - left[1:]) / max(left[0] - left[-1], 1e-9)  # (points - 1,), their sum is 1
    spare = np.maximum(gaps - width, 0)
    gaps = width + max(1 - width * len(gaps), 0) * spare / max(spare.sum(), 1e-9)
    at = [-0.04, *np.cumsum([0, *gaps]) / max(gaps.sum(), 1e-9), 1.04]
    knots = [k[0] - 1, *k, k[-1] + 1]
    axes.set_xscale("function", functions=(lambda x: np.interp(x, knots, at), lambda x: np.interp(x, at, knots)))
    axes.set_xlim(knots[0], knots[-1])
    last, every = len(gaps), int(np.ceil(max(width * len(gaps), 1)))
    unnamed = {i for i in range(last) if i % every or last - i < every}
    axes.set_xticks(k, ["" if i in unnamed else label for i, label in enumerate(labels)])
    axes.minorticks_off()


def log_axis(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with ticks that read 20, 50, 100, as they have room; call it after drawing."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = np.log10(high / low)
    subs = (1, 2, 5) if decades < 2.5 else (1, 3) if decades < 4 else (1,)
    axis.set_major_locator(LogLocator(subs=subs) if decades >= 1 else MaxNLocator(5))
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axes.minorticks_off()


def label_ends(axes: "Axes") -> None:
    """Write the labels of a panel's lines into the margin to its right, at the height of their ends, without overlap.

    Call it when all is drawn and the y axis is final. Lines that end beyond it are left out.
    """
    low, high = axes.get_ylim()
    lines = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    ends = [(*np.asarray(line.get_xydata())[-1], line) for line in lines]
    ends = sorted((end for end in ends if low <= end[1] <= high), key=lambda end: end[1])
    heights = (axes.transScale + axes.transLimits).transform(np.reshape([(1, y) for _, y, _ in ends], (-1, 2)))[:, 1]
    least = 13 / (axes.bbox.height / axes.figure.dpi * 72)  # between two lines of text
    for _ in range(300):
        push = np.maximum(least - np.diff(heights), 0) / 2
        heights = np.clip(heights - [*push, 0] + [0, *push], least / 2, 1 - least / 2)
    for height, (x, y, line) in zip(heights, ends, strict=True):
        color = line.get_color()
        leader = {"arrowstyle": "-", "color": color, "linestyle": ":", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            str(line.get_label()), (x, y), (1.025, height), xycoords=line.get_transform(), textcoords="axes fraction",
            arrowprops=leader, color=color, fontsize=9.5, va="center",
        )  # fmt: skip
