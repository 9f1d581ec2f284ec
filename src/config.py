"""Every setting of a run: its default, its meaning and unit, and the command-line flag that changes it."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent  # the folders are found from any working directory
K_PERCENT = (0.0, 25.0, 50.0, 60.0, 70.0, 75.0, 80.0, 85.0, 90.0, 92.5, 95.0, 97.5, 99.0)


def _whole(minimum: int, maximum: int = 10**9) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            if minimum <= (value := int(text)) <= maximum:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a whole number from {minimum} to {maximum}, got {text!r}")

    return parse


def _number(accepts: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            if accepts(value := float(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be a number {wanted}, got {text!r}")

    return parse


_percent = _number(lambda value: 0 <= value <= 100, "from 0 to 100 (in %)")
_fraction = _number(lambda value: 0 <= value <= 1, "from 0 to 1")
_positive = _number(lambda value: 0 < value < math.inf, "> 0, and finite")
_not_negative = _number(lambda value: 0 <= value < math.inf, ">= 0, and finite")


def _path(text: str) -> Path:
    if not text:  # as from a shell variable that is not set; Path would take it for the working directory
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return Path(text)


def _kept(text: str) -> tuple[str, float]:
    method, _, k = text.partition(":")
    if method not in ("weight", "unit"):
        raise argparse.ArgumentTypeError(f"must be weight:K or unit:K, for example weight:90, got {text!r}")
    return method, _percent(k)


def _setting(default: Any, group: str, help: str, **flag: Any) -> Any:
    """A dataclass field that carries the arguments of its command-line flag."""
    return field(default=default, metadata={"group": group, "help": help, **flag})


@dataclass(frozen=True)
class Config:
    """The settings of a run. Each field is also a flag: `batch_size` is `--batch-size`."""

    dataset: str = _setting(
        "auto", "data", "auto: MNIST, or the bundled digits where it cannot be had", choices=("auto", "mnist", "digits")
    )
    holdout: bool = _setting(
        False, "data", "report on the last 10,000 training images, not trained on, instead of the test set"
    )
    inputs: Path = _setting(ROOT / "inputs", "data", "folder of the data sets", type=_path)

    epochs: int = _setting(10, "training", "passes over the training images", type=_whole(1))
    batch_size: int | None = _setting(
        None, "training", "images a step (default: 512 for MNIST, 64 for digits)", type=_whole(1)
    )
    learning_rate: float = _setting(5e-3, "training", "peak of the one-cycle schedule", type=_positive)
    weight_decay: float = _setting(
        2e-4, "training", "L2 penalty, added to the gradient as in Adam's weight_decay", type=_not_negative
    )
    label_smoothing: float = _setting(
        0.1, "training", "share of every target that is spread over all classes", type=_fraction
    )
    unit_lasso: float = _setting(
        0.0, "training", "strength of the group lasso on the L2 norm of every hidden unit; 0 is off", type=_not_negative
    )
    seed: int = _setting(0, "training", "seed of the weights and of the order of the images", type=_whole(0))
    seeds: int = _setting(1, "training", "networks to train and sweep, with seeds SEED, SEED+1, ...", type=_whole(1))
    model: Path | None = _setting(None, "training", "take this model file instead of training one", type=_path)
    device: str = _setting("auto", "training", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = _setting(
        "auto", "training", "of the training passes; auto: bf16 where it is native", choices=("auto", "bf16", "fp32")
    )

    k: tuple[float, ...] = _setting(
        K_PERCENT, "pruning", "shares to prune, in %%; 0 is always added", type=_percent, nargs="+"
    )
    scope: str = _setting("layer", "pruning", "rank within each layer, or across all", choices=("layer", "global"))
    skip: tuple[str, ...] | None = _setting(
        None,
        "pruning",
        "layers to spare, none if no name follows (default: the output layer)",
        nargs="*",
        metavar="NAME",
    )
    random_baseline: bool = _setting(False, "pruning", "also prune at random, for comparison")
    finetune_epochs: int = _setting(
        0, "pruning", "epochs to retrain each pruned network, its zeros held", type=_whole(0)
    )

    costs: bool = _setting(False, "results", "also measure file size and latency at every k")
    keep: tuple[tuple[str, float], ...] = _setting(
        (), "results", "save the network pruned so; repeatable", type=_kept, action="append", metavar="METHOD:K"
    )
    models: Path = _setting(ROOT / "models", "results", "folder for the trained networks", type=_path)
    plots: Path = _setting(ROOT / "plots", "results", "folder for the plots and their numbers", type=_path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line that names the flag and its range; argparse would print the whole usage above it."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _shown(default: Any) -> str:
    return " ".join(f"{value:g}" for value in default) if isinstance(default, tuple) else str(default)


def _add_flag(group: argparse._ArgumentGroup, setting: Field[Any]) -> None:
    flag = dict(setting.metadata)
    del flag["group"]
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
    groups = {name: parser.add_argument_group(name) for name in ("data", "training", "pruning", "results")}
    for setting in fields(Config):
        _add_flag(groups[setting.metadata["group"]], setting)
    given = vars(parser.parse_args(argv))
    if "model" in given:
        idle = [name for name in ("epochs", "unit_lasso", "seeds") if name in given]
        if idle:
            parser.error(f"--{idle[0].replace('_', '-')} has no effect with --model, which takes the place of training")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    # The dense network is always measured: it is what the others are compared with.
    return Config(**{**given, "k": tuple(sorted({0.0, *given.get("k", K_PERCENT)}))})
