import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import compress
import train
from config import K_PERCENT
from data import Batches, load
from engine import Engine
from model import NeuralNetwork

COLUMNS = "seed,method,scope,k_percent,achieved_percent,weights_kept,accuracy_percent,finetuned_percent"
QUICK = ("--epochs", "2", "--k", "50", "90")


class Stopped(Exception):
    """Stands for whatever ends a process between two seeds."""


def run_digits(folder: Path, *flags: str) -> int:
    return train.main(
        ["--dataset", "digits", "--models", str(folder / "models"), "--plots", str(folder / "plots"), *flags]
    )


def read_rows(folder: Path, name: str = "digits_accuracy_sparsity.csv") -> list[dict[str, str]]:
    with (folder / "plots" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ── the whole job ──


def test_the_whole_job_on_digits(tmp_path, capsys):
    assert run_digits(tmp_path) == 0
    out = capsys.readouterr().out
    assert "NeuralNetwork(\n  (fc1): Linear(in_features=784, out_features=1000, bias=False)\n" in out
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

    model = NeuralNetwork.from_state_dict(torch.load(tmp_path / "models/digits_model.bin", weights_only=True))
    digits = load("digits", ROOT / "inputs")
    accuracy = Engine(model).evaluate(Batches(digits.test_images, digits.test_labels, 100))
    about = json.loads((tmp_path / "models/digits_model.json").read_text())
    assert about["accuracy"]["testing_percent"] == pytest.approx(100 * accuracy)
    assert (
        about["settings"]["epochs"] == 10
        and about["settings"]["batch_size"] == 64
        and about["versions"]["torch"] == torch.__version__
    )


@pytest.mark.mnist
def test_the_whole_job_on_mnist(tmp_path):
    assert train.main(["--dataset", "mnist", "--models", str(tmp_path), "--plots", str(tmp_path / "plots")]) == 0
    rows = {(row["method"], float(row["k_percent"])): row for row in read_rows(tmp_path, "accuracy_sparsity.csv")}
    accuracy = {point: float(row["accuracy_percent"]) for point, row in rows.items()}
    assert accuracy["weight", 0] == accuracy["unit", 0] > 98.3
    assert accuracy["weight", 80] > accuracy["weight", 0] - 0.5
    assert accuracy["unit", 50] > accuracy["weight", 0] - 0.5
    assert accuracy["unit", 99] < 50
    assert int(rows["unit", 50]["weights_kept"]) == 784 * 500 + 500 * 500 + 500 * 250 + 250 * 100 + 100 * 10
    assert (tmp_path / "plots" / "accuracy_sparsity.png").exists() and (tmp_path / "mnist_model.bin").exists()


def test_the_same_seed_gives_the_same_files_and_another_does_not(tmp_path):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert run_digits(tmp_path / name, *QUICK, "--seed", seed) == 0
    for file in ("plots/digits_accuracy_sparsity.csv", "models/digits_model.bin"):
        first, same, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == same != other


def test_scores_of_shrunk_and_sparse_copies_are_those_of_the_masked_network(tmp_path):
    import prune

    assert run_digits(tmp_path, "--epochs", "2", "--k", "25", "60", "80", "95") == 0
    model = NeuralNetwork.from_state_dict(torch.load(tmp_path / "models/digits_model.bin", weights_only=True))
    digits = load("digits", ROOT / "inputs")
    for row in read_rows(tmp_path):
        pruned = prune.prune_model(model, row["method"], float(row["k_percent"]) / 100)
        accuracy = 100 * Engine(pruned).evaluate(Batches(digits.test_images, digits.test_labels, 90))
        assert float(row["accuracy_percent"]) == pytest.approx(accuracy, abs=1e-3)


def test_fractions_in_place_of_percent_are_asked_about(tmp_path, capsys):
    assert run_digits(tmp_path, "--epochs", "1", "--k", "0.5", "0.9") == 0
    assert "did you mean 0 50 90?" in capsys.readouterr().out
    assert run_digits(tmp_path, "--epochs", "1", "--k", "50", "0.9") == 0
    assert "did you mean" not in capsys.readouterr().out


def test_held_out_results_have_names_of_their_own(tmp_path, capsys):
    assert run_digits(tmp_path, *QUICK, "--holdout") == 0
    assert "Held-out Set Accuracy" in capsys.readouterr().out
    assert all("digits_holdout_" in name for name in files(tmp_path))
    assert "held-out_percent" in json.loads((tmp_path / "models/digits_holdout_model.json").read_text())["accuracy"]


@pytest.mark.filterwarnings("ignore:pruning leaves nothing")  # of a layer that globally counts for little
def test_every_way_to_prune(tmp_path, capsys):
    flags = [
        "--methods",
        "weight",
        "unit",
        "random_weight",
        "random_unit",
        "--scope",
        "global",
        "--finetune-epochs",
        "1",
    ]
    flags += ["--unit-lasso", ".1"]
    assert run_digits(tmp_path, "--epochs", "2", "--k", "50", "70", *flags, "--keep", "unit:70") == 0
    rows = read_rows(tmp_path)
    assert [row["method"] for row in rows[::3]] == ["weight", "unit", "random_weight", "random_unit"]
    accuracy = {(row["method"], row["k_percent"]): float(row["accuracy_percent"]) for row in rows}
    finetuned = {(row["method"], row["k_percent"]): float(row["finetuned_percent"]) for row in rows}
    assert accuracy["random_weight", "70"] < accuracy["weight", "70"]
    assert finetuned["weight", "70"] > accuracy["weight", "70"]
    assert finetuned["unit", "70"] > accuracy["unit", "70"]
    for row in rows:
        assert row["scope"] == "global"
    _, kept = compress.load_compressed(tmp_path / "models/digits_unit_70.bin")
    assert kept["accuracy_percent"] == pytest.approx(finetuned["unit", "70"], abs=1e-3)
    assert "units, fine-tuned: " in capsys.readouterr().out


def test_costs_and_kept_networks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "COST_ROUNDS", 1)
    assert run_digits(tmp_path, *QUICK, "--costs", "--keep", "weight:90", "--keep", "unit:60") == 0
    costs = read_rows(tmp_path, "digits_cost_sparsity.csv")
    assert {(row["method"], row["form"]) for row in costs} == {
        ("weight", "dense"),
        ("weight", "sparse"),
        ("unit", "shrunk"),
    }
    assert {row["batch_size"] for row in costs} == {"1", "256"}
    assert all(float(row["latency_ms"]) > 0 for row in costs)
    size = {(row["method"], row["k_percent"]): int(row["stored_bytes"]) for row in costs}
    assert size["unit", "90"] < 0.041 * size["unit", "0"] and size["weight", "90"] < 0.14 * size["weight", "0"]
    assert (tmp_path / "plots/digits_cost_sparsity.png").exists()
    assert "sparse kernels" in capsys.readouterr().out

    model, info = compress.load_compressed(tmp_path / "models/digits_unit_60.bin")
    digits = load("digits", ROOT / "inputs")
    assert model.sizes == (784, 400, 400, 200, 80, 10)
    accuracy = Engine(model).evaluate(Batches(digits.test_images, digits.test_labels, 360))
    assert info["accuracy_percent"] == pytest.approx(100 * accuracy)
    assert (info["method"], info["k_percent"]) == ("unit", 60)
    assert (tmp_path / "models/digits_weight_90.bin").stat().st_size < 0.14 * info["dense_bytes"]


def test_an_existing_model_takes_the_place_of_training(tmp_path, capsys):
    assert run_digits(tmp_path, *QUICK) == 0
    rows, before = read_rows(tmp_path), files(tmp_path)
    path = tmp_path / "models/digits_model.bin"
    model, written = path.read_bytes(), path.stat().st_mtime_ns
    capsys.readouterr()
    assert run_digits(tmp_path, "--k", "50", "90", "--model", str(path)) == 0
    out = capsys.readouterr().out
    assert "Epoch" not in out and "(fc5)" in out
    assert read_rows(tmp_path) == rows and files(tmp_path) == before
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (model, written)
    state = torch.load(path, weights_only=True)
    torch.save({name: weight.double() for name, weight in state.items()}, tmp_path / "double.bin")
    assert run_digits(tmp_path, "--k", "50", "90", "--model", str(tmp_path / "double.bin")) == 0
    assert read_rows(tmp_path) == rows


# ── several seeds ──


@pytest.fixture
def trained(monkeypatch):
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


def stop_after_the_first_seed(folder: Path, trained: list[object], *flags: str) -> Path:
    """The file that such a run leaves behind."""
    trained.append("stop at 1")
    with pytest.raises(Stopped):
        run_digits(folder, *flags)
    trained.clear()
    return folder / "plots" / "digits_accuracy_sparsity.unfinished"


def test_a_run_that_is_stopped_goes_on_after_the_last_whole_seed(tmp_path, trained, capsys):
    flags = (*QUICK, "--seeds", "2")
    assert run_digits(tmp_path / "undisturbed", *flags) == 0
    assert stop_after_the_first_seed(tmp_path / "stopped", trained, *flags).is_file()
    (tmp_path / "stopped/models/digits_model.bin").write_bytes(b"another")  # the rows stand whatever becomes of it
    assert run_digits(tmp_path / "stopped", *flags) == 0
    assert trained == [1]
    assert "a stopped run with these settings has done 1 seed" in capsys.readouterr().out
    assert files(tmp_path / "stopped") == files(tmp_path / "undisturbed")
    name = "plots/digits_accuracy_sparsity.csv"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()

    assert run_digits(tmp_path / "stopped", *flags) == 0  # a run that was whole is repeated from the start
    assert trained == [1, 0, 1]


def test_a_stopped_run_goes_on_with_more_seeds_but_not_with_other_settings(tmp_path, trained, capsys):
    flags = ("--epochs", "1", "--k", "50")
    stop_after_the_first_seed(tmp_path / "a", trained, *flags, "--seeds", "2")
    assert run_digits(tmp_path / "a", *flags, "--seeds", "3") == 0
    assert trained == [1, 2]
    stop_after_the_first_seed(tmp_path / "b", trained, *flags, "--seeds", "2")
    assert run_digits(tmp_path / "b", *flags, "--seeds", "2", "--learning-rate", "1e-3") == 0
    assert trained == [0, 1]
    assert "of a run with other settings: starting with the first seed" in capsys.readouterr().out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_row(path: Path) -> None:
    path.write_text(path.read_text().replace('"weight"', '"unit"', 1))


def make_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = [cut, change_a_row, lambda path: path.write_text("[" * 10**6), lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGE, ids=["cut short", "a row changed", "deeply nested", "empty"])
def test_a_damaged_progress_file_starts_anew(damage, tmp_path, trained, capsys):
    flags = ("--epochs", "1", "--k", "50", "--seeds", "2")
    damage(stop_after_the_first_seed(tmp_path, trained, *flags))
    assert run_digits(tmp_path, *flags) == 0
    assert trained == [0, 1]
    assert "is damaged or of a run with other settings" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [make_a_folder, make_a_pipe])
def test_what_is_in_the_way_of_results_is_told_before_training(damage, tmp_path, trained):
    flags = ("--epochs", "1", "--k", "50", "--seeds", "2")
    damage(stop_after_the_first_seed(tmp_path, trained, *flags))
    with pytest.raises(OSError, match=r"unfinished is in the way"):
        run_digits(tmp_path, *flags)
    assert trained == []


def test_two_ranks_write_what_one_process_writes(tmp_path):
    flags = [*QUICK, "--dataset", "digits", "--seeds", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, start in (("one", [sys.executable]), ("two", launch)):
        folders = ["--models", str(tmp_path / name / "models"), "--plots", str(tmp_path / name / "plots")]
        done = subprocess.run(
            [*start, str(ROOT / "src/train.py"), *flags, *folders], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "one") == files(tmp_path / "two")
    name = "plots/digits_accuracy_sparsity.csv"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# ── the README ──


def test_the_readme_names_the_commands_and_its_snippets_run(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\npip install -r requirements.txt && python src/train.py\n" in text
    assert "\npip install -r requirements-dev.txt && python -m pytest -n 2\n" in text
    snippets = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "mnist_unit_60" not in code]
    assert len(snippets) == 2
    for code in snippets:
        done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout
