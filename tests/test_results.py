import csv
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import results
import utils
from results import CostRow, Curve, Row


def make_rows(seeds: int = 1, finetuned: bool = False) -> list[Row]:
    """Rows of curves with known facts: weights flat to 80 and bent at 90, units flat to 50 and bent at 60."""
    ks = [0, 50, 60, 80, 90, 99]
    accuracy = {"weight": [98, 98, 98, 97.5, 95, 20], "unit": [98, 97.5, 96, 40, 15, 10]}
    return [
        Row(seed, method, "layer", k, k, round(2_386_000 * (1 - k / 100)), value + seed, 97.0 if finetuned else None)
        for seed in range(seeds)
        for method, values in accuracy.items()
        for k, value in zip(ks, values, strict=True)
    ]


def make_costs() -> list[CostRow]:
    """Sparse costs 10 ms at k = 0 and is faster than dense, at 4 ms, above k = 60."""
    cost = {"dense": lambda k: 4.0, "sparse": lambda k: 10 - k / 10, "shrunk": lambda k: 4 - k / 25}
    return [
        CostRow(
            method, k, 98.0, form, int(9.5e6 * (1 - k / 100)) + 1000, batch, cost[form](k) * batch / 256 + 1e-3, 0.1
        )
        for batch in (1, 256)
        for method, form in (("weight", "dense"), ("weight", "sparse"), ("unit", "shrunk"))
        for k in (0.0, 50.0, 70.0, 99.0)
    ]


def curve(k: list[float], mean: list[float]) -> Curve:
    return Curve(np.array(k), np.array(mean), np.zeros(len(k)), np.ones(len(k)))


def test_curves_are_means_and_sample_standard_deviations_over_the_seeds():
    found = results.curves(make_rows(seeds=3))
    assert list(found) == ["weight", "unit"]
    assert found["weight"].mean.tolist() == [99, 99, 99, 98.5, 96, 21]
    assert found["unit"].std.tolist() == [1] * 6
    assert found["unit"].weights[1] == 1_193_000
    assert results.curves(make_rows(), "finetuned_percent") == {}


@pytest.mark.parametrize(
    ("mean", "expected"),
    [
        ([98, 97.5, 97.49, 98], 50),  # exactly 0.5 points lower is flat; what comes after a dip is not
        ([98, 99, 98, 97.6], 90),  # better than dense is flat, too
        ([98, 90, 90, 90], 0),
        ([97, 97, 97, 97], None),
        ([98.61, 98.11, 98.1, 98.1], 50),  # as decimal numbers, not as their binary neighbors
    ],
)
def test_flat_until(mean, expected):
    dense = 98.61 if mean[0] == 98.61 else 98
    assert results.flat_until(curve([0, 50, 60, 90], mean), dense) == expected


def test_bend_is_where_the_curve_lies_highest_above_its_chord():
    assert results.bend(curve([0, 50, 90, 100], [100, 99, 95, 0])) == 90
    assert results.bend(curve([0, 50, 100], [100, 50, 0])) is None
    assert results.bend(curve([0], [100])) is None


def test_table_and_facts_say_what_the_rows_hold():
    table = results.format_table(make_rows(seeds=2)).splitlines()
    assert " ".join(table[0].split()) == "k % weights: accuracy % weights kept units: accuracy % weights kept"
    assert table[-1].split() == ["99", "20.50", "±", "0.71", "23,860", "10.50", "±", "0.71", "23,860"]
    assert results.format_facts(make_rows()).splitlines() == [
        "weights: flat up to k = 80 % (within 0.5 points of dense, 98.00 %), bends at k = 90 %",
        "units: flat up to k = 50 % (within 0.5 points of dense, 98.00 %), bends at k = 60 %",
    ]
    assert "fine-tuned %" in results.format_table(make_rows(finetuned=True))


def test_csv_has_the_columns_of_the_rows_and_blanks_for_what_is_unused(tmp_path):
    results.write_csv(tmp_path / "rows.csv", make_rows())
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert ",".join(rows[0]) == (
        "seed,method,scope,k_percent,achieved_percent,weights_kept,accuracy_percent,finetuned_percent"
    )
    assert rows[3] == {
        "seed": "0", "method": "weight", "scope": "layer", "k_percent": "80", "achieved_percent": "80",
        "weights_kept": "477200", "accuracy_percent": "97.5", "finetuned_percent": "",
    }  # fmt: skip


def test_break_even_is_the_smallest_k_from_which_on_sparse_is_faster():
    assert results.break_even(make_costs(), 256) == 70
    slow = [
        CostRow("weight", k, 98, form, 1, 1, cost, 0) for k in (0, 99) for form, cost in (("dense", 1), ("sparse", 2))
    ]
    assert results.break_even(slow, 1) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_plots_draw_every_point(seeds, tmp_path):
    rows = make_rows(seeds, finetuned=True)
    figure = results.plot_accuracy_sparsity(rows, "a title")
    drawn = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert drawn["weights"].get_xydata()[:, 0].tolist() == [0, 50, 60, 80, 90, 99]
    assert drawn["units, fine-tuned"].get_ydata().tolist() == [97] * 6
    assert len(figure.axes[0].collections) == (2 if seeds > 1 else 0)  # the bands
    near, whole = (panel.get_ylim() for panel in figure.axes)
    dense = results.dense_accuracy(rows)
    assert dense - 3 < near[0] < dense - 0.5 < dense < near[1] and whole[0] == 0 and whole[1] > 100
    words = [text.get_text() for text in figure.axes[0].texts]
    assert "weights flat to 80 %" in words and "units flat to 50 %" in words
    results.save_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

    by_size = results.plot_accuracy_weights(rows, "a title").axes[0]
    assert by_size.get_xscale() == "log" and by_size.xaxis_inverted()
    results.save_figure(tmp_path / "b.png", by_size.figure)


def test_the_right_end_of_the_k_axis_has_room():
    axes = results.plot_accuracy_sparsity(make_rows(), "a title").axes[0]
    place = axes.transData.transform([[k, 0] for k in (0, 90, 99, 100)])[:, 0]
    assert place[2] - place[1] > 0.4 * (place[1] - place[0])
    assert np.isfinite(place).all() and place[3] > place[2]


def test_an_empty_network_has_its_place_or_none(tmp_path):
    rows = [*make_rows(), Row(0, "weight", "layer", 100, 100, 0, 10.0)]
    results.save_figure(tmp_path / "a.png", results.plot_accuracy_sparsity(rows, "a title"))
    results.save_figure(tmp_path / "b.png", results.plot_accuracy_weights(rows, "a title"))


def test_cost_plot_shows_both_forms_and_marks_the_break_even(tmp_path):
    figure = results.plot_cost_sparsity(make_costs(), "a title")
    assert len(figure.axes) == 4
    assert figure.axes[3].get_title() == "sparse kernels pay from k = 70 % on"
    results.save_figure(tmp_path / "c.png", figure)


# ── files ──


def test_a_write_that_fails_leaves_the_old_file_whole_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), utils.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_other(tmp_path):
    with utils.atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    (tmp_path / "other").write_text("new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert (tmp_path / "file").read_text() == "new"


def test_a_killed_write_is_cleaned_up_by_the_next_run_and_a_living_one_is_not(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import utils; from pathlib import Path\n"
        f"with utils.atomic_write(Path({str(tmp_path)!r}) / 'file') as temporary:\n"
        "    print('writing', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
    utils.prepare_folder(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    utils.prepare_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_one_that_cannot_be_is_told(tmp_path):
    utils.prepare_folder(tmp_path / "a" / "b c")
    assert (tmp_path / "a" / "b c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        utils.prepare_folder(tmp_path / "file")


# ── machine ──


def test_devices_and_precisions():
    assert utils.pick_device("cpu") == torch.device("cpu")
    assert utils.pick_precision("fp32", torch.device("cpu")) == torch.float32
    assert utils.pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    native = "avx512_bf16" in (flags := cpu_flags()) or "amx_bf16" in flags
    assert utils.pick_precision("auto", torch.device("cpu")) == (torch.bfloat16 if native else torch.float32)


def cpu_flags() -> list[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("needs Linux's /proc/cpuinfo to know what the processor has")
    return next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")).split()


def test_cuda_where_there_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda"):
        utils.pick_device("cuda")


def test_l2_is_the_norm_of_every_unit():
    weight = torch.tensor([[[3.0, 0.0], [0.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert utils.l2(weight).tolist() == [5, 0]
