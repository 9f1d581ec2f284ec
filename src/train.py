"""Train a network, prune copies of it at every k %, plot accuracy against sparsity: `python src/train.py`."""

import copy
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m src.train, python -I and symbolic links

import system
from config import BATCH_SIZE, Config, changed, parse_config

if __name__ == "__main__":  # before torch, whose import takes two seconds: a flag and Ctrl-C are answered at once
    system.begin_program()
    parse_config()

import torch
from torch import nn
from tqdm import tqdm

import compress
import files
import prune
import utils
from costs import format_costs, measure_costs, plot_cost_sparsity
from data import NOT_MNIST, Batches, Dataset, load
from engine import Adam, Engine, gradual_masks, pick_device, pick_precision, random_masks
from model import SIZES, NeuralNetwork
from system import say, warn
from utils import Row

bar = partial(tqdm, leave=False, disable=None)  # None: only on a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """Train, prune at every k, plot; return the exit status: 1 if a plot could not be drawn.

    Raises: SystemExit: 2 for a bad setting, 0 after `--help`. OSError, ValueError, FloatingPointError: what went wrong.
    """
    config = parse_config(argv)
    device = pick_device(config.device)
    dataset = load(config.dataset, config.inputs, holdout=config.holdout, device=device)
    precision, batch_size = pick_precision(config.precision, device), config.batch_size or BATCH_SIZE[dataset.name]
    config = replace(config, dataset=dataset.name, device=device.type, precision=precision, batch_size=batch_size)
    check_outputs(config)
    announce(dataset, config)

    seeds = range(config.seed, config.seed + config.seeds)
    rank, ranks = system.torchrun_rank()  # 0, 1 without torchrun, whose ranks share the seeds
    rows_of = files.read_progress(config, seeds[rank::ranks])  # of a run that was stopped
    if rows_of:
        say(f"done before: seed {', '.join(map(str, rows_of))}")
    for seed in (seed for seed in seeds[rank::ranks] if seed not in rows_of):
        torch.manual_seed(seed)
        if config.model is None:
            model = NeuralNetwork().to(device)
            train(model, dataset, config, seed)  # by an Engine, epoch after epoch
        else:
            model = files.load_model(config.model).to(device)
        rows_of[seed] = []
        for method in config.methods:
            rows_of[seed] += sweep(model, method, dataset, config, seed)  # through prune.py's masks at every k
        files.write_progress(config, seed, rows_of[seed])
    rows_of |= files.read_progress(config, (seed for seed in seeds if seed not in rows_of))  # of other ranks
    if len(rows_of) < len(seeds):
        say("other ranks are not done: the one that ends last reports")
        return 0

    rows, text = [row for seed in seeds for row in rows_of[seed]], title(dataset, config)
    say(f"{utils.format_table(rows)}\n{utils.format_facts(rows)}")
    utils.write_csv(files.output(config, "accuracy_sparsity.csv"), rows)
    comparable = config.finetune_epochs and dataset.name == "mnist" and not config.model  # also retrained, from dense
    published = utils.LENET_300_100 if comparable else ()
    drawn = draw(config, "accuracy_sparsity", utils.plot_accuracy_sparsity, rows, text)
    drawn &= draw(config, "accuracy_weights", utils.plot_accuracy_weights, rows, text, published)
    if config.costs:
        drawn &= report_costs(rows, text, dataset, config)
    return finish(drawn, dataset, config)


# ── before training ──


def announce(dataset: Dataset, config: Config) -> None:
    """Say what will be computed, on what and with what."""
    machine = system.describe_machine(dataset.test_images.device)
    say(f"{title(dataset, config)}; {len(dataset.train_labels):,} training images")
    training = f", training in {config.precision}" * (config.model is None or config.finetune_epochs > 0)
    say(f"{machine['hardware']}, threads: {machine['threads']}{training}")
    if 0 < config.k[-1] <= 1:
        say(f"warning: k is in %: did you mean {' '.join(f'{100 * k:g}' for k in config.k)}?")


def check_outputs(config: Config) -> None:
    """Raise an OSError or ValueError before training for what would fail after it."""
    if config.model is None:
        prune.find_masks(NeuralNetwork(), "weight", 0, **pruning(config))  # --skip may name what is not there
    for folder in (config.models, config.plots):
        probe = folder / f".{os.urandom(8).hex()}.tmp"
        system.write_file(probe, b"")
        probe.unlink()
    for path in files.result_files(config):
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is in the way: a folder or device, not a file")
    kept = [files.kept_path(config, *which).resolve() for which in config.keep]
    if config.model is not None and config.model.resolve() in kept:
        raise FileExistsError(f"--keep would overwrite {config.model}, which --model reads: choose another --models")


# ── networks ──


def train(model: nn.Module, dataset: Dataset, config: Config, seed: int) -> None:
    """Train a network in place, a line an epoch; that of the first seed is saved."""
    choice = pruning(config) | {"prune_output": False}  # classes are needed to learn
    masks = partial(random_masks, model, seed=seed, **choice) if config.every_k else None
    options = {"masks": masks, "unit_lasso": config.unit_lasso}
    engine, batches = make_engine(model, dataset, config, seed, config.epochs, config.learning_rate, **options)
    what = "Held-out" if config.holdout else "Testing"
    for epoch in range(1, config.epochs + 1):
        training = engine.train_epoch(bar(batches, f"epoch {epoch}/{config.epochs}"))
        testing = evaluate(model, dataset)
        line = f"Epoch:{epoch}/{config.epochs}, Training Set Accuracy: {training:.2%}"
        say(f"Seed:{seed}, " * (config.seeds > 1) + f"{line}, {what} Set Accuracy: {testing:.2%}")
    if seed == config.seed:
        files.save_model(model, config, {"training_percent": 100 * training, f"{what.lower()}_percent": 100 * testing})


def make_engine(
    model: nn.Module, dataset: Dataset, config: Config, seed: int, epochs: int, peak: float, masks: Any, **options: Any
) -> tuple[Engine, Batches]:
    """An Engine with Adam on a one-cycle schedule to a peak of the learning rate, and batches in the seed's order."""
    order = torch.Generator().manual_seed(seed)
    batches = Batches(dataset.train_images, dataset.train_labels, config.batch_size or BATCH_SIZE[dataset.name], order)
    steps = epochs * len(batches)
    optimizer = Adam(model.parameters(), lr=peak, weight_decay=config.weight_decay, fused=True)
    # Of one step in all, the schedule makes its lowest rate, at which nothing is learned.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(steps, 2))
    precision = torch.bfloat16 if config.precision == "bf16" else torch.float32
    options |= {"masks": masks and masks(steps=steps), "label_smoothing": config.label_smoothing}
    return Engine(model, optimizer, scheduler=schedule, precision=precision, **options), batches


def evaluate(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy in [0, 1] on the test (or held-out) images."""
    return Engine(model).evaluate(Batches(dataset.test_images, dataset.test_labels, batch_size=2000))


def sweep(model: nn.Module, method: str, dataset: Dataset, config: Config, seed: int) -> list[Row]:
    """Prune copies of a network at every k and measure them; fine-tune them and keep some, if that was asked for."""

    def score(pruned: nn.Module) -> tuple[nn.Module, float]:
        small = compress.shrink(pruned)  # the same logits, sooner
        return small, 100 * evaluate(compress.to_sparse(small), dataset)

    sparsities, random = [k / 100 for k in config.k], torch.Generator().manual_seed(seed)
    points = prune.sweep(model, method, sparsities, score, generator=random, **pruning(config))
    origin, rows = seed if config.model is None else None, []
    for k, point in zip(config.k, points, strict=True):
        (network, accuracy), finetuned = point.score, None
        if config.finetune_epochs:
            network, finetuned = score(finetune(model, method, k, dataset, config, seed))
        kept = sum(int(weight.count_nonzero()) for weight in network.parameters())
        rows.append(Row(origin, method, config.scope, k, 100 * point.achieved, kept, accuracy, finetuned))
        if (method, k) in config.keep and seed == config.seed:
            files.save_pruned(network, config, rows[-1])
    return rows


def finetune(model: nn.Module, method: str, k: float, dataset: Dataset, config: Config, seed: int) -> nn.Module:
    """Copy a network and retrain it while more and more of it is pruned, so that pruned weights may come back.

    The learning rate grows with k: the more is pruned, the more there is to mend.
    """
    network, sparsity, choice = copy.deepcopy(model), k / 100, pruning(config)
    if (method, config.scope) == ("weight", "global"):  # units that are zero go first: without them it is faster
        kept = prune.find_masks(model, method, sparsity, **choice)
        network = compress.shrink(model)
        total = sum(network.get_parameter(name).numel() for name in kept)
        sparsity = max(0.0, 1 - sum(int(mask.sum()) for mask in kept.values()) / total)
    epochs, peak = config.finetune_epochs, config.finetune_learning_rate * k / 100
    if sparsity and peak:
        masks = partial(gradual_masks, network, method, sparsity, **choice)
        engine, batches = make_engine(network, dataset, config, seed, epochs, peak, masks=masks, straight_through=True)
        for epoch in range(1, epochs + 1):
            engine.train_epoch(bar(batches, f"{method} {k:g} %, epoch {epoch}/{epochs}"))
    prune.apply_masks(network, prune.find_masks(network, method, sparsity, **choice))
    return network


def pruning(config: Config) -> dict[str, Any]:
    """The settings that say what is pruned, as prune.py takes them."""
    return {"scope": config.scope, "skip": config.skip, "prune_output": config.prune_output}


# ── results ──


def report_costs(rows: list[Row], text: str, dataset: Dataset, config: Config) -> bool:
    """CSV, table and plot of what the first network costs when it is pruned; returns whether the plot was drawn."""
    path = config.model or files.output(config, "model.bin")
    if not files.read_progress(config, [config.seed]):  # rows count only beside the very file that they are of
        raise ValueError(f"no costs: {path} may be another network than that of these rows")
    model = files.load_model(path).to(dataset.test_images.device)
    own = [row for row in rows if row.seed == rows[0].seed and row.method in ("weight", "unit")]
    costs = measure_costs(model, own, dataset.test_images, **pruning(config))
    utils.write_csv(files.output(config, "cost_sparsity.csv"), costs)
    say(format_costs(costs))
    return draw(config, "cost_sparsity", plot_cost_sparsity, costs, text)


def finish(drawn: bool, dataset: Dataset, config: Config) -> int:
    """Say what else the reader must know, and remove what a whole run needs no more; returns the exit status."""
    for path in files.outdated(config):
        say(f"{path} is of an earlier run")
    if dataset.fallback_reason:
        say(f"{NOT_MNIST}\n{dataset.fallback_reason}")
    if drawn:  # else the same command goes on from here
        for seed in range(config.seed, config.seed + config.seeds):
            files.progress_path(config, seed).unlink(missing_ok=True)
    return 0 if drawn else 1


def draw(config: Config, name: str, plot: Callable[..., Any], *arguments: Any) -> bool:
    """Save a plot, and say whether that went well: one that cannot be drawn costs nothing but itself."""
    try:
        figure = plot(*arguments)
        for suffix in filter(None, ("png", config.format)):
            utils.save_figure(files.output(config, f"{name}.{suffix}"), figure)
        return True
    except Exception as error:  # people's own settings of matplotlib fail in ways of their own
        warn(f"train.py: error: cannot draw {name}: {system.one_line(error)}")
        return False


def title(dataset: Dataset, config: Config) -> str:
    """What was run, for the figures: data, network and seeds; in a second line the flags that are not as by default."""
    images = f"{len(dataset.test_labels):,} {'held-out' if config.holdout else 'test'} images"
    seeds = f"seed {config.seed}" if config.seeds == 1 else f"{config.seeds} seeds"
    trained = f"{'-'.join(map(str, SIZES))}, {config.epochs} epoch{'s' * (config.epochs > 1)}, {seeds}"
    network = trained if config.model is None else f"network of {config.model.name}"
    line = f"{dataset.name.replace('mnist', 'MNIST')}, {images}; {network}"
    return "\n".join(filter(None, (line, ", ".join(changed(config)))))


if __name__ == "__main__":
    sys.exit(system.exit_status(main))
