import dataclasses
import sys

import pytest
import torch
from torch import nn

import compress
import costs
from costs import CostRow, break_even, format_costs, measure_costs, plot_cost_sparsity
from model import NeuralNetwork
from prune import prune_model
from utils import Row, save_figure

KS = (0.0, 50.0, 70.0, 99.0)


def make_costs(spread=0.1, batch_sizes=(1, 256)):
    """Sparse kernels take 10 ms at k = 0, dense ones 4 ms: sparse is faster above k = 60. Shrunk falls to 0.04 ms."""
    cost = {"dense": lambda k: 4.0, "sparse": lambda k: 10 - k / 10, "shrunk": lambda k: 4 - k / 25}
    made = []
    for batch_size in batch_sizes:
        for method, form in (("weight", "dense"), ("weight", "sparse"), ("unit", "shrunk")):
            for k in KS:
                file, time = int(9.5e6 * (1 - k / 100)) + 1000, cost[form](k) * batch_size / 256
                made.append(CostRow(method, k, 98 - k / 10, form, file, 10_000_000, batch_size, time, spread * time))
    return made


def changed(form, k, **changes):
    """The costs of make_costs, where those of one form at one k are others."""
    rows = make_costs()
    return [dataclasses.replace(row, **changes) if (row.form, row.k_percent) == (form, k) else row for row in rows]


def test_break_even_is_the_smallest_k_from_which_on_sparse_is_faster():
    assert break_even(make_costs(), 256) == (4, 70, "sparse kernels pay from k = 70 % on")
    assert break_even(changed("sparse", 70, latency_ms=4.0), 256)[1] == 99  # as fast is not faster
    always_slower = [row for row in make_costs() if row.form != "sparse" or row.k_percent < 60]
    never_sparse = [row for row in make_costs() if row.form != "sparse"]
    for rows in (always_slower, never_sparse):
        assert break_even(rows, 256) == (4, None, "sparse kernels do not pay")
    only_units = [row for row in make_costs() if row.method == "unit"]  # the unpruned one is dense
    assert break_even(only_units, 256) == (4, None, "") and "sparse" not in format_costs(only_units)
    assert break_even([row for row in make_costs() if row.k_percent == 0], 256)[0] == 4  # also of a network with zeros


def test_a_busy_machine_allows_no_conclusion():
    calm, busy = make_costs(spread=0.5), make_costs(spread=0.51)
    assert break_even(calm, 1)[1] == 70
    assert break_even(busy, 1)[1:] == (None, "the machine is busy: no conclusion")
    one_busy = changed("dense", 0, latency_iqr_ms=2.5)
    assert break_even(one_busy, 256)[1] is None
    table = format_costs(busy)
    assert "no conclusion" in table and "busy" in table and "pay" not in table
    assert plot_cost_sparsity(busy, "a title").axes[3].get_title() == "the machine is busy: no conclusion"


def test_the_table_has_a_line_a_network_in_its_fastest_form():
    lines = format_costs(make_costs()).splitlines()
    assert max(map(len, lines)) <= 120
    assert " ".join(lines[0].split()) == "k % file kB % of dense batch 1: ms speed-up batch 256: ms speed-up"
    assert len(lines) == 2 + 2 * len(KS) + 3
    cells = {tuple(line.split()[:2]): line.split()[2:] for line in lines[2:-3]}
    assert cells["weights", "50"] == ["4,751", "47.51", "dense", "0.0156", "1.00", "dense", "4", "1.00"]
    assert cells["weights", "99"] == ["96", "0.96", "sparse", "0.000391", "40.00", "sparse", "0.1", "40.00"]
    assert cells["units", "99"][-3:] == ["shrunk", "0.04", "100.00"]
    assert lines[-3:] == [
        "dense file: 10.00 MB, 9.50 MB in gzip (95.0%)",
        "batch 1: sparse kernels pay from k = 70 % on",
        "batch 256: sparse kernels pay from k = 70 % on",
    ]


@pytest.mark.parametrize("methods", [("weight", "unit"), ("weight",), ("unit",)])
def test_the_figure_shows_every_form_as_speed_up_beside_milliseconds(methods, tmp_path):
    figure = plot_cost_sparsity([row for row in make_costs() if row.method in methods], "a title")
    accuracy, file, _, speed, _, milliseconds = figure.axes
    assert figure.get_suptitle() == "a title"
    assert accuracy.get_lines()[0].get_xydata().tolist() == [[k, 98 - k / 10] for k in KS]
    assert file.get_lines()[0].get_ydata()[0] == pytest.approx(95.01)
    drawn = {line.get_label(): line.get_ydata() for line in speed.get_lines()}
    if "weight" in methods:
        assert drawn["weights, sparse kernels"] == pytest.approx([4 / (10 - k / 10) for k in KS])
        assert drawn["weights, dense kernels"] == pytest.approx([1] * 4)
        assert speed.get_title() == "sparse kernels pay from k = 70 % on"
    if "unit" in methods:
        assert drawn["units, shrunk"] == pytest.approx([4 / (4 - k / 25) for k in KS])
    assert sorted(milliseconds.get_ylim()) == pytest.approx(sorted(4 / limit for limit in speed.get_ylim()))
    save_figure(tmp_path / "c.png", figure)
    assert (tmp_path / "c.png").stat().st_size > 10_000


@pytest.mark.parametrize("changes", [{"spread": 3.0}, {"batch_sizes": (8, 8000)}])
def test_figures_of_odd_costs_can_be_drawn(changes, tmp_path):
    rows = [dataclasses.replace(row, k_percent=100.0) if row.k_percent == 99 else row for row in make_costs(**changes)]
    save_figure(tmp_path / "c.png", plot_cost_sparsity(rows, "a title"))
    assert format_costs(rows)


def test_a_terminal_shows_how_far_the_measurement_is(monkeypatch, capsys):
    monkeypatch.setattr(costs, "ROUND_SECONDS", 1e-4)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure_costs(NeuralNetwork((30, 20, 10)), [Row(0, "weight", "layer", 0.0, 0.0, 0, 90.0)], torch.rand(300, 30))
    assert "costs:   0%|" in capsys.readouterr().err


def test_measured_costs_are_those_of_the_pruned_networks(monkeypatch, capsys):
    monkeypatch.setattr(costs, "ROUNDS", 2)
    monkeypatch.setattr(costs, "ROUND_SECONDS", 1e-4)
    timed = []

    def latency(network, batch, min_run_time):
        timed.append((network, len(batch)))
        return compress.latency(network, batch, min_run_time)

    monkeypatch.setattr(costs, "latency", latency)
    model = NeuralNetwork((30, 40, 20, 10))
    rows = [Row(0, method, "global", k, k, 0, 90.0 - k) for method in ("weight", "unit") for k in (0.0, 90.0)]
    measured = measure_costs(model, rows, torch.rand(300, 30), scope="global", skip=("fc1",))
    assert "%|" not in capsys.readouterr().err  # a bar is for terminals
    assert [(row.method, row.k_percent, row.form, row.batch_size) for row in measured] == [
        (method, k, form, batch_size)
        for method, k, form in (
            *(("weight", 0, "dense"), ("weight", 90, "dense"), ("weight", 90, "sparse")),
            *(("unit", 0, "shrunk"), ("unit", 90, "shrunk")),
        )
        for batch_size in (1, 256)
    ]
    assert [size for _, size in timed] == [1, 256] * 10
    for row, (network, _) in zip(measured, timed, strict=False):
        pruned = prune_model(model, row.method, row.k_percent / 100, scope="global", skip=("fc1",))
        assert row.stored_bytes == compress.stored_bytes(compress.shrink(pruned)) and row.dense_bytes == 4 * 2200
        assert row.accuracy_percent == 90 - row.k_percent and row.latency_ms > 0 <= row.latency_iqr_ms
        batch = torch.rand(3, 30)
        torch.testing.assert_close(network(batch), pruned(batch))
        assert isinstance(network, nn.Module)
