"""Train a network, prune copies of it at every k %, plot accuracy against sparsity: `python src/train.py`."""

import hashlib
import io
import json
import os
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import utils
from config import Config, parse_config
from utils import say

if __name__ == "__main__":  # before torch, whose import takes two seconds: a flag and Ctrl-C are answered at once
    utils.stop_on_signals()
    parse_config()

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

import compress
import prune
import results
from data import Batches, DataError, Dataset, load
from engine import Adam, Engine
from model import NeuralNetwork
from results import CostRow, Row


def _digest(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


SOURCE = _digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("[!.]*.py"))))
EVALUATION_BATCH = 2000  # images
COST_BATCHES = (1, 256)  # images
COST_ROUNDS = 5


class SettingError(ValueError):
    """A setting that can be refused only when the machine and the network are known."""


@dataclass(frozen=True)
class Run:
    """What all networks of a run share."""

    config: Config
    dataset: Dataset
    device: torch.device
    precision: torch.dtype  # of the training passes

    @property
    def kind(self) -> str:
        """What the results are of. All file names but those of MNIST's own plots bear it."""
        return self.dataset.name + ("_holdout" if self.config.holdout else "")

    @property
    def tested(self) -> str:
        """What the accuracy is measured on."""
        return "Held-out" if self.config.holdout else "Testing"

    @property
    def batch_size(self) -> int:
        """Images a training step."""
        return self.config.batch_size or (512 if self.dataset.name == "mnist" else 64)

    @property
    def hardware(self) -> str:
        """What computes, in words."""
        threads = torch.get_num_threads()
        return f"{utils.versions(self.device)['hardware']}, {threads} thread{'s' if threads > 1 else ''}"

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy in [0, 1] on the test (or held-out) images."""
        return Engine(model).evaluate(Batches(self.dataset.test_images, self.dataset.test_labels, EVALUATION_BATCH))

    def circumstances(self) -> dict[str, Any]:
        """What the numbers depend on beside the seed, as plain values that JSON can hold."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in ("seed", "seeds")}
        settings |= {"dataset": self.dataset.name, "batch_size": self.batch_size}
        settings |= {"device": self.device.type, "precision": str(self.precision)}
        versions = {"source": SOURCE, **utils.versions(self.device)}
        return json.loads(json.dumps({"settings": settings, "versions": versions}, default=str))


# ── the story ──


def main(argv: Sequence[str] | None = None) -> int:
    """Run the whole job.

    Args:
        argv: the arguments, without the program's name; None takes those of the process.

    Returns:
        The exit status: 0 done, 1 it could not be done, 2 a setting that this machine or network does not have.

    Raises:
        SystemExit: 2 for a bad setting, 0 after `--help`.
    """
    config = parse_config(argv)
    utils.written.clear()
    try:
        run(config)
    except SettingError as error:
        return utils.fail(2, error)
    except (DataError, OSError, ImportError, ValueError, ArithmeticError, MemoryError) as error:
        return utils.fail(1, error)
    except torch.OutOfMemoryError:
        return utils.fail(1, "the GPU is out of memory: try a smaller --batch-size, or --device cpu")
    return 0


def run(config: Config) -> None:
    """Settings, data, networks, results."""
    rank, ranks = _join_ranks()
    device = _allowed(utils.pick_device, config.device)
    for folder in (config.models, config.plots):
        utils.prepare_folder(folder)
    dataset = load(config.dataset, config.inputs, holdout=config.holdout, device=device)
    job = Run(config, dataset, device, utils.pick_precision(config.precision, device))
    _announce(job)

    parts: list[list[Row]] = []  # one a seed
    for seed in range(config.seed + rank, config.seed + config.seeds, ranks):
        parts.append(_resume(job, seed) or _one_network(job, seed))
    rows = [row for part in _gather(job.kind, parts, ranks) for row in part]
    if rank == 0:
        _report(job, rows)
        for seed in range(config.seed, config.seed + config.seeds):
            _unfinished(job, seed).unlink(missing_ok=True)
        results_written = [path for path in utils.written if not path.name.startswith(".")]
        say("wrote " + ", ".join(map(utils.shown, results_written)))
        _warn_of_fallback(job)


def _announce(job: Run) -> None:
    config, dataset = job.config, job.dataset
    trains = config.model is None or config.finetune_epochs
    _warn_of_fallback(job)
    say(
        f"{dataset.name}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} {job.tested.lower()}"
        f" images; {job.hardware}; "
        + (f"training in {str(job.precision).removeprefix('torch.')}; " if trains else "")
        + f"seed {config.seed}"
        + (f" to {config.seed + config.seeds - 1}" if config.seeds > 1 else "")
    )
    say(f"k %: {' '.join(f'{k:g}' for k in config.k)}")
    if 0 < config.k[-1] <= 1:
        say(f"warning: k is in %: did you mean {' '.join(f'{100 * k:g}' for k in config.k)}?")


def _one_network(job: Run, seed: int) -> list[Row]:
    """Train (or load) one network and sweep it; from the first one, make what else was asked for."""
    config, started, before = job.config, time.perf_counter(), len(utils.written)
    if config.seeds > 1:
        say(f"seed {seed}, {seed - config.seed + 1} of {config.seeds}")
    model = _train_network(job, seed) if config.model is None else _load_network(job, config.model)
    trained = time.perf_counter()
    methods = ["weight", "unit"] + (["random_weight", "random_unit"] if config.random_baseline else [])
    rows = [row for method in methods for row in _sweep(job, model, method, seed)]
    done = "trained" if config.model is None else "loaded"
    say(f"{done} in {trained - started:.1f} s, swept in {time.perf_counter() - trained:.1f} s")
    if seed == config.seed:
        for method, k in config.keep:
            _keep(job, model, method, k)
        if config.costs:
            _report_costs(job, model, rows)
    _remember(job, seed, rows, utils.written[before:])
    return rows


# ── networks ──


def _train_network(job: Run, seed: int) -> nn.Module:
    """A trained network. The first one is saved."""
    config = job.config
    torch.manual_seed(seed)
    model = NeuralNetwork().to(job.device)
    _introduce(job, model, first=seed == config.seed)
    epochs = _train(job, model, config.epochs, config.learning_rate, seed, unit_lasso=config.unit_lasso)
    for epoch, training in enumerate(epochs, start=1):
        dense = job.evaluate(model)
        accuracies = f"Training Set Accuracy: {training:.2%}, {job.tested} Set Accuracy: {dense:.2%}"
        say(f"Epoch:{epoch}/{config.epochs}, {accuracies}")
    if seed == config.seed:
        path = config.models / f"{job.kind}_model.bin"
        buffer = io.BytesIO()  # a full disk is then an OSError: torch.save makes an error of its own of it
        torch.save({name: weight.cpu() for name, weight in model.state_dict().items()}, buffer)
        with utils.atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
        accuracy = {"training_percent": 100 * training, f"{job.tested.lower()}_percent": 100 * dense}
        utils.write_json(path.with_suffix(".json"), {"seed": seed, "accuracy": accuracy, **job.circumstances()})
    return model


def _train(
    job: Run, model: nn.Module, epochs: int, learning_rate: float, seed: int, *,
    masks: Mapping[str, Tensor] | None = None, unit_lasso: float = 0.0,
) -> Iterator[float]:  # fmt: skip
    """Train with Adam on a one-cycle schedule; yields the training accuracy in [0, 1] after every epoch."""
    order = torch.Generator().manual_seed(seed)
    batches = Batches(job.dataset.train_images, job.dataset.train_labels, job.batch_size, order)
    decay = job.config.weight_decay
    optimizer = Adam(model.parameters(), lr=learning_rate, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=epochs * len(batches))
    engine = Engine(
        model, optimizer, scheduler=schedule, masks=masks, precision=job.precision,
        label_smoothing=job.config.label_smoothing, unit_lasso=unit_lasso,
    )  # fmt: skip
    for epoch in range(1, epochs + 1):
        bar = tqdm(batches, f"epoch {epoch}/{epochs}", leave=False, disable=None)  # None: only on a terminal
        try:
            yield engine.train_epoch(bar)
        except FloatingPointError as error:
            raise FloatingPointError(f"stopped after epoch {epoch}/{epochs}: {error}") from error


def _load_network(job: Run, path: Path) -> nn.Module:
    """The network in a model file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about files that are refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
        model = NeuralNetwork.from_state_dict(state).float()
    except OSError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:  # torch's own words advise to load what may run code
        cure = "a state_dict is needed, as torch.save(model.state_dict(), path) writes it"
        raise ValueError(f"{path} is not a model file of this project, or damaged: {cure}") from error
    except Exception as error:  # torch.load has no exception of its own for a file that it cannot read
        raise ValueError(f"{path} is not a model file of this project: {error}") from error
    if (model.sizes[0], model.sizes[-1]) != (784, 10):
        raise ValueError(f"{path} holds a network from {model.sizes[0]} to {model.sizes[-1]} values, not 784 to 10")
    _introduce(job, model, first=True)
    say(f"{path}: {job.tested} Set Accuracy: {job.evaluate(model.to(job.device)):.2%}")
    return model


def _introduce(job: Run, model: nn.Module, *, first: bool) -> None:
    _allowed(lambda skip: prune.achieved_sparsity(model, skip=skip), job.config.skip)
    if first:
        say(str(model))


# ── pruning ──


def _sweep(job: Run, model: nn.Module, method: str, seed: int) -> list[Row]:
    """Prune copies of a network at every k, measure them, and retrain them if that was asked for."""
    config = job.config
    kept: list[int] = []

    def score(pruned: nn.Module) -> float:
        small = compress.shrink(pruned)  # the same logits, sooner
        kept.append(_count(small))
        return job.evaluate(compress.to_sparse(small))

    points = prune.sweep(
        model, method, [k / 100 for k in config.k], score, scope=config.scope, skip=config.skip,
        generator=torch.Generator().manual_seed(seed),
        retrain=(lambda pruned, masks: _finetune(job, pruned, seed)) if config.finetune_epochs else None,
    )  # fmt: skip
    scores = len(kept) // len(points)  # a point: a retrained one has two
    return [
        Row(
            seed, method, config.scope, k, 100 * point.achieved, weights, 100 * point.score,
            None if point.retrained_score is None else 100 * point.retrained_score,
        )
        for k, point, weights in zip(config.k, points, kept[::scores], strict=True)
    ]  # fmt: skip


def _finetune(job: Run, pruned: nn.Module, seed: int) -> None:
    """Retrain a pruned network in place, its zeros held, as the smaller one that it is.

    What shrink removes would get no gradient, and never come back.
    """
    for name, layer in compress.shrink(pruned).named_children():
        setattr(pruned, name, layer)
    masks = {name: weight != 0 for name, weight in pruned.named_parameters()}
    for _ in _train(job, pruned, job.config.finetune_epochs, job.config.learning_rate, seed, masks=masks):
        pass


def _count(model: nn.Module) -> int:
    return sum(int(weight.count_nonzero()) for weight in model.parameters())


def _keep(job: Run, model: nn.Module, method: str, k: float) -> None:
    """Save one pruned network of the first seed, fine-tuned if that was asked for, shrunk and compressed."""
    config = job.config
    pruned = prune.prune_model(model, method, k / 100, scope=config.scope, skip=config.skip)
    if config.finetune_epochs:
        _finetune(job, pruned, config.seed)
    small = compress.shrink(pruned)
    info = {
        "method": method, "k_percent": k, "accuracy_percent": 100 * job.evaluate(small), "weights_kept": _count(small),
        "dense_bytes": compress.stored_bytes(model), **job.circumstances(),
    }  # fmt: skip
    compress.save_compressed(small, config.models / f"{job.kind}_{method}_{k:.15g}.bin", info)


def _measure_costs(job: Run, model: nn.Module, rows: Sequence[Row]) -> list[CostRow]:
    """What the network of every row costs, in each form that suits it, at each batch size."""
    from torch.utils.benchmark import Measurement  # its import takes its time, and warns where CUDA is half installed

    config = job.config
    measured: list[tuple[Row, str, int, int, nn.Module, list[Any]]] = []
    for row in rows:
        pruned = prune.prune_model(model, row.method, row.k_percent / 100, scope=config.scope, skip=config.skip)
        small = compress.shrink(pruned)
        sparse = compress.to_sparse(small)
        forms: dict[str, nn.Module] = {"shrunk": small} if row.method == "unit" else {"dense": pruned}
        if row.method == "weight" and any(weight.layout is torch.sparse_csr for weight in sparse.buffers()):
            forms["sparse"] = sparse
        size = compress.stored_bytes(small)
        measured += [(row, form, size, batch, network, []) for form, network in forms.items() for batch in COST_BATCHES]
    for _ in range(COST_ROUNDS):  # all in turns, so that what else the machine does hits all of them
        for *_, batch, network, taken in measured:
            taken.append(compress.latency(network, job.dataset.test_images[:batch], min_run_time=0.1))
    costs = []
    for row, form, size, batch, _, taken in measured:
        (time_taken,) = Measurement.merge(taken)
        latency = (1e3 * time_taken.median, 1e3 * time_taken.iqr)
        costs.append(CostRow(row.method, row.k_percent, row.accuracy_percent, form, size, batch, *latency))
    return costs


# ── results ──


def _report(job: Run, rows: list[Row]) -> None:
    """Table, facts, CSV and plots of all seeds."""
    say(results.format_table(rows))
    say(results.format_facts(rows))
    seeds = len({row.seed for row in rows})
    title = _title(job) + (f"\nmean of {seeds} seeds; bands: ± one sample standard deviation" if seeds > 1 else "")
    results.write_csv(_plot_path(job, "accuracy_sparsity.csv"), rows)
    results.save_figure(_plot_path(job, "accuracy_sparsity.png"), results.plot_accuracy_sparsity(rows, title))
    results.save_figure(_plot_path(job, "accuracy_weights.png"), results.plot_accuracy_weights(rows, title))


def _report_costs(job: Run, model: nn.Module, rows: list[Row]) -> None:
    """Measure what every pruned network costs; write and draw it."""
    say("measuring file sizes and latencies ...")
    plain = [row for row in rows if row.method in ("weight", "unit")]
    costs = _measure_costs(job, model, plain)
    title = f"{_title(job)}, one network (seed {job.config.seed}) on {job.hardware}"
    results.write_csv(_plot_path(job, "cost_sparsity.csv"), costs)
    results.save_figure(_plot_path(job, "cost_sparsity.png"), results.plot_cost_sparsity(costs, title))
    for batch_size in COST_BATCHES:
        say(f"batch {batch_size}: sparse kernels {results.pays(results.break_even(costs, batch_size))}")


def _title(job: Run) -> str:
    config, data = job.config, job.dataset
    images = f"{len(data.test_labels):,} {'held-out' if config.holdout else 'test'} images"
    lasso = f", group lasso {config.unit_lasso:g}" if config.unit_lasso else ""
    epochs = config.finetune_epochs
    tuned = f", {epochs} epoch{'s' if epochs > 1 else ''} of fine-tuning" if epochs else ""
    return f"{data.name.replace('mnist', 'MNIST')}, {images}{lasso}{tuned}"


def _plot_path(job: Run, name: str) -> Path:
    return job.config.plots / (name if job.kind == "mnist" else f"{job.kind}_{name}")


def _warn_of_fallback(job: Run) -> None:
    if job.dataset.fallback_reason:
        say("*** These are NOT MNIST results: the bundled digits took its place. ***\n" + job.dataset.fallback_reason)


# ── seeds: a file each until the run is whole, so that a killed run goes on where it was ──


def _unfinished(job: Run, seed: int) -> Path:
    """The file of a seed; runs in other circumstances have others."""
    circumstances = _digest(json.dumps(job.circumstances()).encode())
    return job.config.plots / f".unfinished_{circumstances}_{job.kind}_seed{seed}.json"


def _remember(job: Run, seed: int, rows: list[Row], files: Sequence[Path]) -> None:
    """Write what a seed gave, and which files it left."""
    digests = {str(path): _digest(path.read_bytes()) for path in files}
    utils.write_json(_unfinished(job, seed), {"rows": [asdict(row) for row in rows], "files": digests})


def _resume(job: Run, seed: int) -> list[Row]:
    """What a killed run in the same circumstances left of a seed, if that and the seed's files are whole."""
    if job.config.model:  # what is in that file may have changed
        return []
    path = _unfinished(job, seed)
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        rows, files = [Row(**row) for row in left["rows"]], left["files"]
        whole = all(_digest(Path(file).read_bytes()) == digest for file, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is damaged
        return []
    if not whole or (seed == job.config.seed and not files):  # overwritten, or not the first one there
        return []
    say(f"seed {seed} is taken from {utils.shown(path)}: a run with the same settings was stopped after it")
    return rows


# ── ranks ──


def _join_ranks() -> tuple[int, int]:
    """This process's rank and how many there are: (0, 1) unless torchrun started it. Only rank 0 speaks."""
    ranks = int(os.environ.get("WORLD_SIZE") or 1)
    if ranks == 1:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # Ranks meet only at the end, perhaps hours apart. When one dies, torchrun ends the others.
    distributed.init_process_group(timeout=timedelta(days=7))
    rank = distributed.get_rank()
    if rank:
        utils.silence()
    return rank, ranks


def _gather(kind: str, parts: list[list[Row]], ranks: int) -> list[list[Row]]:
    """The rows of all ranks in the order of their seeds, on rank 0."""
    if ranks == 1:
        return parts
    gathered: list[Any] | None = [None] * ranks if distributed.get_rank() == 0 else None
    distributed.gather_object((kind, parts), gathered)
    distributed.destroy_process_group()
    if gathered and len({kind for kind, _ in gathered}) > 1:  # one could not download it
        raise DataError("the processes did not all have MNIST: choose --dataset mnist or --dataset digits")
    return sorted((part for _, some in gathered or [] for part in some), key=lambda part: part[0].seed)


def _allowed(choose: Callable[[Any], Any], setting: Any) -> Any:
    try:
        return choose(setting)
    except ValueError as error:
        raise SettingError(error) from error


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line, for people
    sys.exit(main())
