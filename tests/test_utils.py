import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from conftest import ROOT, read_csv
from matplotlib.colors import to_hex
from matplotlib.text import Text

import utils
from utils import Curve, Row


def make_rows(seeds=1, *, methods=("weight", "unit"), finetuned=False):
    """Rows of curves with known facts: weights flat to 80 and bent at 90, units flat to 50 and bent at 60."""
    tuned = 96.9 if finetuned else None
    ks = [0, 50, 60, 80, 90, 99]
    accuracy = {"weight": [97, 97, 97, 96.5, 94, 20], "unit": [97, 96.5, 95, 40, 15, 9]}
    return [
        Row(seed, method, "layer", k, k, round(2_386_000 * (1 - k / 100)), value + seed / 10, tuned)
        for seed in range(seeds)
        for method in methods
        for k, value in zip(ks, accuracy[method.removeprefix("random_")], strict=True)
    ]  # fmt: skip


def sweep(ks, seeds=1, methods=("weight", "unit")):
    """Rows at any k, the last of which ruin the network."""
    accuracy = {k: 97.0 if k <= 50 else 97 - 88 * (k - 50) / 50 for k in ks}
    return [
        Row(seed, method, "layer", k, k, round(1e6 * (1 - k / 100)), accuracy[k])
        for seed in range(seeds) for method in methods for k in ks
    ]  # fmt: skip


def curve(k, mean, kept=None):
    weights = 100 - np.array(k) if kept is None else np.array(kept)
    accuracy = np.array(mean, float)
    return Curve("unit", False, np.array(k, float), accuracy, accuracy[:, None], weights[:, None])


def drawn(axes, label):
    return np.asarray(next(line for line in axes.get_lines() if line.get_label() == label).get_xydata())


def thin_lines(axes, color):
    lines = [line for line in axes.get_lines() if str(line.get_label()).startswith("_") and line.get_color() == color]
    return [np.asarray(line.get_xydata()) for line in lines if len(np.asarray(line.get_xydata())) > 2]


def margin(axes):
    """Words in the margin to the right of a panel, from top to bottom → their color."""
    texts = [text for text in axes.texts if getattr(text, "anncoords", "") == "axes fraction"]
    return {
        text.get_text(): to_hex(text.get_color()).upper() for text in sorted(texts, key=lambda text: -text.xyann[1])
    }


def assert_legible(figure):
    """No text runs out of the figure or into another of its panel's margin, or of its axis."""
    figure.draw_without_rendering()
    axis = figure.axes[-1].xaxis
    low, high = sorted(axis.get_view_interval())
    ticks = [label for at, label in zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True) if low <= at <= high]
    for group in (figure.texts, ticks, *(axes.texts for axes in figure.axes)):
        boxes = [Text.get_window_extent(text) for text in group if text.get_text()]  # without the leaders
        for i, box in enumerate(boxes):
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
            assert not any(box.overlaps(other) for other in boxes[:i])


# ── numbers ──


def test_curves_hold_every_seed_and_the_mean():
    found = utils.curves(make_rows(seeds=3))
    assert list(found) == ["weights", "units"]
    assert found["weights"].mean.tolist() == pytest.approx([97.1, 97.1, 97.1, 96.6, 94.1, 20.1])
    assert found["units"].values[1].tolist() == pytest.approx([96.5, 96.6, 96.7])
    assert found["units"].weights[1].tolist() == [1_193_000] * 3
    turned = utils.curves(make_rows(seeds=3)[::-1])["weights"]
    assert np.array_equal(turned.values, found["weights"].values) and np.array_equal(turned.k, found["weights"].k)
    tuned = utils.curves(make_rows(finetuned=True))
    assert list(tuned) == ["weights", "units", "weights, fine-tuned", "units, fine-tuned"]
    assert tuned["units, fine-tuned"].mean.tolist() == [96.9] * 6


NO_CURVES = [
    ([replace(make_rows()[0], method="Weight")], "Weight: expected one of weight, unit, random_weight, random_unit"),
    (make_rows(seeds=2)[:-1], "unit: .* one row for each k of each seed"),
    ([*make_rows(), make_rows()[0]], "weight: .* one row for each k of each seed"),
]


@pytest.mark.parametrize(("rows", "message"), NO_CURVES)
def test_rows_that_make_no_curves_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        utils.curves(rows)


def test_dense_accuracy_is_that_at_k_0():
    assert utils.dense_accuracy(make_rows(seeds=3)) == pytest.approx(97.1)
    with pytest.raises(ValueError, match="k = 0"):
        utils.dense_accuracy(make_rows()[1:6])


FLAT = [
    ([98, 97.5, 97.49, 98], 98, 50),  # exactly 0.5 points lower is flat; what comes after a dip is not
    ([98, 99, 98, 97.6], 98, 90),  # better than dense is flat, too
    ([98, 90, 90, 90], 98, None),
    ([97, 97, 97, 97], 98, None),
    ([11.35, 11.35, 11.35, 11.35], 11.35, None),  # a network that always says the same digit
]


@pytest.mark.parametrize(("mean", "dense", "expected"), FLAT)
def test_flat_until(mean, dense, expected):
    assert utils.flat_until(curve([0, 50, 60, 90], mean), dense) == expected


def test_half_a_point_is_meant_as_a_decimal_number():
    accuracies = {0: (98.71, 98.59, 98.50), 50: (98.14, 98.19, 97.97)}  # their means differ by 0.5 + 1e-14 as floats
    points = [(k, seed, value) for k, values in accuracies.items() for seed, value in enumerate(values)]
    rows = [Row(seed, "unit", "layer", k, k, 99 - k, value) for k, seed, value in points]
    assert utils.flat_until(utils.curves(rows)["units"], utils.dense_accuracy(rows)) == 50


def test_nothing_pruned_is_not_flat():
    assert utils.flat_until(curve([0], [98]), 98) is None
    assert utils.flat_until(curve([0, 1, 99], [98, 98, 98], kept=[7, 7, 7]), 98) is None
    assert utils.flat_until(curve([0, 1, 99], [98, 98, 98], kept=[7, 7, 6]), 98) == 99


BENDS = [
    ([98, 97, 93, 10], 90),  # highest above the straight line between the ends
    ([98, 54, 15, 10], None),  # nowhere above it
    ([98, 98.3, 98.2, 97.6], None),  # flat to its end
    ([12, 12, 11, 10], None),  # a guess from the start
]


@pytest.mark.parametrize(("mean", "expected"), BENDS)
def test_bend(mean, expected):
    assert utils.bend(curve([0, 50, 90, 100], mean), mean[0]) == expected


# ── text ──


def test_facts_of_one_seed():
    assert utils.format_facts(make_rows(methods=("weight", "unit", "random_unit"), finetuned=True)).splitlines() == [
        "dense: 97.00 %; flat: no more than 0.5 points below",
        "weights: flat up to k = 80 %; bends at k = 90 %",
        "units: flat up to k = 50 %; bends at k = 60 %",
        "random units: flat up to k = 50 %; bends at k = 60 %",
        "weights, fine-tuned: flat up to k = 99 %",
        "units, fine-tuned: flat up to k = 99 %",
        "random units, fine-tuned: flat up to k = 99 %",
    ]


def test_facts_of_several_seeds_have_their_range():
    worse = {50: 96.2, 80: 95.0}  # what seed 1 has at these k
    rows = [*make_rows(1)]
    rows += [replace(row, seed=1, accuracy_percent=worse.get(row.k_percent, row.accuracy_percent)) for row in rows]
    assert utils.format_facts(rows).splitlines() == [
        "dense: 97.00 %; flat: no more than 0.5 points below",
        "weights: flat up to k = 60 % [seeds: none to 80]; bends at k = 90 % [seeds: 90]",
        "units: nowhere flat [seeds: none to 50]; bends at k = 60 % [seeds: 60 to 80]",
    ]


def test_facts_do_not_praise_what_was_not_pruned_or_never_learned():
    assert utils.format_facts(make_rows()[:1]).splitlines()[1] == "weights: nowhere flat"
    unpruned = [replace(row, achieved_percent=0, weights_kept=9, accuracy_percent=97) for row in make_rows()]
    assert "flat up to" not in utils.format_facts(unpruned)
    guess = [replace(row, accuracy_percent=11.35) for row in make_rows(seeds=2)]
    assert utils.format_facts(guess).splitlines() == [
        "dense: 11.35 %; no better than a guess", "weights: nowhere flat", "units: nowhere flat",
    ]  # fmt: skip


def test_table_says_what_the_rows_hold_in_120_columns():
    table = utils.format_table(make_rows(seeds=2)).splitlines()
    assert " ".join(table[0].split()) == "k % weights: accuracy % weights kept units: accuracy % weights kept"
    assert table[-1].split() == ["99", "20.05", "±", "0.07", "23,860", "9.05", "±", "0.07", "23,860"]
    assert utils.format_table(make_rows()).splitlines()[-1].split() == ["99", "20.00", "23,860", "9.00", "23,860"]
    full = utils.format_table(make_rows(seeds=2, methods=tuple(utils.NAMES), finetuned=True))
    assert max(map(len, full.splitlines())) <= 120
    assert full.count("fine-tuned %") == 4 and full.count("96.90 ± 0.00") == 4 * 6
    assert all(f"{name}: accuracy %" in full for name in utils.NAMES.values())


def test_against_weights_fine_tuned_networks_stand_for_those_that_were_not(monkeypatch):
    """A row's weights are those of the network that was fine-tuned."""
    shown = []
    monkeypatch.setattr(utils, "label_ends", lambda panel: shown.append(panel.get_legend_handles_labels()[1]))
    for finetuned in (False, True):
        utils.plot_accuracy_weights(make_rows(finetuned=finetuned), "a title")
    plain, tuned = ({name for name in names if "weights" in name} for names in shown[::2])
    assert (plain, tuned) == ({"weights"}, {"weights, fine-tuned"})


# ── files ──


def test_a_csv_of_rows_is_read_as_it_was_written(tmp_path):
    path, alike = tmp_path / "a.csv", sweep([0, 99.99999, 99.999991, 99.99999100000001])  # k must stay different
    unknown = [replace(row, seed=None) for row in make_rows()]  # as of a network that was loaded
    published = [each.read_bytes() for each in ROOT.glob("plots/**/*accuracy_sparsity.csv")]
    assert published
    for content in published:
        path.write_bytes(content)
        utils.write_csv(path, read_csv(path))
        assert path.read_bytes() == content
    for rows in (make_rows(seeds=2, finetuned=True), alike, unknown, make_rows()):
        utils.write_csv(path, rows)
        assert read_csv(path) == rows or rows is alike
        assert [row.k_percent for row in read_csv(path)] == [row.k_percent for row in rows]
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == "seed,method,scope,k_percent,achieved_percent,weights_kept,accuracy_percent,finetuned_percent"
    assert lines[4] == "0,weight,layer,80,80,477200,96.5,"
    assert "99.99999 " in utils.format_table(alike) and "99.999991 " in utils.format_table(alike)
    assert utils.format_facts(unknown) == utils.format_facts(rows)
    assert utils.format_table(unknown) == utils.format_table(rows)


def test_other_rows_are_written_too_and_none_are_refused(tmp_path):
    @dataclass
    class Cost:
        form: str
        k_percent: float
        latency_ms: float

    utils.write_csv(tmp_path / "a.csv", [Cost("dense", 92.5, 0.123456789)])
    assert (tmp_path / "a.csv").read_text() == "form,k_percent,latency_ms\ndense,92.5,0.123457\n"
    with pytest.raises(ValueError, match="no rows"):
        utils.write_csv(tmp_path / "b.csv", [])
    assert not (tmp_path / "b.csv").exists()


def test_figures_are_saved_by_their_suffix_and_equal_ones_equally(tmp_path):
    figure, _ = utils.new_figure(1, 1, "a title")
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        utils.save_figure(tmp_path / f"a{suffix}", figure)
        assert (tmp_path / f"a{suffix}").read_bytes().startswith(start)
    utils.save_figure(tmp_path / "b.png", figure)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="bmpp"):
        utils.save_figure(tmp_path / "a.bmpp", figure)


def test_what_is_slow_to_import_or_not_everywhere_is_imported_only_for_what_needs_it(tmp_path):
    for name in ("prune.py", "compress.py"):
        shutil.copy(ROOT / "src" / name, tmp_path)
    for name in ("config.py", "model.py", "utils.py", "system.py"):  # a user's own, of the same names
        (tmp_path / name).write_text("raise ImportError('this is not the project')")
    code = """if True:
        import io, sys, torch, numpy

        before = {name.partition(".")[0] for name in sys.modules} | set(sys.stdlib_module_names)
        sys.path.insert(0, sys.argv[1])  # the two files alone
        import prune, compress
        network = torch.nn.Sequential(torch.nn.Linear(9, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        pruned = prune.prune_model(network, "weight", 0.9)
        compress.save_compressed(compress.shrink(pruned), io.BytesIO())
        compress.to_sparse(pruned)(torch.rand(64, 9))
        assert prune.__file__.startswith(sys.argv[1]) and compress.__file__.startswith(sys.argv[1])
        assert {name.partition(".")[0] for name in sys.modules} - before == {"prune", "compress"}

        sys.path[0] = sys.argv[2]
        import engine
        model = torch.nn.Linear(2, 2)
        optimizer = engine.Adam(model.parameters(), fused=True)
        engine.Engine(model, optimizer).train_epoch([(torch.eye(2), torch.tensor([0, 1]))])
        assert "torch._dynamo" not in sys.modules

        import data, utils
        data.load("digits", ".")
        assert not {"matplotlib", "torchvision"} & {*sys.modules}
        utils.new_figure(1, 1, "a title")
        assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code, tmp_path, ROOT / "src"], cwd=ROOT, check=True)


# ── plots ──


def test_the_plot_over_k_shows_mean_seeds_facts_and_names():
    rows = make_rows(3, finetuned=True)
    figure = utils.plot_accuracy_sparsity(rows, "a title")
    near, whole = figure.axes
    for panel in (near, whole):
        assert drawn(panel, "weights")[:, 0].tolist() == [0, 50, 60, 80, 90, 99]
        assert drawn(panel, "weights")[:, 1].tolist() == pytest.approx([97.1, 97.1, 97.1, 96.6, 94.1, 20.1])
        assert drawn(panel, "units, fine-tuned")[:, 1].tolist() == pytest.approx([96.9] * 6)
        plain = [line for line in thin_lines(panel, utils.COLORS["unit"]) if line[0, 1] != 96.9]
        assert sorted(line[3, 1] for line in plain) == pytest.approx([40, 40.1, 40.2])  # every seed
        assert len(panel.patches) == 1 and not panel.collections  # the flat zone, and no band
    words = {text.get_text(): to_hex(text.get_color()).upper() for text in near.texts}
    assert words["weights flat to 80 %\nfine-tuned: to 99 %"] == utils.COLORS["weight"]
    assert words["units flat to 50 %\nfine-tuned: to 99 %"] == utils.COLORS["unit"]
    assert near.get_ylabel() == "close to dense: accuracy, %" and whole.get_ylabel() == "whole range: accuracy, %"
    assert set(margin(near)) == {"dense 97.10 %", "0.5 points below", "weights, fine-tuned", "units, fine-tuned"}
    assert list(margin(whole))[2:] == ["weights", "chance 10 %", "units"]  # as they lie, from top to bottom
    assert margin(whole)["weights"] == utils.COLORS["weight"]
    assert near.get_ylim()[0] < 97.1 - 0.5 and near.get_ylim()[1] > 97.2  # the best seed is above dense
    assert whole.get_xlabel().startswith("pruned: k % of each layer")
    assert figure.get_supxlabel() == "bold: mean, thin: each of 3 seeds"
    assert_legible(figure)


def test_many_seeds_are_a_band_from_the_lowest_to_the_highest():
    rows = [replace(row, scope="global") for row in make_rows(9)]
    figure = utils.plot_accuracy_sparsity(rows, "a title")
    whole = figure.axes[1]
    assert not thin_lines(whole, utils.COLORS["weight"]) and len(whole.collections) == 2
    edge = whole.collections[0].get_paths()[0].vertices
    assert edge[:, 1].min() == 20 and edge[:, 1].max() == pytest.approx(97.8)
    assert "each layer" not in whole.get_xlabel() and "all layers together" in whole.get_xlabel()
    assert "9 seeds" in figure.get_supxlabel()


def test_every_curve_differs_from_every_other_in_more_than_its_color():
    ks = [0, 50, 90, 99, 99.875, 99.885, 99.895, 99.905, 99.915, 99.925]  # as many as have room beside these names
    rows = sweep(ks, methods=tuple(utils.NAMES))
    rows = [replace(row, finetuned_percent=row.accuracy_percent + 1) for row in rows]
    figure = utils.plot_accuracy_sparsity(rows, "a title")
    whole = figure.axes[1]
    lines = [line for line in whole.get_lines() if len(np.asarray(line.get_xydata())) > 2]
    looks = {(line.get_linestyle(), line.get_marker(), line.get_markerfacecolor() == "white") for line in lines}
    assert len(lines) == len(looks) == 8 and len({style for style, *_ in looks}) == 4
    assert len(margin(whole)) == 9
    assert_legible(figure)


def test_the_plot_over_weights_is_logarithmic_and_shows_published_networks():
    rows = make_rows(2)
    figure = utils.plot_accuracy_weights(rows, "a title", utils.LENET_300_100)
    near, whole = figure.axes
    assert whole.get_xscale() == "log" and whole.xaxis_inverted()
    assert drawn(near, "weights")[:, 0].tolist() == [2_386_000, 1_193_000, 954_400, 477_200, 238_600, 23_860]
    assert drawn(near, "Guo 2016").tolist() == [[4_800, 98.0]]
    assert {"Han 2015", "Guo 2016", "Molchanov 2017"} <= set(margin(near)) and near.get_ylim()[1] > 98.4
    points = [line for line in near.get_lines() if str(line.get_label()).endswith(("2015", "2016", "2017"))]
    assert len({line.get_marker() for line in points}) == 3 and {line.get_color() for line in points} == {"0.4"}
    note = " ".join(figure.get_supxlabel().split())
    assert "LeNet-300-100, which starts from 266,200 weights, ours from 2,386,000" in note
    assert_legible(figure)


def test_a_network_without_weights_is_drawn_at_the_edge():
    rows = sweep([0, 50, 90, 99, 100], seeds=2)
    figure = utils.plot_accuracy_weights(rows, "a title")
    whole = figure.axes[1]
    x, y = drawn(whole, "weights")[-1]
    assert 0 < x < 10_000 and y == 9
    whole.figure.draw_without_rendering()
    ticks = zip(whole.get_xticks(), whole.get_xticklabels(), strict=True)
    right = min(whole.get_xlim())
    assert min((at, label.get_text()) for at, label in ticks if at > right) == (pytest.approx(x), "none")
    assert_legible(figure)


KS = [
    [0, 50], [0], [0, 99.8, 99.99999, 99.999991, 99.9999915], [float(k) for k in range(100)],
    [0, 25, 50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99, 99.5, 99.9, 100],
]  # fmt: skip


@pytest.mark.parametrize("ks", KS, ids=lambda ks: f"{len(ks)}-{ks[-1]}")
def test_any_k_make_a_legible_axis(ks):
    figure = utils.plot_accuracy_sparsity(sweep(ks), "a title")
    axes = figure.axes[1]
    at = (axes.transScale + axes.transLimits).transform([(k, 0) for k in ks])[:, 0]
    assert (np.diff(at) > 0).all() and at[0] > 0 and at[-1] < 1
    assert axes.get_xticks().tolist() == ks and float(axes.get_xticklabels()[-1].get_text()) == ks[-1]
    assert_legible(figure)


def test_the_right_end_of_the_k_axis_has_room():
    axes = utils.plot_accuracy_sparsity(make_rows(), "a title").axes[0]
    zero, ninety, last = axes.transData.transform([[k, 0] for k in (0, 90, 99)])[:, 0]
    assert last - ninety > 0.25 * (ninety - zero)


def test_long_titles_are_wrapped_and_short_lines_kept():
    sizes = "-".join(["1000"] * 15)
    for title in ("MNIST, 10,000 test images; " * 9, f"MNIST, {sizes}; {sizes}", "$x", "a $\\wrong$ b", "two\nlines"):
        figure, _ = utils.new_figure(1, 1, title, f"a note, {sizes} {sizes}")
        assert_legible(figure)
        assert figure.get_suptitle().replace("\\$", "$") == title  # a dollar sign starts no formula


TICKS = [
    (0.9, 120, "1 2 5 10 20 50 100"), (0.002, 9000, "0.001 0.01 0.1 1 10 100 1,000 10,000"),
    (2.1, 2.9, "2.2 2.4 2.6 2.8"),
]  # fmt: skip


@pytest.mark.parametrize(("low", "high", "labels"), TICKS)
@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_axes_have_readable_ticks(low, high, labels, which):
    figure, (axes,) = utils.new_figure(1, 1, "a title")
    axes.plot([low, high], [low, high])
    utils.log_axis(axes, which)
    figure.draw_without_rendering()
    axis = axes.xaxis if which == "x" else axes.yaxis
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    least, most = axis.get_view_interval()
    shown = [label.get_text() for place, label in ticks if least <= place <= most]
    assert shown == labels.split()


def test_labels_of_lines_that_end_together_are_moved_apart_on_a_logarithmic_axis_too():
    figure, (axes,) = utils.new_figure(1, 1, "a title")
    for i in range(5):
        axes.plot([1, 2], [1, 100 + i], label=f"line {i}")
    axes.plot([1, 2], [1, 10_000], label="beyond")
    axes.plot([1, 2], [1, 50])
    axes.set_ylim(1, 1000)
    utils.log_axis(axes, "y")
    utils.label_ends(axes)
    heights = [text.xyann[1] for text in axes.texts]
    assert list(margin(axes)) == [f"line {i}" for i in (4, 3, 2, 1, 0)]
    assert all(high - low > 0.03 for low, high in pairwise(sorted(heights)))
    assert np.mean(heights) == pytest.approx(2 / 3, abs=0.01)
    assert_legible(figure)
