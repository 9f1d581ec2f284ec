import csv
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_csv
from matplotlib.figure import Figure

import compress
import costs
import prune
import train
import utils
from config import K_PERCENT, Config, parse_config
from data import Batches, load
from engine import Engine
from model import NeuralNetwork

COLUMNS = "seed,method,scope,k_percent,achieved_percent,weights_kept,accuracy_percent,finetuned_percent"
QUICK = ("--epochs", "2", "--k", "50", "90")
SMALL = (784, 60, 30, 10)


class Stopped(Exception):
    """Stands for whatever ends a process between two seeds."""


class SmallNetwork(NeuralNetwork):
    def __init__(self, sizes: tuple[int, ...] = SMALL) -> None:
        super().__init__(sizes)


@pytest.fixture
def titles(monkeypatch):
    """A small network, empty plots and hasty measurements, where the test is about none of these; the plots' titles."""
    titles: list[str] = []

    def plot(rows: object, title: str, *_: object) -> Figure:
        titles.append(title)
        return Figure((1, 1))

    monkeypatch.setattr(train, "NeuralNetwork", SmallNetwork)
    monkeypatch.setattr(train, "SIZES", SMALL)
    monkeypatch.setattr(utils, "plot_accuracy_sparsity", plot)
    monkeypatch.setattr(utils, "plot_accuracy_weights", plot)
    monkeypatch.setattr(train, "pick_precision", lambda *_: "fp32")  # which auto measures, at each run anew
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "ROUND_SECONDS", 0.001)
    return titles


small = pytest.mark.usefixtures("titles")


def run_digits(folder: Path, *flags: str) -> int:
    folders = ("--models", str(folder / "models"), "--plots", str(folder / "plots"))
    return train.main(["--dataset", "digits", *folders, *flags])


def read_rows(folder: Path, name: str = "digits_accuracy_sparsity.csv") -> list[dict[str, str]]:
    with (folder / "plots" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def seeds(folder: Path) -> list[str]:
    """Those of the rows, each once."""
    return list(dict.fromkeys(row["seed"] for row in read_rows(folder)))


def load_digits_model(folder: Path) -> NeuralNetwork:
    return NeuralNetwork.from_state_dict(torch.load(folder / "models/digits_model.bin", weights_only=True))


def accuracy_percent(network: torch.nn.Module) -> float:
    digits = load("digits", ROOT / "inputs")
    return 100 * Engine(network).evaluate(Batches(digits.test_images, digits.test_labels, 90))


# ── the whole job ──


def test_the_whole_job_on_digits(tmp_path, capsys):
    assert run_digits(tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith("digits, 360 test images; 784-1000-1000-500-200-10, 10 epochs, seed 0; 1,437 training images")
    epochs = re.findall(
        r"^Epoch:(\d+)/10, Training Set Accuracy: (\d+\.\d\d)%, Testing Set Accuracy: (\d+\.\d\d)%$", out, re.M
    )
    assert [int(epoch) for epoch, _, _ in epochs] == list(range(1, 11))
    assert float(epochs[-1][1]) > 99 and float(epochs[-1][2]) >= 96
    assert re.search(r"^weights: flat up to k = \d+.* bends at k = ", out, re.M)
    assert files(tmp_path) == {
        "models/digits_model.bin", "models/digits_model.json", "plots/digits_accuracy_sparsity.csv",
        "plots/digits_accuracy_sparsity.png", "plots/digits_accuracy_weights.png",
    }  # fmt: skip

    rows = read_rows(tmp_path)
    assert ",".join(rows[0]) == COLUMNS
    assert [(row["method"], float(row["k_percent"])) for row in rows] == [
        (method, k) for method in ("weight", "unit") for k in K_PERCENT
    ]
    for row in rows:
        assert abs(float(row["achieved_percent"]) - float(row["k_percent"])) < 0.3
        assert row["scope"] == "layer" and row["finetuned_percent"] == ""
    assert rows[0]["weights_kept"] == rows[13]["weights_kept"] == "2386000"
    assert rows[0]["accuracy_percent"] == rows[13]["accuracy_percent"]
    assert int(rows[12]["weights_kept"]) <= 0.01 * 2_384_000 + 2000
    assert float(rows[12]["accuracy_percent"]) < 90  # 99 % of the weights matter

    model = load_digits_model(tmp_path)
    about = json.loads((tmp_path / "models/digits_model.json").read_text())
    assert about["accuracy"]["testing_percent"] == pytest.approx(accuracy_percent(model))
    assert (about["seed"], about["settings"]["epochs"], about["settings"]["batch_size"]) == (0, 10, 64)
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.mnist
def test_the_whole_job_on_mnist(tmp_path):
    """With two epochs in place of ten."""
    folders = ["--models", str(tmp_path), "--plots", str(tmp_path / "plots")]
    assert train.main(["--dataset", "mnist", "--epochs", "2", "--k", "50", "80", "99", *folders]) == 0
    rows = {(row["method"], float(row["k_percent"])): row for row in read_rows(tmp_path, "accuracy_sparsity.csv")}
    accuracy = {point: float(row["accuracy_percent"]) for point, row in rows.items()}
    assert accuracy["weight", 0] == accuracy["unit", 0] > 97
    assert accuracy["weight", 80] > accuracy["weight", 0] - 1
    assert accuracy["unit", 50] > accuracy["weight", 0] - 2
    assert accuracy["unit", 99] < 50
    assert int(rows["unit", 50]["weights_kept"]) == 784 * 500 + 500 * 500 + 500 * 250 + 250 * 100 + 100 * 10
    assert (tmp_path / "plots" / "accuracy_sparsity.png").exists() and (tmp_path / "mnist_model.bin").exists()


@small
def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run_digits(tmp_path / name, *QUICK, "--seed", seed) == 0
    for file in ("plots/digits_accuracy_sparsity.csv", "models/digits_model.bin"):
        first, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == same != other


@small
def test_scores_of_shrunk_and_sparse_copies_are_those_of_the_masked_network(tmp_path):
    assert run_digits(tmp_path, "--epochs", "4", "--k", "25", "60", "80", "95") == 0
    model = load_digits_model(tmp_path)
    for row in read_rows(tmp_path):
        pruned = prune.prune_model(model, row["method"], float(row["k_percent"]) / 100)
        assert float(row["accuracy_percent"]) == pytest.approx(accuracy_percent(pruned), abs=1e-3)
        assert int(row["weights_kept"]) <= sum(weight.count_nonzero() for weight in pruned.parameters())


@small
@pytest.mark.filterwarnings("ignore:pruning leaves nothing")
def test_points_that_differ_in_the_eighth_digit_stay_apart(tmp_path):
    ks = ["99.99999", "99.999991"]
    keep = [f"unit:{k}" for k in ks]
    assert run_digits(tmp_path, "--epochs", "1", "--k", *ks, "--methods", "unit", "--keep", *keep) == 0
    assert [row["k_percent"] for row in read_rows(tmp_path)] == ["0", *ks]
    assert {f"models/digits_unit_{k}.bin" for k in ks} < files(tmp_path)


@small
def test_fractions_in_place_of_percent_are_asked_about(tmp_path, capsys):
    assert run_digits(tmp_path, "--epochs", "1", "--k", "0.5", "0.9") == 0
    assert "did you mean 0 50 90?" in capsys.readouterr().out
    assert run_digits(tmp_path, "--epochs", "1", "--k", "50", "0.9") == 0
    assert "did you mean" not in capsys.readouterr().out


@small
def test_held_out_results_have_names_of_their_own(tmp_path, capsys):
    assert run_digits(tmp_path, *QUICK, "--holdout") == 0
    assert "Held-out Set Accuracy" in capsys.readouterr().out
    assert all("digits_holdout_" in name for name in files(tmp_path))
    assert "held-out_percent" in json.loads((tmp_path / "models/digits_holdout_model.json").read_text())["accuracy"]


@small
def test_a_training_of_one_step_in_all_learns_something(tmp_path):
    torch.manual_seed(0)
    before = SmallNetwork()
    assert run_digits(tmp_path, "--epochs", "1", "--batch-size", "2000", "--k", "50") == 0
    assert (load_digits_model(tmp_path).fc1.weight - before.fc1.weight).abs().max() > 1e-3
    assert float(read_rows(tmp_path)[0]["accuracy_percent"]) > accuracy_percent(before)


def test_training_through_random_masks_is_told_in_the_title(tmp_path, titles):
    for name, flags in (("plain", ()), ("through", ("--every-k",))):
        assert run_digits(tmp_path / name, "--epochs", "6", "--k", "90", *flags) == 0
    assert "every k" not in titles[0] and titles[-1].endswith("6 epochs, seed 0\nevery k")
    plain, through = (read_rows(tmp_path / name) for name in ("plain", "through"))
    assert float(through[3]["accuracy_percent"]) > float(plain[3]["accuracy_percent"])  # units at 90 %


# ── fine-tuning ──


@small
@pytest.mark.filterwarnings("ignore:pruning leaves nothing")  # of a layer that globally counts for little
def test_every_way_to_prune_with_fine_tuning(tmp_path, capsys):
    flags = ["--methods", "weight", "unit", "random_weight", "random_unit", "--scope", "global"]
    flags += ["--finetune-epochs", "3", "--unit-lasso", ".1", "--keep", "unit:70"]
    assert run_digits(tmp_path, "--epochs", "6", "--k", "70", *flags) == 0
    rows = read_rows(tmp_path)
    assert [row["method"] for row in rows[::2]] == ["weight", "unit", "random_weight", "random_unit"]
    assert {row["scope"] for row in rows} == {"global"}
    accuracy = {(row["method"], row["k_percent"]): float(row["accuracy_percent"]) for row in rows}
    finetuned = {(row["method"], row["k_percent"]): float(row["finetuned_percent"]) for row in rows}
    assert accuracy["random_weight", "70"] < accuracy["weight", "70"]
    assert finetuned["unit", "70"] > accuracy["unit", "70"]
    assert finetuned["random_unit", "70"] > accuracy["random_unit", "70"]
    assert finetuned["weight", "0"] == accuracy["weight", "0"]  # nothing is pruned, so nothing is retrained
    state, kept = compress.load_compressed(tmp_path / "models/digits_unit_70.bin")
    assert kept["finetuned_percent"] == pytest.approx(finetuned["unit", "70"], abs=1e-3)
    assert accuracy_percent(NeuralNetwork.from_state_dict(state)) == pytest.approx(kept["finetuned_percent"])
    assert "units, fine-tuned: " in capsys.readouterr().out


@pytest.mark.parametrize(("method", "scope"), [("weight", "layer"), ("unit", "layer"), ("weight", "global")])
def test_fine_tuning_prunes_as_much_as_was_asked_for_and_leaves_the_dense_network(method, scope):
    digits = load("digits", ROOT / "inputs")
    config = Config("digits", precision="fp32", scope=scope, finetune_epochs=2, unit_lasso=1.0)
    dense = SmallNetwork()
    engine, batches = train.make_engine(dense, digits, config, 0, epochs=2, peak=5e-3, masks=None)
    engine.train_epoch(batches)
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    masks = prune.find_masks(dense, method, 0.8, scope=scope)
    once = accuracy_percent(prune.prune_model(dense, method, 0.8, scope=scope))
    tuned = train.finetune(dense, method, 80, digits, config, seed=0)
    left = sum(int(tuned.get_parameter(name).count_nonzero()) for name in masks)
    assert left == sum(int(mask.sum()) for mask in masks.values())
    assert accuracy_percent(tuned) > once
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


# ── costs, kept networks, --model ──


@small
def test_costs_and_kept_networks(tmp_path, capsys):
    flags = ("--epochs", "1", "--k", "90", "--costs", "--keep", "weight:90", "--keep", "unit:60")
    assert run_digits(tmp_path, *flags) == 0
    rows = read_rows(tmp_path, "digits_cost_sparsity.csv")
    assert {(row["method"], row["form"]) for row in rows} == {
        ("weight", "dense"), ("weight", "sparse"), ("unit", "shrunk"),
    }  # fmt: skip
    assert {row["batch_size"] for row in rows} == {"1", "256"}
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    size = {(row["method"], row["k_percent"]): int(row["stored_bytes"]) for row in rows}
    assert size["unit", "90"] < 0.11 * size["unit", "0"] and size["weight", "90"] < 0.2 * size["weight", "0"]
    assert (tmp_path / "plots/digits_cost_sparsity.png").exists()
    assert "batch 256: " in capsys.readouterr().out

    state, info = compress.load_compressed(tmp_path / "models/digits_unit_60.bin")
    network = NeuralNetwork.from_state_dict(state)
    assert network.sizes == (784, 24, 12, 10)
    assert info["accuracy_percent"] == pytest.approx(accuracy_percent(network))
    assert (info["method"], info["k_percent"], info["settings"]["epochs"]) == ("unit", 60, 1)
    assert (tmp_path / "models/digits_weight_90.bin").stat().st_size < 0.2 * int(rows[0]["dense_bytes"])

    assert run_digits(tmp_path, "--epochs", "1", "--k", "90") == 0  # which leaves these, of a network that has gone
    out = capsys.readouterr().out
    for name in ("models/digits_unit_60.bin", "plots/digits_cost_sparsity.csv", "plots/digits_cost_sparsity.png"):
        assert f"{tmp_path / name} is of an earlier run" in out
    assert out.count("earlier") == 4
    again = ("--k", "90", "--model", str(tmp_path / "models/digits_model.bin"))
    assert run_digits(tmp_path, *again, "--costs") == 0  # which are newer than the network
    assert "cost_sparsity.csv is of" not in capsys.readouterr().out
    assert run_digits(tmp_path, *again) == 0
    assert len(re.findall(r"cost_sparsity.\w+ is of an earlier run", capsys.readouterr().out)) == 2


def test_an_existing_model_takes_the_place_of_training(tmp_path, capsys, titles):
    assert run_digits(tmp_path, *QUICK, "--seed", "3") == 0
    rows, before = read_rows(tmp_path), files(tmp_path)
    path = tmp_path / "models/digits_model.bin"
    model, written = path.read_bytes(), path.stat().st_mtime_ns
    capsys.readouterr()
    assert run_digits(tmp_path, "--k", "50", "90", "--model", str(path)) == 0
    assert "Epoch" not in capsys.readouterr().out
    assert rows[0]["seed"] == "3" and files(tmp_path) == before
    assert read_rows(tmp_path) == [row | {"seed": ""} for row in rows]  # a file of weights does not tell its seed
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (model, written)
    state = torch.load(path, weights_only=True)
    torch.save({name: weight.double() for name, weight in state.items()}, tmp_path / "double.bin")
    assert run_digits(tmp_path, "--k", "50", "90", "--model", str(tmp_path / "double.bin")) == 0
    assert read_rows(tmp_path) == [row | {"seed": ""} for row in rows]
    assert "network of double.bin" in titles[-1] and not re.search("epoch|seed|learning", titles[-1])


def test_a_kept_network_can_be_swept_and_nothing_is_claimed_of_its_training(tmp_path, titles):
    assert run_digits(tmp_path, *QUICK, "--keep", "unit:50", "--learning-rate", "1e-3") == 0
    kept = tmp_path / "models/digits_unit_50.bin"
    whole = kept.read_bytes()
    with pytest.raises(FileExistsError, match=r"--keep would overwrite .*digits_unit_50.bin, which --model reads"):
        run_digits(tmp_path, "--model", str(kept), "--keep", "unit:50")
    assert kept.read_bytes() == whole
    _, info = compress.load_compressed(kept)
    assert run_digits(tmp_path / "next", "--model", str(kept), "--k", "50", "--keep", "unit:50") == 0
    rows = read_rows(tmp_path / "next")
    assert float(rows[0]["accuracy_percent"]) == pytest.approx(info["accuracy_percent"], abs=1e-3)
    assert (rows[0]["seed"], int(rows[0]["weights_kept"])) == ("", info["weights_kept"])
    assert "network of digits_unit_50.bin" in titles[-1]
    _, again = compress.load_compressed(tmp_path / "next/models/digits_unit_50.bin")
    assert again["settings"]["model"] == str(kept)
    assert not {"epochs", "learning_rate", "batch_size", "seed"} & again["settings"].keys()


@small
def test_a_model_and_a_json_that_disagree_are_told(tmp_path):
    for name, seed in (("a", "3"), ("b", "4")):
        assert run_digits(tmp_path / name, "--epochs", "1", "--k", "50", "--seed", seed) == 0
    path, about = tmp_path / "a/models/digits_model.bin", tmp_path / "a/models/digits_model.json"
    whole = about.read_bytes()
    for content in ((tmp_path / "b/models/digits_model.json").read_bytes(), b"[" * 10**6, b"\xff"):
        about.write_bytes(content)
        with pytest.warns(UserWarning, match=r"digits_model.json does not describe .*digits_model.bin"):
            assert run_digits(tmp_path, "--k", "50", "--model", str(path)) == 0
        assert seeds(tmp_path) == [""]
    about.write_bytes(whole)
    model = bytearray(path.read_bytes())
    model[len(model) // 2] ^= 1  # the flip of one bit
    path.write_bytes(model)
    with pytest.raises(ValueError, match=r"digits_model.bin.* is damaged"):
        run_digits(tmp_path, "--k", "50", "--model", str(path))


# ── several seeds ──


@pytest.fixture
def trained(monkeypatch, titles):
    """The seeds that were trained, in order; an entry "stop at N" ends the run before seed N, once."""
    seeds: list[object] = []
    original = train.train

    def recording(model, dataset, config, seed):
        if f"stop at {seed}" in seeds:
            seeds.remove(f"stop at {seed}")
            raise Stopped
        seeds.append(seed)
        original(model, dataset, config, seed)

    monkeypatch.setattr(train, "train", recording)
    return seeds


def stop_before(seed: int, folder: Path, trained: list[object], *flags: str) -> list[Path]:
    """The files that such a run leaves behind."""
    trained.append(f"stop at {seed}")
    with pytest.raises(Stopped):
        run_digits(folder, *flags)
    trained.clear()
    return sorted((folder / "plots").glob("digits_accuracy_sparsity_seed_*.unfinished"))


BRIEF = ("--epochs", "1", "--k", "50")
CSV = "plots/digits_accuracy_sparsity.csv"


def test_a_run_that_is_stopped_goes_on_after_the_last_whole_seed(tmp_path, trained, capsys):
    flags = (*QUICK, "--seeds", "2")
    assert run_digits(tmp_path / "undisturbed", *flags) == 0
    assert len(stop_before(1, tmp_path / "stopped", trained, *flags)) == 1
    assert run_digits(tmp_path / "stopped", *flags) == 0
    assert trained == [1]
    assert "\ndone before: seed 0\n" in capsys.readouterr().out
    assert files(tmp_path / "stopped") == files(tmp_path / "undisturbed")
    model = (tmp_path / "undisturbed/models/digits_model.bin").read_bytes()
    assert (tmp_path / "stopped/models/digits_model.bin").read_bytes() == model
    assert (tmp_path / "stopped" / CSV).read_bytes() == (tmp_path / "undisturbed" / CSV).read_bytes()

    assert run_digits(tmp_path / "stopped", *flags) == 0  # a run that was whole is repeated from the start
    assert trained == [1, 0, 1]
    stop_before(1, tmp_path / "stopped", trained, *flags)
    assert run_digits(tmp_path / "stopped", *flags, "--learning-rate", "1e-3", "--seeds", "1") == 0
    assert run_digits(tmp_path / "stopped", *flags) == 0  # which brings back the model of seed 0
    assert trained == [0, 0, 1]
    assert (tmp_path / "stopped/models/digits_model.bin").read_bytes() == model


def test_a_stopped_run_goes_on_with_more_seeds_but_not_with_other_settings(tmp_path, trained, capsys):
    assert run_digits(tmp_path / "undisturbed", *BRIEF, "--seeds", "3") == 0
    stop_before(1, tmp_path / "a", trained, *BRIEF, "--seeds", "2")
    assert run_digits(tmp_path / "a", *BRIEF, "--seeds", "3", "--format", "svg") == 0
    assert trained == [1, 2]
    assert (tmp_path / "a" / CSV).read_bytes() == (tmp_path / "undisturbed" / CSV).read_bytes()
    for name, other in (("b", ("--learning-rate", "1e-3")), ("c", ("--seed", "1"))):
        stop_before(2, tmp_path / name, trained, *BRIEF, "--seeds", "3")
        capsys.readouterr()
        assert run_digits(tmp_path / name, *BRIEF, "--seeds", "2", *other) == 0
        assert trained == ([0, 1] if name == "b" else [1, 2])
        told = re.findall(r"_seed_(\d).unfinished is .* another run: it is not used", capsys.readouterr().err)
        assert told == (["0", "1"] if name == "b" else ["1"])
        trained.clear()


def be_rank(monkeypatch, rank: str) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "2"), ("RANK", rank)):
        monkeypatch.setenv(name, value)


def test_ranks_go_on_with_their_own_seeds_of_what_one_process_left(tmp_path, trained, monkeypatch, capsys):
    be_rank(monkeypatch, "0")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # then it is not torchrun's
    assert run_digits(tmp_path / "undisturbed", *BRIEF, "--seeds", "4") == 0
    stop_before(2, tmp_path, trained, *BRIEF, "--seeds", "4")
    capsys.readouterr()
    for rank in ("1", "0"):
        assert not (tmp_path / CSV).exists()
        be_rank(monkeypatch, rank)
        assert run_digits(tmp_path, *BRIEF, "--seeds", "4") == 0
        assert ("the one that ends last reports" in capsys.readouterr().out) == (rank == "1")
    assert trained == [3, 2]
    assert (tmp_path / CSV).read_bytes() == (tmp_path / "undisturbed" / CSV).read_bytes()


def test_costs_and_kept_networks_are_of_the_first_seed(tmp_path, trained):
    flags = (*BRIEF, "--keep", "unit:50")
    stop_before(2, tmp_path, trained, *flags, "--seeds", "3")
    assert run_digits(tmp_path, *flags, "--seed", "1", "--seeds", "2") == 0  # 1 is done, but all files are of seed 0
    assert seeds(tmp_path) == ["1", "2"] and trained == [1, 2]
    trained.clear()
    stop_before(3, tmp_path, trained, *flags, "--seeds", "4")
    assert run_digits(tmp_path, *flags, "--seeds", "4") == 0
    assert trained == [3]
    _, kept = compress.load_compressed(tmp_path / "models/digits_unit_50.bin")
    assert kept["accuracy_percent"] == pytest.approx(float(read_rows(tmp_path)[3]["accuracy_percent"]), abs=1e-3)


def test_a_seed_is_done_again_if_its_networks_are_gone(tmp_path, trained):
    flags = (*BRIEF, "--keep", "unit:50", "--seeds", "2")
    for name in ("digits_model.bin", "digits_unit_50.bin"):
        stop_before(1, tmp_path, trained, *flags)
        (tmp_path / "models" / name).unlink()
        assert run_digits(tmp_path, *flags) == 0
        assert trained == [0, 1] and (tmp_path / "models" / name).exists()
        trained.clear()
    stop_before(1, tmp_path, trained, *flags)
    assert run_digits(tmp_path, *flags, "--keep", "weight:50") == 0  # which was not kept before
    assert trained == [0, 1] and (tmp_path / "models/digits_weight_50.bin").exists()


def test_costs_of_a_seed_that_is_done_are_those_of_the_saved_network(tmp_path, trained):
    flags = ("--epochs", "1", "--k", "90", "--seeds", "2")
    assert run_digits(tmp_path / "whole", *flags, "--costs") == 0
    stop_before(1, tmp_path / "stopped", trained, *flags)
    assert run_digits(tmp_path / "stopped", *flags, "--costs") == 0
    assert trained == [1]
    sizes = [[row["stored_bytes"] for row in read_rows(tmp_path / name, "digits_cost_sparsity.csv")]
             for name in ("whole", "stopped")]  # fmt: skip
    assert sizes[0] == sizes[1]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc/self/fd")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("models/digits_model.bin", "No space left on device: .*digits_model.bin"),
        ("models/digits_model.json", "No space left on device: .*digits_model.json"),
        ("models/digits_unit_50.bin", "No space left on device: .*digits_unit_50.bin"),
        ("plots/digits_accuracy_sparsity_seed_0.unfinished", None),  # goes on: it has the rows in memory
        (CSV, "No space left on device: .*; the rows are in "),
    ],
)
def test_a_disk_that_is_full_leaves_the_file_of_before(name, told, tmp_path, trained, monkeypatch, capsys):
    flags, path, real = (*BRIEF, "--keep", "unit:50"), tmp_path / name, os.fsync
    stop_before(1, tmp_path, trained, *flags, "--seeds", "2")
    assert run_digits(tmp_path, *flags, "--seed", "3") == 0
    before = path.read_bytes()

    def full(number):
        written = str(Path(f"/proc/self/fd/{number}").readlink())
        if written.startswith(f"{path.parent}/.{path.name[:28]}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(number)

    monkeypatch.setattr(os, "fsync", full)
    if told:
        with pytest.raises(OSError, match=told):
            run_digits(tmp_path, *flags, "--learning-rate", "0.01")
        assert path.read_bytes() == before
    else:
        assert run_digits(tmp_path, *flags, "--learning-rate", "0.01") == 0
        assert "would do this seed again" in capsys.readouterr().err


class Unsaveable:
    def savefig(self, *_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")


def test_a_plot_that_fails_costs_nothing_but_itself(tmp_path, trained, monkeypatch, capsys):
    flags = (*BRIEF, "--seeds", "2")
    for plot in (lambda *_: 1 / 0, lambda *_: Unsaveable()):
        with monkeypatch.context() as patch:
            patch.setattr(utils, "plot_accuracy_sparsity", plot)
            assert run_digits(tmp_path, *flags) == 1
        assert re.search(r"cannot draw accuracy_sparsity: division by zero\n$", capsys.readouterr().err)
    assert {CSV, "plots/digits_accuracy_weights.png"} <= files(tmp_path)
    assert len(read_rows(tmp_path)) == 8
    assert run_digits(tmp_path, *flags) == 0  # once it is mended, nothing is trained again
    assert trained == [0, 1]
    assert {"plots/digits_accuracy_sparsity.png"} <= files(tmp_path)
    assert not [name for name in files(tmp_path) if "unfinished" in name]


@small
def test_rows_of_a_model_file_are_not_taken_for_those_of_its_successor(tmp_path, monkeypatch):
    path, rows = tmp_path / "model.bin", []
    monkeypatch.setattr(utils, "plot_accuracy_sparsity", lambda *_: 1 / 0)  # so that they are kept
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(SmallNetwork().state_dict(), path)
        assert run_digits(tmp_path, "--k", "50", "--model", str(path)) == 1
        rows.append(read_rows(tmp_path))
    assert rows[0] != rows[1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-10], "empty": lambda data: b"", "not text": lambda data: b"\xff" + data,
    "another number": lambda data: data.replace(b"1", b"2", 1), "nested": lambda data: b"[" * 10**6,
    "another method": lambda data: data.replace(b"unit", b"weight"), "not finite": lambda data: data[:-3] + b"NaN]]",
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_rows_of_a_finished_seed_are_not_used(kind, tmp_path, trained, capsys):
    flags = (*BRIEF, "--seeds", "2")
    (path,) = stop_before(1, tmp_path, trained, *flags)
    damaged = DAMAGE[kind](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert run_digits(tmp_path, *flags) == 0
    assert re.fullmatch(r".*digits_accuracy_sparsity_seed_0.unfinished is damaged, .*\n", capsys.readouterr().err)
    assert trained == [0, 1]


OUTPUTS = [
    *("models/digits_model.bin", "models/digits_model.json", "models/digits_unit_50.bin", CSV),
    *("plots/digits_accuracy_weights.png", "plots/digits_cost_sparsity.csv"),
    "plots/digits_accuracy_sparsity_seed_1.unfinished",
]


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_is_in_the_way_of_results_is_told_before_training(name, tmp_path, trained):
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(OSError, match=rf"{name} is in the way"):
            run_digits(tmp_path, *BRIEF, "--seeds", "2", "--costs", "--keep", "unit:50")
        assert not path.is_file()
        path.rmdir() if path.is_dir() else path.unlink()
    assert trained == []


def test_other_peoples_files_in_the_output_folders_are_left_alone(tmp_path, trained):
    theirs = [tmp_path / "models/.digits_model.bin.1234.tmp", tmp_path / "plots/.x.tmp", tmp_path / "plots/notes.tmp"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("theirs")
        os.utime(path, (0, 0))
    (tmp_path / "plots/digits_accuracy_old").mkdir()
    (tmp_path / "plots/digits_accuracy_weights.png").symlink_to(tmp_path / "elsewhere.png")
    assert run_digits(tmp_path, *BRIEF) == 0
    assert {path.read_text() for path in theirs} == {"theirs"}
    assert (tmp_path / "plots/digits_accuracy_weights.png").is_symlink() and (tmp_path / "elsewhere.png").is_file()


def after_training(monkeypatch, act, seed=1) -> None:
    original = train.train

    def training(model, dataset, config, number):
        original(model, dataset, config, number)
        if number == seed:
            act()

    monkeypatch.setattr(train, "train", training)


@pytest.mark.parametrize("gone", ["models/digits_model.bin", "plots"])
def test_what_is_moved_away_during_the_run_takes_no_rows_with_it(gone, tmp_path, trained, monkeypatch):
    after_training(monkeypatch, lambda: (tmp_path / gone).rename(tmp_path / "away"))
    assert run_digits(tmp_path, *BRIEF, "--seeds", "3") == 0
    assert seeds(tmp_path) == ["0", "1", "2"]


@pytest.mark.parametrize("change", ["unlink", "touch"])
def test_costs_are_of_no_network_that_took_the_place_of_the_first(change, tmp_path, trained, monkeypatch):
    path = tmp_path / "models/digits_model.bin"
    after_training(monkeypatch, getattr(path, change))
    with pytest.raises(ValueError, match=r"no costs: .*digits_model\.bin"):
        run_digits(tmp_path, *BRIEF, "--seeds", "2", "--costs")
    assert seeds(tmp_path) == ["0", "1"]
    assert not (tmp_path / "plots/digits_cost_sparsity.csv").exists()


def test_rows_whose_folder_takes_no_files_are_written_elsewhere(tmp_path, trained, monkeypatch, capsys):
    def occupy() -> None:
        shutil.rmtree(tmp_path / "plots", ignore_errors=True)
        (tmp_path / "plots").touch()

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    after_training(monkeypatch, occupy)
    with pytest.raises(OSError, match=r"digits_accuracy_sparsity.csv.*; the rows are in ") as caught:
        run_digits(tmp_path, *BRIEF, "--seeds", "3")
    rescued = Path(str(caught.value).rpartition("the rows are in ")[2])
    assert {row.seed for row in read_csv(rescued)} == {0, 1, 2}
    assert capsys.readouterr().err.count("a stopped run would do this seed again") == 2


def test_a_rank_that_cannot_hand_over_its_rows_fails(tmp_path, trained, monkeypatch):
    be_rank(monkeypatch, "1")
    path = tmp_path / "plots/digits_accuracy_sparsity_seed_1.unfinished"
    after_training(monkeypatch, lambda: path.mkdir(parents=True))
    with pytest.raises(OSError, match=path.name):
        run_digits(tmp_path, *BRIEF, "--seeds", "2")


def test_two_ranks_write_what_one_process_writes(tmp_path, capsys, monkeypatch):
    for name in ("plot_accuracy_sparsity", "plot_accuracy_weights"):
        monkeypatch.setattr(utils, name, lambda *_: Figure((1, 1)))
    flags = (*BRIEF, "--precision", "fp32", "--seeds", "2")
    assert run_digits(tmp_path / "one", *flags) == 0
    folders = ["--models", str(tmp_path / "two/models"), "--plots", str(tmp_path / "two/plots")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(ROOT / "src/train.py"), "--dataset", "digits", *flags, *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for output in (capsys.readouterr().out, done.stdout):
        assert len([line for line in output.splitlines() if re.match("wrote .*(bin|csv|png)$", line)]) == 4
    assert files(tmp_path / "one") == files(tmp_path / "two")
    for name in (CSV, "models/digits_model.bin"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_titles_name_the_flags_that_are_not_as_by_default():
    digits = load("digits", ROOT / "inputs")
    config = parse_config(
        ["--dataset", "digits", "--epochs", "1", "--skip", "fc1", "fc2", "--finetune-epochs", "1", "--batch-size", "64"]
    )
    first, second = train.title(digits, config).splitlines()
    assert first == "digits, 360 test images; 784-1000-1000-500-200-10, 1 epoch, seed 0"
    assert second == "finetune epochs 1, skip fc1 fc2"
    assert "11 epochs" in train.title(digits, parse_config(["--epochs", "11"]))
