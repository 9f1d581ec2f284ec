"""Train a network, prune copies of it at every k %, plot accuracy against sparsity: `python src/train.py`."""

import contextlib
import copy
import hashlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for python -m src.train, python -I and symbolic links

import system
from config import Config, parse_config, without_effect

if __name__ == "__main__":  # before torch, whose import takes two seconds: a flag and Ctrl-C are answered at once
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115  it was closed; tqdm takes None for a terminal
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # ranks that do not meet print pages beside the error
    system.stop_on_signals()
    parse_config()

import torch
from torch import nn
from tqdm import tqdm

import compress
import prune
import utils
from costs import format_costs, measure_costs, plot_cost_sparsity
from data import Batches, Dataset, load
from engine import Adam, Engine, Masks, gradual_masks, random_masks
from model import SIZES, NeuralNetwork
from system import say
from utils import Row

bar = partial(tqdm, leave=False, disable=None)  # None: only on a terminal
BATCH_SIZE = {"mnist": 512, "digits": 64}  # images a training step
RECIPE = (  # settings that a figure's title names where they are not the default
    *("learning_rate", "weight_decay", "batch_size", "label_smoothing", "unit_lasso", "every_k", "finetune_epochs"),
    *("finetune_learning_rate", "scope", "skip", "prune_output"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, prune at every k, measure, plot; return the exit status, 1 if a plot could not be drawn.

    Raises:
        SystemExit: 2 for a bad setting, 0 after `--help`.
        OSError, ValueError, FloatingPointError: the job cannot be done.
    """
    config = parse_config(argv)
    rank, ranks = system.join_ranks()
    if rank:  # rank 0 alone speaks
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    device = system.pick_device(config.device)
    dataset = load(config.dataset, config.inputs, holdout=config.holdout, device=device)
    if dataset.fallback_reason and ranks > 1:  # another rank may have found MNIST
        raise ValueError(f"{dataset.fallback_reason}; with several ranks choose --dataset digits to train on those")
    config = decided(config, dataset, device)
    check_outputs(config)
    announce(dataset, config)

    seeds, first = range(config.seed + rank, config.seed + config.seeds, ranks), None
    rows = read_progress(config, seeds)
    for seed in seeds:
        if any(row.seed == seed for row in rows):
            continue
        torch.manual_seed(seed)
        model = NeuralNetwork().to(device) if config.model is None else load_model(config.model, device)
        if config.model is None:
            train(model, dataset, config, seed)
        rows += [row for method in config.methods for row in sweep(model, method, dataset, config, seed)]
        write_progress(rows, config, rank)
        first = first or model

    gathered = system.gather(rows, ranks)  # on rank 0
    return report(gathered, first, dataset, config) if gathered else 0


# ── networks ──


def train(model: nn.Module, dataset: Dataset, config: Config, seed: int) -> None:
    """Train a network in place, a line an epoch; the first one is saved."""
    batches = training_batches(dataset, config, seed)
    steps = config.epochs * len(batches)
    masks = random_masks(model, steps, seed) if config.every_k else None
    engine = make_engine(model, config, steps, config.learning_rate, masks=masks, unit_lasso=config.unit_lasso)
    for epoch in range(1, config.epochs + 1):
        training = engine.train_epoch(bar(batches, f"epoch {epoch}/{config.epochs}"))
        testing = evaluate(model, dataset)
        what = "Held-out" if config.holdout else "Testing"
        say(f"Epoch:{epoch}/{config.epochs}, Training Set Accuracy: {training:.2%}, {what} Set Accuracy: {testing:.2%}")
    if seed == config.seed:
        save_model(model, config, {"training_percent": 100 * training, f"{what.lower()}_percent": 100 * testing})


def finetune(
    pruned: nn.Module, masks: Masks, *,
    dense: nn.Module, method: str, k: float, dataset: Dataset, config: Config, seed: int,
) -> None:  # fmt: skip
    """Retrain a pruned network in place: from the dense one, pruned gradually, so that weights may come back.

    The learning rate grows with k: the more is pruned, the more there is to mend.
    """
    network, sparsity = copy.deepcopy(dense), k / 100
    if (method, config.scope) == ("weight", "global"):  # units that are zero go first: without them it is faster
        network = compress.shrink(dense)
        total = sum(network.get_parameter(name).numel() for name in masks)
        sparsity = max(0.0, 1 - sum(int(mask.sum()) for mask in masks.values()) / total)
    epochs, peak = config.finetune_epochs, config.finetune_learning_rate * k / 100
    if sparsity and peak:
        batches = training_batches(dataset, config, seed)
        steps = epochs * len(batches)
        gradual = gradual_masks(network, method, sparsity, steps, **pruning(config))
        engine = make_engine(network, config, steps, peak, masks=gradual, straight_through=True)
        for epoch in range(1, epochs + 1):
            engine.train_epoch(bar(batches, f"{method} {k:g} %, epoch {epoch}/{epochs}"))
    prune.apply_masks(network, prune.find_masks(network, method, sparsity, **pruning(config)))
    for name, layer in network.named_children():
        setattr(pruned, name, layer)


def training_batches(dataset: Dataset, config: Config, seed: int) -> Batches:
    """The training images in an order that the seed decides."""
    order = torch.Generator().manual_seed(seed)
    return Batches(dataset.train_images, dataset.train_labels, config.batch_size or len(dataset.train_labels), order)


def make_engine(model: nn.Module, config: Config, steps: int, peak: float, **options: Any) -> Engine:
    """An Engine with Adam on a one-cycle schedule of so many steps, to that peak of the learning rate."""
    optimizer = Adam(model.parameters(), lr=peak, weight_decay=config.weight_decay, fused=True)
    # Of one step in all, the schedule makes its lowest rate, at which nothing is learned.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=max(steps, 2))
    options |= {"precision": getattr(torch, config.precision), "label_smoothing": config.label_smoothing}
    return Engine(model, optimizer, scheduler=schedule, **options)


def evaluate(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy in [0, 1] on the test (or held-out) images."""
    return Engine(model).evaluate(Batches(dataset.test_images, dataset.test_labels, batch_size=2000))


def sweep(model: nn.Module, method: str, dataset: Dataset, config: Config, seed: int) -> list[Row]:
    """Prune copies of a network at every k and measure them; retrain them and keep some, if that was asked for."""

    def score(pruned: nn.Module) -> tuple[nn.Module, float]:
        small = compress.shrink(pruned)  # the same logits, sooner
        return small, 100 * evaluate(compress.to_sparse(small), dataset)

    origin = seed if config.model is None else None
    rows = []
    for k in config.k:
        retrain = partial(finetune, dense=model, method=method, k=k, dataset=dataset, config=config, seed=seed)
        (point,) = prune.sweep(
            model, method, [k / 100], score, **pruning(config),
            generator=torch.Generator().manual_seed(seed), retrain=retrain if config.finetune_epochs else None,
        )  # fmt: skip
        small, accuracy = point.score
        tuned, finetuned = point.retrained_score or (small, None)
        kept = sum(int(weight.count_nonzero()) for weight in tuned.parameters())
        rows.append(Row(origin, method, config.scope, k, 100 * point.achieved, kept, accuracy, finetuned))
        if (method, k) in config.keep and seed == config.seed:
            info = {"method": method, "k_percent": k, "weights_kept": kept}
            info["accuracy_percent"] = accuracy if finetuned is None else finetuned
            path = model_path(config, f"{method}_{k:.15g}")
            compress.save_compressed(tuned, path, {**info, **describe(config)})
            say(f"wrote {path}")
    return rows


def pruning(config: Config) -> dict[str, Any]:
    """The settings that say what is pruned, as prune.py takes them."""
    return {"scope": config.scope, "skip": config.skip, "prune_output": config.prune_output}


# ── results ──


def report(rows: list[Row], model: nn.Module | None, dataset: Dataset, config: Config) -> int:
    """Table, facts, CSV and plots of all seeds, and the costs of the first network; returns the exit status."""
    rows = sorted(rows, key=lambda row: row.seed or 0)  # ranks and stopped runs bring them in other orders
    say(f"{utils.format_table(rows)}\n{utils.format_facts(rows)}")
    write_rows(rows, plot_path(config, "accuracy_sparsity.csv"))
    text = title(dataset, config)
    published = utils.LENET_300_100 if config.finetune_epochs and dataset.name == "mnist" else ()  # retrained as well
    plots: dict[str, Callable[[], Any]] = {
        "accuracy_sparsity": lambda: utils.plot_accuracy_sparsity(rows, text),
        "accuracy_weights": lambda: utils.plot_accuracy_weights(rows, text, published),
    }
    if config.costs and model is not None:
        own = [row for row in rows if row.seed == rows[0].seed and row.method in ("weight", "unit")]
        costs = measure_costs(model, own, dataset.test_images, **pruning(config))
        say(format_costs(costs))
        write_rows(costs, plot_path(config, "cost_sparsity.csv"))
        plots["cost_sparsity"] = lambda: plot_cost_sparsity(costs, text)
    drawn = [draw(plot, plot_path(config, name), config.format) for name, plot in plots.items()]
    announce_older_results(config)
    announce_fallback(dataset)
    if all(drawn):  # else the same command draws again without training
        for path in progress_files(config):
            path.unlink(missing_ok=True)
    return 0 if all(drawn) else 1


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Write a CSV; if its folder has gone or is full, elsewhere, and say where in the error."""
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


def draw(plot: Callable[[], Any], path: Path, extra_format: str | None) -> bool:
    """Save a plot, and say whether that went well: one that cannot be drawn costs nothing but itself."""
    try:
        figure = plot()
        for suffix in filter(None, ("png", extra_format)):
            utils.save_figure(path.with_suffix(f".{suffix}"), figure)
            say(f"wrote {path}.{suffix}")
        return True
    except Exception as error:  # people's own settings of matplotlib fail in ways of their own
        system.warn(f"train.py: error: cannot draw {path}: {system.one_line(error)}")
        return False


def title(dataset: Dataset, config: Config) -> str:
    """What was run, for the figures: data, network and seeds; in a second line the flags that are not as by default."""
    images = f"{len(dataset.test_labels):,} {'held-out' if config.holdout else 'test'} images"
    seeds = f"seed {config.seed}" if config.seeds == 1 else f"{config.seeds} seeds"
    training = f"{config.epochs} epoch{'s' * (config.epochs > 1)}, {seeds}"
    origin = training if config.model is None else f"network of {config.model.name}"
    lines = [f"{dataset.name.replace('mnist', 'MNIST')}, {images}; {'-'.join(map(str, SIZES))}, {origin}"]
    defaults, flags = replace(Config(), batch_size=BATCH_SIZE[dataset.name]), []
    for name in RECIPE:
        value = getattr(config, name)
        if value != getattr(defaults, name) and name not in without_effect(config):
            value = " ".join(value) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else value
            flags.append(f"{name.replace('_', ' ')} {value}".removesuffix(" True"))
    return "\n".join([*lines, ", ".join(flags)]).strip()


# ── before training ──


def decided(config: Config, dataset: Dataset, device: torch.device) -> Config:
    """The settings with "auto" replaced by what it came to."""
    precision = str(system.pick_precision(config.precision, device)).removeprefix("torch.")
    batch_size = config.batch_size or BATCH_SIZE[dataset.name]
    return replace(config, dataset=dataset.name, device=device.type, precision=precision, batch_size=batch_size)


def announce(dataset: Dataset, config: Config) -> None:
    """Say what will be computed, on what and with what."""
    announce_fallback(dataset)
    machine = system.describe_machine(dataset.test_images.device)
    say(f"{title(dataset, config)}; {len(dataset.train_labels):,} training images")
    say(f"{machine['hardware']}, threads: {machine['threads']}, training in {config.precision}")
    say(f"k %: {' '.join(f'{k:.15g}' for k in config.k)}")
    if 0 < config.k[-1] <= 1:
        say(f"warning: k is in %: did you mean {' '.join(f'{100 * k:g}' for k in config.k)}?")


def announce_fallback(dataset: Dataset) -> None:
    """Say loudly, first and last, that the digits took MNIST's place."""
    if dataset.fallback_reason:
        say(f"*** These are NOT MNIST results: the bundled digits took its place. ***\n{dataset.fallback_reason}")


def check_outputs(config: Config) -> None:
    """Raise an OSError or ValueError before training for what would fail after it."""
    if config.model is None:
        prune.find_masks(NeuralNetwork(), "weight", 0, **pruning(config))  # --skip may name what is not there
    for folder in (config.models, config.plots):
        system.check_folder(folder)
    for path in result_files(config):
        if path.exists() and not path.is_file():
            raise FileExistsError(f"{path} is in the way: a folder or device, not a file")
    kept = [model_path(config, f"{method}_{k:.15g}").resolve() for method, k in config.keep]
    if config.model is not None and config.model.resolve() in kept:
        raise FileExistsError(f"--keep would overwrite {config.model}, which --model reads: choose another --models")


def announce_older_results(config: Config) -> None:
    """Name files that were made from another network than the one that now lies beside them."""
    for path in result_files(config) if config.model is None else ():
        with contextlib.suppress(FileNotFoundError):  # moved away, or removed by a run beside this one
            if path.stat().st_mtime < model_path(config).stat().st_mtime:
                say(f"{path} is of an earlier network")


# ── files ──


def result_files(config: Config) -> list[Path]:
    """What in the output folders is named as a run's files are."""
    patterns = [model_path(config, name).with_suffix(".*") for name in ("model", "unit_*", "weight_*")]
    patterns += [plot_path(config, f"{name}_*.*") for name in ("accuracy", "cost")]
    return sorted(path for pattern in patterns for path in pattern.parent.glob(pattern.name))


def model_path(config: Config, name: str = "model") -> Path:
    """The file of the first network, or of a pruned one."""
    return config.models / f"{config.dataset}{'_holdout' * config.holdout}_{name}.bin"


def plot_path(config: Config, name: str) -> Path:
    """A file of numbers or a plot; MNIST's own have no prefix."""
    prefix = f"{config.dataset}{'_holdout' * config.holdout}_"
    return config.plots / f"{prefix if prefix != 'mnist_' else ''}{name}"


def describe(config: Config) -> dict[str, Any]:
    """The settings and versions that the numbers depend on beside the seed, as JSON holds them."""
    settings = {name: value for name, value in asdict(config).items() if name not in without_effect(config)}
    versions = system.describe_machine(torch.device(config.device))
    return json.loads(json.dumps({"settings": settings, "versions": versions}, default=str))


def save_model(model: nn.Module, config: Config, accuracy: dict[str, float]) -> None:
    """Write the weights, then a JSON that says how they came about and names the MD5 of the file it describes."""
    buffer, path = io.BytesIO(), model_path(config)
    torch.save({name: weight.cpu() for name, weight in model.state_dict().items()}, buffer)
    system.write_file(path, buffer.getvalue())
    facts = {"md5": md5(buffer.getvalue()), "seed": config.seed, "accuracy": accuracy, **describe(config)}
    system.write_file(path.with_suffix(".json"), f"{json.dumps(facts, indent=2)}\n".encode())
    say(f"wrote {path}")


def load_model(path: Path, device: torch.device) -> nn.Module:
    """The network in a model file: a state_dict as a run or torch.save wrote it, or a kept one."""
    state, _ = compress.load_compressed(path)
    about = path.with_suffix(".json")
    if about.is_file() and md5(path.read_bytes()) not in about.read_text(errors="replace"):
        warnings.warn(f"{about} does not describe {path}: one of them was damaged, or is of another run", stacklevel=2)
    try:
        model = NeuralNetwork.from_state_dict(state).float()
        NeuralNetwork.from_state_dict(model.state_dict())  # finite in float32, too
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (model.sizes[0], model.sizes[-1]) != (784, 10):
        raise ValueError(f"{path} holds a network from {model.sizes[0]} to {model.sizes[-1]} values, not 784 to 10")
    return model.to(device)


def md5(data: bytes) -> str:
    """The digest by which files are told apart."""
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


# ── the seeds that are done, so that a run which is stopped goes on ──


def progress_files(config: Config) -> list[Path]:
    """The files that are there while a run of several seeds is not whole: one a rank."""
    return sorted(config.plots.glob(plot_path(config, "accuracy_sparsity*.unfinished").name))


def write_progress(rows: list[Row], config: Config, rank: int) -> None:
    """Keep the rows of the seeds that are done, and what they hold for."""
    if config.seeds > 1:
        content = json.dumps({**describe(config), "rows": [asdict(row) for row in rows]}).encode()
        try:
            path = plot_path(config, f"accuracy_sparsity{rank or ''}.unfinished")
            system.write_file(path, f"{md5(content)}\n".encode() + content)
        except OSError as error:  # the rows are still in memory
            system.warn(f"warning: {error}: stopped now, the run would not go on after seed {rows[-1].seed}")


def read_progress(config: Config, seeds: Collection[int]) -> list[Row]:
    """The rows of these seeds that runs with the same settings and versions left when they were stopped."""
    rows: list[Row] = []
    if config.keep or config.costs:  # which are of the first network
        seeds = [seed for seed in seeds if seed != config.seed]
    for path in progress_files(config) if config.seeds > 1 else ():
        digest, _, content = path.read_bytes().partition(b"\n")
        left = json.loads(content) if digest == md5(content).encode() else {}  # what is damaged is not even parsed
        found, done = [Row(**row) for row in left.pop("rows", [])], {row.seed for row in rows}
        if left == describe(config):
            rows += [row for row in found if row.seed in seeds and row.seed not in done]
        else:
            say(f"{path} is damaged or of a run with other settings, so its seeds are trained again")
    if rows:
        say(f"a stopped run with these settings has done {len({row.seed for row in rows})} of the {len(seeds)} seeds")
    return rows


if __name__ == "__main__":
    sys.exit(system.exit_status(main))
