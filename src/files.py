"""What a run leaves on disk, and finds there: names, networks with what describes them, rows of finished seeds."""

import hashlib
import io
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import utils
from compress import load_compressed, save_compressed
from config import Config, without_effect
from model import NeuralNetwork
from system import describe_machine, say, write_file
from utils import Row


def output(config: Config, name: str) -> Path:
    """Where a run writes a file: networks and what describes them to one folder, numbers and plots to the other."""
    prefix = f"{config.dataset}_{'holdout_' * config.holdout}"
    if name.endswith((".bin", ".json")):
        return config.models / f"{prefix}{name}"
    return config.plots / (name if prefix == "mnist_" else f"{prefix}{name}")


def result_files(config: Config) -> list[Path]:
    """What in the output folders is named as a run's files are."""
    names = ("model.bin", "model.json", "unit_*.bin", "weight_*.bin", "accuracy_*.csv", "accuracy_*.[ps]*", "cost_*.*")
    patterns = [output(config, name) for name in names]
    return sorted(path for pattern in patterns for path in pattern.parent.glob(pattern.name))


def describe(config: Config) -> dict[str, Any]:
    """The settings and versions that the numbers depend on beside the seed, as JSON holds them."""
    others = {*without_effect(config), "inputs", "models", "plots", "format", "costs", "keep"}
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
    """Write a pruned network in few bytes, with what it is and how it came about."""
    buffer, path = io.BytesIO(), output(config, f"{row.method}_{row.k_percent:.15g}.bin")
    accuracy = row.accuracy_percent if row.finetuned_percent is None else row.finetuned_percent
    info = {name: getattr(row, name) for name in ("seed", "method", "k_percent", "weights_kept")}
    save_compressed(network, buffer, {**info, "accuracy_percent": accuracy, **describe(config)})
    write_file(path, buffer.getvalue())
    say(f"wrote {path}")


def load_model(path: Path, device: torch.device) -> nn.Module:
    """The network in a model file: a state_dict as a run or torch.save wrote it, or a kept one."""
    state, _ = load_compressed(path)
    about = path.with_suffix(".json")
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    if about.is_file() and digest not in about.read_text(errors="replace"):
        warnings.warn(f"{about} does not describe {path}: one of them was damaged, or is of another run", stacklevel=2)
    try:
        model = NeuralNetwork.from_state_dict(state).float()
        NeuralNetwork.from_state_dict(model.state_dict())  # finite in float32, too
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (model.sizes[0], model.sizes[-1]) != (784, 10):
        raise ValueError(f"{path} holds a network from {model.sizes[0]} to {model.sizes[-1]} values, not 784 to 10")
    return model.to(device)


def write_rows(path: Path, rows: Sequence[Any]) -> None:
    """Write a CSV; where its folder takes no file, write it elsewhere and say where in the error."""
    try:
        utils.write_csv(path, rows)
    except OSError as error:
        try:
            rescued = Path(tempfile.mkdtemp()) / path.name
            utils.write_csv(rescued, rows)
        except OSError:
            raise error from None
        raise OSError(f"{error}; the rows are in {rescued}") from error
    say(f"wrote {path}")


# ── rows of finished seeds: a stopped run of several goes on after them, and ranks share them ──


def progress_path(config: Config, seed: int) -> Path:
    """The rows of one seed; the name tells settings and versions, so that no other rows are taken for them."""
    digest = hashlib.sha256(json.dumps([config.seed, describe(config)]).encode()).hexdigest()[:20]
    return output(config, f"accuracy_sparsity_seed_{seed}.{digest}.unfinished")


def read_progress(config: Config, seed: int) -> list[Row]:
    """The rows of a seed that is done; none if there are none, or if its network is needed and is not there."""
    path, made = progress_path(config, seed), output(config, "model.bin")
    if config.seeds == 1 or not path.exists():
        return []
    gone = not made.exists() or made.stat().st_mtime > path.stat().st_mtime
    if seed == config.seed and (gone or config.keep or config.costs):
        return []
    try:
        rows = utils.read_csv(path)
        points = [(seed, method, k) for method in config.methods for k in config.k]
        if [(row.seed, row.method, row.k_percent) for row in rows] != points:
            raise ValueError(f"{path} lacks rows")
    except ValueError as error:
        warnings.warn(f"{error}; its seed is not done", stacklevel=2)
        return []
    say(f"read {path}")
    return rows


def wait_for_ranks(config: Config, seeds: Sequence[int]) -> list[Row]:
    """The rows of the seeds that other ranks train."""
    rows = list[Row]()
    for seed in seeds:
        say(f"waiting for another rank to write {progress_path(config, seed)}")
        while not (done := read_progress(config, seed)):
            time.sleep(1)
        rows += done
    return rows
