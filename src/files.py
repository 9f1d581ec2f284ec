"""What a run writes beside its results, and finds there: networks, what describes them, rows of finished seeds."""

import hashlib
import io
import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import load_compressed, save_compressed
from config import Config, without_effect
from model import SIZES, NeuralNetwork
from system import describe_machine, say, torchrun_rank, warn, write_file
from utils import Row


def output(config: Config, name: str) -> Path:
    """Where a run writes a file: networks and what describes them to one folder, numbers and plots to the other."""
    prefix = f"{config.dataset}_{'holdout_' * config.holdout}"
    if name.endswith((".bin", ".json")):
        return config.models / f"{prefix}{name}"
    return config.plots / (name if prefix == "mnist_" else f"{prefix}{name}")


def result_files(config: Config) -> list[Path]:
    """What in the output folders is named as a run's files are."""
    names = ("model.bin", "model.json", "unit_*.bin", "weight_*.bin", "accuracy_*.*", "cost_*.*")
    patterns = [output(config, name) for name in names]
    return sorted(path for pattern in patterns for path in pattern.parent.glob(pattern.name))


def outdated(config: Config) -> list[Path]:
    """Result files that are older than the network, or the rows, beside which they lie."""
    made, rows = output(config, "model.bin"), output(config, "accuracy_sparsity.csv")
    finished = [path for path in result_files(config) if path.suffix != ".unfinished"]
    pairs = [(path, made if path.suffix in (".bin", ".json") else rows) for path in finished]
    return [path for path, new in pairs if new.exists() and path.stat().st_mtime < new.stat().st_mtime]


def kept_path(config: Config, method: str, k: float) -> Path:
    """Where a pruned network is kept."""
    return output(config, f"{method}_{k:.15g}.bin")


def describe(config: Config) -> dict[str, Any]:
    """The settings and versions that the numbers of a seed depend on, as JSON holds them."""
    others = {*without_effect(config), "inputs", "models", "plots", "format", "costs"}
    settings = {name: value for name, value in asdict(config).items() if name not in others}
    versions = describe_machine(torch.device(config.device))
    return json.loads(json.dumps({"settings": settings, "versions": versions}, default=str))


def save_model(model: nn.Module, config: Config, accuracy: dict[str, float]) -> None:
    """Write the weights, then a JSON that says how they came about and names the MD5 of the file it describes."""
    buffer, path = io.BytesIO(), output(config, "model.bin")
    torch.save({name: weight.cpu() for name, weight in model.state_dict().items()}, buffer)
    write_file(path, buffer.getvalue())
    digest = hashlib.md5(buffer.getvalue(), usedforsecurity=False).hexdigest()
    facts = {"md5": digest, "seed": config.seed, "accuracy": accuracy, **describe(config)}
    write_file(path.with_suffix(".json"), f"{json.dumps(facts, indent=2)}\n".encode())
    say(f"wrote {path}")


def save_pruned(network: nn.Module, config: Config, row: Row) -> None:
    """Write a pruned network in few bytes, with its row and how it came about."""
    content, path = io.BytesIO(), kept_path(config, row.method, row.k_percent)
    save_compressed(network, content, asdict(row) | describe(config))
    write_file(path, content.getvalue())
    say(f"wrote {path}")


def load_model(path: Path) -> NeuralNetwork:
    """The network from 784 values to 10 that a model file holds, in fp32.

    Raises: ValueError, OSError: it holds none. Warns: UserWarning: the JSON beside it names another checksum.
    """
    state, _ = load_compressed(path)
    about, digest = path.with_suffix(".json"), hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if about.is_file() and digest not in about.read_text(errors="replace"):
        warnings.warn(f"{about} does not describe {path}: one of them was damaged, or is of another run", stacklevel=2)
    try:
        model = NeuralNetwork.from_state_dict(state).float()
        NeuralNetwork.from_state_dict(model.state_dict())  # finite in fp32, too
        if (model.sizes[0], model.sizes[-1]) != (SIZES[0], SIZES[-1]):
            raise ValueError(f"a network from {model.sizes[0]} to {model.sizes[-1]} values, not 784 to 10")
        return model
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


# ── rows of a finished seed, until all are: a stopped run goes on after them, and ranks share them ──


def progress_path(config: Config, seed: int) -> Path:
    """Where they are kept."""
    return output(config, f"accuracy_sparsity_seed_{seed}.unfinished")


def write_progress(config: Config, seed: int, rows: list[Row]) -> None:
    """Keep the rows of a seed; where that fails, a run of one process goes on, for it has them in memory."""
    text = json.dumps([astuple(row) for row in rows])
    try:
        write_file(progress_path(config, seed), f"{_checksum(config, seed, text)}\n{text}".encode())
    except OSError as error:
        if torchrun_rank() != (0, 1):
            raise
        warn(f"{error}: a stopped run would do this seed again")


def read_progress(config: Config, seeds: Iterable[int]) -> dict[int, list[Row]]:
    """Seed → its rows, where there are any; not where they are damaged, or another run's."""
    found = {}
    for seed in seeds:
        if not (path := progress_path(config, seed)).is_file():
            continue
        checksum, _, text = path.read_text(encoding="utf-8", errors="replace").partition("\n")
        if checksum == _checksum(config, seed, text):
            found[seed] = [Row(*values) for values in json.loads(text)]
        else:
            warn(f"{path} is damaged, or of another run: it is not used")
    return found


def _checksum(config: Config, seed: int, text: str) -> str:
    """Of rows and all that they depend on; with those of the first seed go its networks, as they are on disk."""
    networks = [config.model or output(config, "model.bin"), *(kept_path(config, *kept) for kept in config.keep)]
    written = [path.stat().st_mtime_ns for path in networks if seed == config.seed and path.exists()]
    return hashlib.sha256(json.dumps([config.seed, written, describe(config), text]).encode()).hexdigest()
