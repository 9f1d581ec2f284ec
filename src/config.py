"""Every setting of a run: its default, its meaning and unit, and the command-line flag that changes it."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent  # the folders are found from any working directory
GROUPS = {"dataset": "data", "epochs": "training", "k": "pruning", "costs": "results"}  # by their first setting
K_PERCENT = (0.0, 25.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 92.5, 95.0, 97.5, 99.0)


def _number(convert: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            if accepts(value := convert(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")

    return parse


def _whole(minimum: int) -> Callable[[str], int]:
    return _number(int, lambda value: minimum <= value <= 10**9, f"a whole number from {minimum} to {10**9}")


_percent = _number(float, lambda value: 0 <= value <= 100, "a number from 0 to 100 (in %)")
_fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
_positive = _number(float, lambda value: 0 < value < math.inf, "a number > 0, and finite")
_not_negative = _number(float, lambda value: 0 <= value < math.inf, "a number >= 0, and finite")


def _path(text: str) -> Path:
    if not text:  # as from a shell variable that is not set; Path would take it for the working directory
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def _kept(text: str) -> tuple[str, float]:
    method, _, k = text.partition(":")
    if method not in ("weight", "unit") or not k:
        raise argparse.ArgumentTypeError(f"must be weight:K or unit:K, for example weight:90, got {text!r}")
    return method, _percent(k)


def _setting(default: Any, help: str, **flag: Any) -> Any:
    """A dataclass field that carries the arguments of its command-line flag."""
    return field(default=default, metadata={"help": help, **flag})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is also a flag: `batch_size` is `--batch-size`."""

    dataset: str = _setting(
        "auto", "auto: MNIST, or the bundled digits where it cannot be had", choices=("auto", "mnist", "digits")
    )
    holdout: bool = _setting(
        False, "train without the last sixth of the training images (MNIST: 10,000), and report on it"
    )
    inputs: Path = _setting(ROOT / "inputs", "folder of the data sets", type=_path)

    epochs: int = _setting(10, "passes over the training images", type=_whole(1))
    batch_size: int | None = _setting(None, "images a step (default: 512 for MNIST, 64 for digits)", type=_whole(1))
    learning_rate: float = _setting(5e-3, "peak of the one-cycle schedule", type=_positive)
    weight_decay: float = _setting(
        2e-4, "L2 penalty, added to the gradient as in Adam's weight_decay", type=_not_negative
    )
    label_smoothing: float = _setting(0.1, "share of every target that is spread over all classes", type=_fraction)
    unit_lasso: float = _setting(
        0.0, "strength of the group lasso on the L2 norm of every hidden unit; 0 is off", type=_not_negative
    )
    seed: int = _setting(0, "seed of the weights and of the order of the images", type=_whole(0))
    seeds: int = _setting(1, "networks to train and sweep, with seeds SEED, SEED+1, ...", type=_whole(1))
    model: Path | None = _setting(None, "take this model file instead of training one", type=_path)
    device: str = _setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = _setting(
        "auto", "of the training passes; auto: bf16 where it is native", choices=("auto", "bf16", "fp32")
    )

    k: tuple[float, ...] = _setting(
        K_PERCENT, "shares to prune, in %%; 0 is always added", type=_percent, nargs="+", action="extend"
    )
    scope: str = _setting("layer", "rank within each layer, or across all", choices=("layer", "global"))
    skip: tuple[str, ...] | None = _setting(
        None, "layers to spare, none if no name follows (default: the output layer)",
        nargs="*", action="extend", metavar="NAME",
    )  # fmt: skip
    random_baseline: bool = _setting(False, "also prune at random, for comparison")
    finetune_epochs: int = _setting(0, "epochs to retrain each pruned network, its zeros held", type=_whole(0))

    costs: bool = _setting(False, "also measure file size and latency at every k")
    keep: tuple[tuple[str, float], ...] = _setting(
        (), "save the network pruned so; repeatable", type=_kept, action="append", metavar="METHOD:K"
    )
    models: Path = _setting(ROOT / "models", "folder for the trained networks", type=_path)
    plots: Path = _setting(ROOT / "plots", "folder for the plots and their numbers", type=_path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line that names the flag and its range; argparse would print the whole usage above it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _shown(default: Any) -> str:
    return " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)


def _add_flag(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    flag = dict(setting.metadata)
    if setting.default not in (None, ()) and setting.default is not False:
        flag["help"] += f" (default: {_shown(setting.default)})"
    if isinstance(setting.default, bool):
        flag["action"] = "store_true"
    elif "choices" not in flag:
        flag.setdefault("metavar", "PATH" if flag.get("type") is _path else "N")
    # A flag that is not given stays absent, so that the dataclass alone holds the defaults.
    group.add_argument(f"--{setting.name.replace('_', '-')}", default=argparse.SUPPRESS, **flag)


def parse_config(argv: Sequence[str] | None = None) -> Config:
    """Read the command line.

    Args:
        argv: the arguments, without the program's name; None takes those of the process.

    Returns:
        The settings; k sorted, each once, 0 among them.

    Raises:
        SystemExit: 2 after one line on stderr for a bad setting, 0 after `--help`.
    """
    parser = _Parser(
        prog="train.py", allow_abbrev=False,
        description="Train a network, prune copies of it at every k %, and plot accuracy against sparsity.",
    )  # fmt: skip
    for setting in fields(Config):
        if setting.name in GROUPS:
            group = parser.add_argument_group(GROUPS[setting.name])
        _add_flag(group, setting)
    given = vars(parser.parse_args(argv))
    if "model" in given:
        training = ["epochs", "unit_lasso", "seeds"]
        if not given.get("finetune_epochs"):
            training += ["batch_size", "learning_rate", "weight_decay", "label_smoothing", "precision"]
        if idle := [name for name in training if name in given]:
            parser.error(f"--{idle[0].replace('_', '-')} has no effect with --model, which takes the place of training")
    given = {name: tuple(dict.fromkeys(value)) if isinstance(value, list) else value for name, value in given.items()}
    # The dense network is always measured: it is what the others are compared with.
    return Config(**{**given, "k": tuple(sorted({0.0, *given.get("k", K_PERCENT)}))})
