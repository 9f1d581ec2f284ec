"""Every setting of a run: its default, its meaning and unit, and the command-line flag that changes it."""

import argparse
import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # the folders are found from any working directory
K_PERCENT = (0.0, 25.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 92.5, 95.0, 97.5, 99.0)
METHODS = ("weight", "unit", "random_weight", "random_unit")  # the last two are baselines
BATCH_SIZE = {"mnist": 512, "digits": 64}  # images a training step, by default


def _parse(convert: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str, text: str) -> Any:
    with contextlib.suppress(ValueError):
        if accepts(value := convert(text)):
            return value
    raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")


_from_0 = partial(_parse, int, lambda value: 0 <= value <= 10**9, f"a whole number from 0 to {10**9}")
_from_1 = partial(_parse, int, lambda value: 1 <= value <= 10**9, f"a whole number from 1 to {10**9}")
_percent = partial(_parse, float, lambda value: 0 <= value <= 100, "a number from 0 to 100 (in %)")
_fraction = partial(_parse, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_positive = partial(_parse, float, lambda value: 0 < value < math.inf, "a number > 0, and finite")
_not_negative = partial(_parse, float, lambda value: 0 <= value < math.inf, "a number >= 0, and finite")
_path = partial(_parse, Path, lambda path: path.parts, "a path")  # an unset shell variable would be the working folder


def _keep(text: str) -> tuple[str, float]:
    method, _, k = text.partition(":")
    if method not in ("weight", "unit") or not k:
        raise argparse.ArgumentTypeError(f"must be weight:K or unit:K, for example weight:90, got {text!r}")
    return method, _percent(k)


def _flag(group: str, default: Any, help: str, **keywords: Any) -> Any:
    """A field that carries its flag, as argparse takes it: a switch for a bool, several values for a tuple."""
    if isinstance(default, bool):
        keywords["action"] = "store_true"
    elif isinstance(default, tuple):
        keywords |= {"nargs": "+", "action": "extend"}
    elif default is not None:
        help = f"{help} (default: {str(default).replace('%', '%%')})"
    return field(default=default, metadata={"group": group, "flag": {"help": help, **keywords}})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is also a flag: `batch_size` is `--batch-size`."""

    dataset: str = _flag("data", "auto", "auto: MNIST, or else the bundled digits", choices=("auto", "mnist", "digits"))
    holdout: bool = _flag("data", False, "report on the last sixth of the training images, not used then")
    inputs: Path = _flag("data", ROOT / "inputs", "folder of the data sets", type=_path)

    epochs: int = _flag("run", 10, "passes over the training images", type=_from_1)
    seed: int = _flag("run", 0, "seed of the weights and of the order of the images", type=_from_0)
    seeds: int = _flag("run", 1, "networks to train and sweep: with seeds SEED, SEED + 1, ...", type=_from_1)
    model: Path | None = _flag("run", None, "take this model file instead of training", type=_path)
    k: tuple[float, ...] = _flag("run", K_PERCENT, "shares in %% to prune, with 0 (default: 13 of them)", type=_percent)
    methods: tuple[str, ...] = _flag("run", METHODS[:2], "what to prune, how (default: weight unit)", choices=METHODS)
    device: str = _flag("run", "auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = _flag("run", "auto", "in training; auto: bf16 where native", choices=("auto", "bf16", "fp32"))

    learning_rate: float = _flag("training", 5e-3, "peak of the one-cycle schedule", type=_positive)
    weight_decay: float = _flag("training", 2e-4, "L2 penalty, as Adam adds it to the gradient", type=_not_negative)
    batch_size: int | None = _flag("training", None, "images a step (default: MNIST 512, digits 64)", type=_from_1)
    label_smoothing: float = _flag("training", 0.1, "share of a target spread over all classes", type=_fraction)
    unit_lasso: float = _flag("training", 0.0, "pull of a group lasso on the norms of hidden units", type=_not_negative)
    every_k: bool = _flag("training", False, "half of the steps go through the network, pruned to a random k")

    finetune_epochs: int = _flag("pruning", 0, "epochs to retrain each pruned network", type=_from_0)
    finetune_learning_rate: float = _flag("pruning", 3e-3, "its peak, times the share pruned", type=_positive)
    scope: str = _flag("pruning", "layer", "rank within each layer, or across all", choices=("layer", "global"))
    skip: tuple[str, ...] = _flag("pruning", (), "layers to spare as well, by name or pattern", metavar="NAME")
    prune_output: bool = _flag("pruning", False, "do not spare the output layer")

    costs: bool = _flag("results", False, "also measure file size and latency at every k")
    keep: tuple[tuple[str, float], ...] = _flag("results", (), "save these, as unit:60", type=_keep, metavar="WHAT:K")
    format: str | None = _flag("results", None, "draw the plots in this format as well", choices=("pdf", "svg"))
    models: Path = _flag("results", ROOT / "models", "folder for the trained networks", type=_path)
    plots: Path = _flag("results", ROOT / "plots", "folder for the plots and their numbers", type=_path)


def without_effect(config: Config) -> list[str]:
    """Settings that are not compared: the range of seeds, and with `--model` those of training."""
    if config.model is None:
        return ["seed", "seeds"]
    shared = [] if config.finetune_epochs else ["batch_size", "weight_decay", "label_smoothing", "precision"]
    return ["seed", "seeds", "epochs", "learning_rate", "unit_lasso", "every_k", *shared]


def changed(config: Config) -> list[str]:
    """The settings of training and pruning that have an effect and are not the defaults, in words."""
    defaults, words = replace(Config(), batch_size=BATCH_SIZE.get(config.dataset)), []
    for name in (setting.name for setting in fields(Config) if setting.metadata["group"] in ("training", "pruning")):
        value = getattr(config, name)
        if value not in (None, getattr(defaults, name)) and name not in without_effect(config):
            value = " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
            words.append(f"{name.replace('_', ' ')} {value}".removesuffix(" True"))
    return words


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read the command line; k comes sorted, with 0. SystemExit: 2 after a line on a bad setting, 0 after `--help`."""
    purpose = "Train a network, prune copies of it at every k %, and plot accuracy against sparsity."
    # Flags that are not given stay absent: the dataclass alone holds the defaults. An error has no usage above it.
    options: dict[str, Any] = {"usage": argparse.SUPPRESS, "argument_default": argparse.SUPPRESS}
    parser = argparse.ArgumentParser("train.py", description=purpose, allow_abbrev=False, **options)
    groups = {name: parser.add_argument_group(name) for name in ("data", "run", "training", "pruning", "results")}
    for setting in fields(Config):
        flag = f"--{setting.name.replace('_', '-')}"
        groups[setting.metadata["group"]].add_argument(flag, **setting.metadata["flag"])
    given = vars(parser.parse_args(argv))
    given = {name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value for name, value in given.items()}
    # The dense network is always measured: it is what the others are compared with.
    ks = {0.0, *given.get("k", K_PERCENT), *(k for _, k in given.get("keep", ()))}
    config = Config(**{**given, "k": tuple(sorted(ks))})
    for name in without_effect(config)[1:]:
        if config.model is not None and name in given:
            parser.error(f"--{name.replace('_', '-')} has no effect with --model, which takes the place of training")
    if missing := {method for method, _ in config.keep} - {*config.methods}:
        parser.error(f"--keep {missing.pop()}:K takes one of --methods {' '.join(config.methods)}")
    if config.costs and not {"weight", "unit"} & {*config.methods}:
        parser.error("--costs takes weight or unit among --methods: random ones would cost the same")
    return config
