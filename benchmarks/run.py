"""What this project does, side by side with what a user would pick instead.

    python benchmarks/run.py masks  # or train, inference, scaling

times both sides in turns, prints a table and puts it into its own section of benchmarks/RESULTS.md.
A further subcommand is one function that ends in `report`, and its parser in `main`.
"""

import argparse
import copy
import csv
import gc
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import compress  # noqa: E402
import prune  # noqa: E402
from config import Config  # noqa: E402
from data import Batches, Dataset, load  # noqa: E402
from engine import Adam, Engine  # noqa: E402
from model import SIZES, NeuralNetwork  # noqa: E402
from utils import atomic_write, pick_device, pick_precision, versions  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MIB, GIB = 2**20, 2**30
WEIGHTS = 2_386_000  # of the network
TRAINING = 2 * (3 * WEIGHTS - 784_000)  # FLOPs an image
SIDE, REPEATS = 2048, 5  # of the matrix products that give the limit
PRODUCTS = REPEATS * 2 * SIDE**3  # FLOPs
PASSES = 20 * 512  # images a turn: a second or so, as what else the machine does comes and goes
MEMORY_ROUNDS = 3  # of inference


class Timing(NamedTuple):
    """Seconds that one side took, over all turns."""

    median: float
    low: float
    high: float
    turns: tuple[float, ...] = ()

    def __str__(self) -> str:
        """Median and range, for a table."""
        scale, unit = (1e3, "ms") if self.median < 10 else (1, "s")
        return f"{self.median * scale:,.3g} {unit} ({self.low * scale:,.3g} to {self.high * scale:,.3g})"


def alternate(
    sides: Mapping[str, Callable[[Any], object]],
    prepare: Callable[[], Any] = lambda: None,
    seconds: float = 6.0,
    rounds: tuple[int, int] = (3, 25),
) -> dict[str, Timing]:
    """Time several ways of doing the same thing in turns, so that what else the machine does hits all of them.

    Calls of microseconds are repeated within a turn, or all that is measured is how long the caches take to fill.

    Args:
        sides: what to time, by name; each is called with what `prepare` returns.
        prepare: called anew, untimed, for every call of a side.
        seconds: about how long to go on, within the limits of `rounds`.
        rounds: least and most turns of each side, after one that counts only if it is the only one.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    start, calls = time.perf_counter(), 1
    for number in range(rounds[1] + 1):
        for name, side in sides.items():
            taken[name].append(_seconds(side, [prepare() for _ in range(calls)]))
        if number >= rounds[0] and time.perf_counter() - start > seconds:
            break
        calls = 1 + int(0.01 / min(times[-1] for times in taken.values()))
    counted = {name: times[1:] or times for name, times in taken.items()}
    return {name: _timing(times) for name, times in counted.items()}


def _timing(times: Sequence[float]) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), tuple(times))


def ratio(slower: Timing, faster: Timing) -> str:
    """Median and quartiles of the turns' ratios, for a table."""
    low, median, high = np.quantile(np.divide(slower.turns, faster.turns), (0.25, 0.5, 0.75))
    return f"{median:.3g} x" + (f" ({low:.3g} to {high:.3g})" if len(slower.turns) > 1 else "")


def _seconds(side: Callable[[Any], object], states: Sequence[Any]) -> float:
    """How long a side takes with one of the states, on average."""
    gc.collect()
    began = time.perf_counter()
    for state in states:
        side(state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / len(states)


def peak_memory(function: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """Bytes that a call takes at its peak over what its process held before, in a fresh process.

    Args:
        function: made to return what is to be measured; all that it holds then doesn't count.
        arguments: what `function` is called with.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return float("nan")  # killed: out of memory
    finally:
        process.join()


def _measure(sender: Any, function: Callable[..., Callable[[], object]], arguments: Sequence[Any]) -> None:
    call = function(*arguments)
    before = _status("VmRSS")
    result = call()
    sender.send(_status("VmHWM") - before)
    del result


def _status(field: str) -> float:
    """Bytes in a field of this process's status. Unlike getrusage, it leaves out what the parent process had."""
    return 1024 * next(float(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith(field))


def machine() -> str:
    """Hardware, versions and threads in one line."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{versions(torch.device('cpu'))['hardware']}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}; "
        f"{torch.get_num_threads()} threads"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table, its columns aligned so that it also reads well in a terminal."""
    if not rows:
        return "(none of the sizes asked for)"
    cells = [[*rows[0]], *([str(row.get(column, "")) for column in rows[0]] for row in rows)]
    widths = [max(len(line[number]) for line in cells) for number in range(len(cells[0]))]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|-" + "-|-".join("-" * width for width in widths) + "-|", *lines[1:]])


def report(name: str, title: str, parts: Iterable[str]) -> None:
    """Print a subcommand's findings and put them into RESULTS.md in place of its earlier ones.

    Args:
        name: the subcommand.
        title: heading of its section.
        parts: paragraphs and tables.
    """
    command = " ".join(["python benchmarks/run.py", *sys.argv[1:]])
    head = f"## {title}\n\n`{command}` on {time.strftime('%Y-%m-%d')}: {machine()}"
    section = "\n\n".join([f"<!-- {name} -->", head, *parts, f"<!-- end of {name} -->"])
    print(section)
    old = RESULTS.read_text() if RESULTS.exists() else "# Results\n\nEach section is written by `benchmarks/run.py`.\n"
    before, found, rest = old.partition(f"<!-- {name} -->")
    after = rest.partition(f"<!-- end of {name} -->")[2] if found else "\n"
    with atomic_write(RESULTS) as temporary:
        temporary.write_text(f"{before.rstrip()}\n\n{section}{after}")


def masks(options: argparse.Namespace) -> None:
    """Masks by prune.py and by torch.nn.utils.prune: time, memory, and the time that the memory alone would take."""
    sizes = [size for size in (2**20, 2**22, 2**24, 2**26) if size <= options.max_weights]
    shapes = [(10, 10), (200, 500), (1000, 784), (512, 512, 3, 3), (4096, 4096), (8192, 8192)]
    counts = [count for count in (1, 4, 16, 60) if count * 2**24 <= options.max_weights]
    parts = [
        "Medians of turns, with their range; ratios: medians of the turns' own, with their quartiles.",
        "Weights of one layer: `weight_mask` and `l1_unstructured`. Limit: to read the weights once and write a mask.",
        table([_layer_row(size, sparsity) for size in sizes for sparsity in options.sparsity]),
        "Units of one layer, sparsity 0.5: `unit_mask` and `ln_structured(n=2, dim=0)`.",
        table([_unit_row(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]),
        "Weights of several layers of 4096 x 4096, sparsity 0.8: `find_masks` with global scope and "
        "`global_unstructured`. Over: peak memory over the weights and the masks.",
        table([_global_row(count) for count in counts]),
    ]
    report("masks", "Masks: prune.py and torch.nn.utils.prune", parts)


def _holder(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def _layer_row(size: int, sparsity: float) -> dict[str, object]:
    weight = torch.randn(1024, size // 1024)
    sides = {
        "prune.py": lambda layer: prune.weight_mask(layer.weight, sparsity),
        "torch": lambda layer: torch_prune.l1_unstructured(layer, "weight", sparsity),
    }
    took = alternate(sides, lambda: _holder(weight), rounds=(2, 25))
    limit = alternate({"limit": lambda _: (weight.sum(), np.ones(size, bool))}, seconds=1)["limit"]
    return {"weights": f"{size / 1e6:,.0f} M", "sparsity": sparsity, **took, "ratio": _ratio(took), "limit": limit}


def _unit_row(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, object]:
    weight = torch.randn(shape, dtype=dtype)
    sides = {
        "prune.py": lambda layer: prune.unit_mask(layer.weight, 0.5),
        "torch": lambda layer: torch_prune.ln_structured(layer, "weight", 0.5, n=2, dim=0),
    }
    took = alternate(sides, lambda: _holder(weight), seconds=2, rounds=(3, 200))
    kind = str(dtype).removeprefix("torch.")
    return {"weight": " x ".join(map(str, shape)), "type": kind, **took, "ratio": _ratio(took)}


def _stack(weights: Sequence[Tensor]) -> nn.Sequential:
    return nn.Sequential(*map(_holder, weights))


def _weights(count: int) -> list[Tensor]:
    return [torch.empty(4096, 4096).normal_() for _ in range(count)]


def _ours(model: nn.Sequential) -> object:
    return prune.find_masks(model, "weight", 0.8, scope="global", skip=())


def _torch(model: nn.Sequential) -> None:
    pairs = [(layer, "weight") for layer in model]
    torch_prune.global_unstructured(pairs, pruning_method=torch_prune.L1Unstructured, amount=0.8)


def _ready(side: Callable[[nn.Sequential], object], count: int) -> Callable[[], object]:
    side(_stack([torch.ones(8, 8)]))  # what torch loads at its first use doesn't count
    model = _stack(_weights(count))
    return lambda: side(model)


def _global_row(count: int) -> dict[str, object]:
    size = count * 2**24
    weights = _weights(count)
    sides = {"prune.py": _ours, "torch": _torch}
    if 56 * size > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):  # torch takes about 52 bytes a weight
        del sides["torch"]
    took = alternate(sides, lambda: _stack(weights), rounds=(2 if size <= 2**26 else 0, 25))
    weights.clear()
    masks = {"prune.py": size, "torch": 4 * size}  # torch's are floats
    over = {name: (peak_memory(_ready, side, count) - masks[name]) / GIB for name, side in sides.items()}
    row: dict[str, object] = {"weights": f"{size / 1e6:,.0f} M", "prune.py": took["prune.py"]}
    row |= {"torch": took.get("torch", "does not fit")}
    row["ratio"] = _ratio(took) if "torch" in sides else ""
    return row | {f"{name} over": f"{over[name]:.2f} GiB" if name in over else "" for name in masks}


def _ratio(took: Mapping[str, Timing]) -> str:
    return ratio(took["torch"], took["prune.py"])


def _precisions() -> dict[str, torch.dtype]:
    """Those that the main job trains in here: bf16 where the hardware has it, and fp32."""
    native = pick_precision("auto", pick_device("auto")) is torch.bfloat16
    return {"bf16": torch.bfloat16, "fp32": torch.float32} if native else {"fp32": torch.float32}


def train(options: argparse.Namespace) -> None:
    """The whole main job beside an ordinary script, and beside the time that its matrix products alone would take."""
    dataset = load("mnist", options.inputs, device=pick_device("auto"))  # leaves MNIST as both sides look for it
    with tempfile.TemporaryDirectory() as folder:
        commands, tried = _commands(options, folder)
        jobs: dict[str, list[Job]] = {name: [] for name in commands}
        products = [_time_products(dataset)]
        for _ in range(options.rounds):
            for name, command in commands.items():
                jobs[name].append(_job(command))
                products.append(_time_products(dataset))
        with (Path(folder) / "accuracy_sparsity.csv").open(newline="") as file:
            kept = sum(int(row["weights_kept"]) for row in csv.DictReader(file))
        start = alternate(_starts(commands["main job"]), rounds=(3, 7))
    took = {name: Job(*map(statistics.median, zip(*runs, strict=True))) for name, runs in jobs.items()}
    rate = {name: statistics.median(one[name] for one in products) for name in products[0]}
    rates = " and ".join(f"{one / 1e9:,.0f} GFLOP/s in {name}" for name, one in rate.items())
    parts = [
        f"Whole processes, start-up included: {options.epochs} epochs, 26 points; medians of {options.rounds} turns "
        "with their range, and of the turns' ratios with their quartiles. The ordinary script is "
        "`benchmarks/ordinary.py` with the number of loader workers fastest in one epoch and two points: "
        f"{tried}.",
        table([_job_row(name, jobs, took[name]) for name in jobs]),
        f"Their parts beside the limit: FLOPs over the rate of a product of {SIDE} x {SIDE} matrices, "
        f"{rates} (medians before, between and after the jobs). To train on an image takes 2 x (3 x {WEIGHTS:,} - "
        f"784,000) = {TRAINING:,} FLOPs, as the first layer's inputs need no gradient; to evaluate it, 2 a weight. The "
        f"26 networks that are swept have {26 * WEIGHTS:,} weights; those that the main job evaluates keep {kept:,} of "
        "them.",
        table([row for name, job in took.items() for row in _part_rows(name, job, rate, options.epochs, kept)]),
        f"The training passes alone: `Engine.train_epoch` with the main job's settings on {PASSES:,} images, and "
        f"{REPEATS} products, in {options.turns} turns in one process.",
        table([*_passes_rows(dataset, options.turns)]),
        "Start-up, whole processes. To the first batch: with MNIST on the disk, unpacked.",
        table([start]),
    ]
    report("train", "Training and sweep: the main job, an ordinary script and the limit", parts)


def _commands(options: argparse.Namespace, folder: str) -> tuple[dict[str, list[str]], str]:
    """The jobs to compare; and how long the ordinary script took in a short trial, by its number of workers."""
    inputs, epochs = ["--inputs", str(options.inputs.resolve())], ["--epochs", str(options.epochs)]
    ours = ["src/train.py", *inputs, "--dataset", "mnist", "--models", folder, "--plots", folder, *epochs]
    peer = ["benchmarks/ordinary.py", *inputs, "--plot", f"{folder}/ordinary.png"]
    trial = ["--epochs", "1", "--k", "50"]  # trains on and evaluates images in about the proportion of the whole job
    took = {number: _job([*peer, *trial, "--workers", str(number)]).whole for number in options.workers}
    fastest = str(min(took, key=lambda number: took[number]))
    commands = {"main job": ours}
    if "bf16" in _precisions():
        commands["main job, fp32"] = [*ours, "--precision", "fp32"]
    commands["ordinary script"] = [*peer, *epochs, "--workers", fastest]
    return commands, ", ".join(f"{number} workers {seconds:.1f} s" for number, seconds in took.items())


class Job(NamedTuple):
    """What a whole process took, in seconds, and what came of it."""

    whole: float
    trained: float  # evaluation after every epoch included
    swept: float
    accuracy: float  # %, dense, on the test images


def _process(command: Sequence[str]) -> str:
    """What Python prints."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def _job(command: Sequence[str]) -> Job:
    began = time.perf_counter()
    printed = _process(command)
    whole = time.perf_counter() - began
    trained, swept = map(float, re.findall(r"trained in (\S+) s, swept in (\S+) s", printed)[0])
    return Job(whole, trained, swept, float(re.findall(r"esting(?: Set Accuracy:)? (\S+)%", printed)[-1]))


def _job_row(name: str, jobs: Mapping[str, Sequence[Job]], job: Job) -> dict[str, object]:
    whole = {each: _timing([run.whole for run in runs]) for each, runs in jobs.items()}
    row: dict[str, object] = {"job": name, "whole": whole[name]}
    row["faster"] = ratio(whole["ordinary script"], whole[name])
    row |= {"trained": f"{job.trained:.1f} s", "swept": f"{job.swept:.1f} s"}
    return row | {"sweep's share": f"{job.swept / job.whole:.0%}", "test accuracy": f"{job.accuracy:.2f} %"}


def _part_rows(name: str, job: Job, rate: Mapping[str, float], epochs: int, kept: int) -> Iterator[dict[str, object]]:
    precision = "bf16" if name == "main job" and "bf16" in rate else "fp32"
    passes, evaluation = epochs * 60_000 * TRAINING, epochs * 10_000 * 2 * WEIGHTS
    limit = passes / rate[precision] + evaluation / rate["fp32"]
    sweep = 10_000 * 2 * (26 * WEIGHTS if name == "ordinary script" else kept)
    for part, operations, least, seconds in (
        (f"training in {precision}, evaluation in fp32", passes + evaluation, limit, job.trained),
        ("sweep in fp32", sweep, sweep / rate["fp32"], job.swept),
    ):
        row: dict[str, object] = {"job": name, "part": part, "FLOPs": f"{operations:.3g}", "limit": f"{least:.2f} s"}
        yield row | {"took": f"{seconds:.1f} s", "share of the limit": f"{least / seconds:.0%}"}


def _product(precision: torch.dtype, device: torch.device) -> Callable[[Any], object]:
    left, right, out = torch.randn(3, SIDE, SIDE, device=device).to(precision)
    return lambda _: [torch.mm(left, right, out=out) for _ in range(REPEATS)]


def _time_products(dataset: Dataset) -> dict[str, float]:
    """FLOPs a second in each precision."""
    sides = {name: _product(precision, dataset.train_images.device) for name, precision in _precisions().items()}
    return {name: PRODUCTS / took.median for name, took in alternate(sides, rounds=(5, 5)).items()}


def _trainer(precision: torch.dtype, dataset: Dataset, sizes: Sequence[int] = SIZES) -> Callable[..., object]:
    """Each call trains one more epoch as the main job does."""
    settings = Config()
    model = NeuralNetwork(sizes).to(dataset.train_images.device)
    batches = Batches(dataset.train_images, dataset.train_labels, 512, torch.Generator())
    rate, decay, smoothing = settings.learning_rate, settings.weight_decay, settings.label_smoothing
    optimizer = Adam(model.parameters(), lr=rate, weight_decay=decay, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=100 * len(batches))
    engine = Engine(model, optimizer, scheduler=scheduler, precision=precision, label_smoothing=smoothing)
    return lambda *_: engine.train_epoch(batches)


def _passes_rows(dataset: Dataset, turns: int) -> Iterator[dict[str, object]]:
    images, labels = dataset.train_images[:PASSES], dataset.train_labels[:PASSES]
    few = replace(dataset, train_images=images, train_labels=labels)
    sides = {}
    for name, precision in _precisions().items():
        sides[f"{name} products"] = _product(precision, images.device)
        sides[f"{name} passes"] = _trainer(precision, few)
    took = alternate(sides, rounds=(turns, turns))
    for name in _precisions():
        products, passes = took[f"{name} products"], took[f"{name} passes"]
        limit = _timing([PASSES * TRAINING / PRODUCTS * seconds for seconds in products.turns])
        low, median, high = np.quantile(np.divide(limit.turns, passes.turns), (0.25, 0.5, 0.75))
        row: dict[str, object] = {"precision": name, "rate": f"{PRODUCTS / products.median / 1e9:,.0f} GFLOP/s"}
        row |= {"limit": limit, "took": passes}
        yield row | {"share of the limit": f"{median:.0%} ({low:.0%} to {high:.0%})"}


def _starts(main_job: Sequence[str]) -> dict[str, Callable[[Any], object]]:
    until_first_batch = (
        "import os, sys; sys.path.insert(0, 'src'); import train; "
        f"train.Engine.train_epoch = lambda *_: os._exit(0); train.main({main_job[1:]})"
    )
    return {
        "train.py --help": lambda _: _process(["src/train.py", "--help"]),
        "import torch": lambda _: _process(["-c", "import torch"]),
        "start to first batch": lambda _: _process(["-c", until_first_batch]),
    }


def inference(options: argparse.Namespace) -> None:
    """Shrunk and sparse networks beside dense ones, as fast as they could be and as torch-pruning makes them."""
    torch.manual_seed(0)
    model, origin = NeuralNetwork(), "a network of random weights"
    if options.model.exists():
        model = NeuralNetwork.from_state_dict(torch.load(options.model, weights_only=True))
        origin = f"the trained network in `{options.model.name}`"
    images = torch.rand(256, 784)
    networks: dict[str, nn.Module] = {"dense": model}
    errors = []
    for k in (50, 80):
        pruned = prune.prune_model(model, "unit", k / 100)
        small = compress.shrink(pruned)
        networks |= {f"unit {k} %: shrunk": small, f"unit {k} %: from scratch": NeuralNetwork(_sizes(small))}
        networks[f"unit {k} %: torch-pruning"] = _torch_pruned(model, k / 100)
        errors.append(_error(small, pruned, images))
    for k in (80, 90, 95, 99):
        pruned = prune.prune_model(model, "weight", k / 100)
        for form, source in (("sparse", pruned), ("shrunk, sparse", compress.shrink(pruned))):
            networks[f"weight {k} %: {form}"] = sparse = compress.to_sparse(source)
            errors.append(_error(sparse, pruned, images))
    took = {size: _latencies(networks, images[:size], options) for size in (256, 1)}
    held = {name: networks[name] for name in ("dense", "unit 50 %: shrunk", "unit 80 %: shrunk")}
    parts = [
        f"On the CPU in fp32, of {origin}. {options.rounds} turns through all networks, in each the median of "
        f"{options.seconds:g} s of calls; their medians (and quartiles), and medians of the turns' ratios. "
        "torch-pruning: `MagnitudePruner`, L2, local, the output layer ignored. Logits of the shrunk and the sparse "
        f"networks differ from those of the pruned ones by at most {max(errors):.0e} of the largest.",
        table([_latency_row(name, network, took) for name, network in networks.items()]),
        f"Peak memory of making a network and running {len(images)} images through it; median of {MEMORY_ROUNDS} "
        "fresh processes.",
        table([_memory_row(name, network) for name, network in held.items()]),
    ]
    report("inference", "Inference: shrunk and sparse networks", parts)


def _sizes(network: nn.Module) -> list[int]:
    weights = list(network.parameters())
    return [weights[0].shape[1], *map(len, weights)]


def _torch_pruned(model: nn.Module, sparsity: float) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(model)
    norm = torch_pruning.importance.MagnitudeImportance(p=2)
    *_, output = model.children()
    torch_pruning.pruner.MagnitudePruner(
        model, torch.rand(1, 784), importance=norm, pruning_ratio=sparsity, ignored_layers=[output]
    ).step()
    return model


@torch.no_grad()
def _error(network: nn.Module, pruned: nn.Module, images: Tensor) -> float:
    logits = pruned(images)
    return float((network(images) - logits).abs().max() / logits.abs().max())


def _latencies(networks: Mapping[str, nn.Module], batch: Tensor, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """`compress.latency` of every network in every turn, in seconds."""
    turns = [
        [compress.latency(network.eval(), batch, options.seconds).median for network in networks.values()]
        for _ in range(options.rounds)
    ]
    return dict(zip(networks, np.transpose(turns), strict=True))


def _latency_row(name: str, network: nn.Module, took: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, object]:
    tensors = [layer.weight for layer in network.modules() if isinstance(layer, nn.Linear | compress.SparseLinear)]
    weights = sum(int(tensor.to_dense().count_nonzero()) for tensor in tensors)
    row: dict[str, object] = {"network": name, "weights": f"{weights:,}"}
    for size, times in took.items():
        row[f"batch {size}"] = Timing(*np.quantile(times[name], [0.5, 0.25, 0.75]))
        row[f"faster at {size}"] = f"{np.median(times['dense'] / times[name]):.3g} x"
    return row


def _memory_row(name: str, network: nn.Module) -> dict[str, object]:
    peaks = [peak_memory(_pass, _sizes(network)) / MIB for _ in range(MEMORY_ROUNDS)]
    return {"network": name, "peak": f"{statistics.median(peaks):.1f} MiB ({min(peaks):.1f} to {max(peaks):.1f})"}


def _pass(sizes: Sequence[int]) -> Callable[[], object]:
    images = torch.rand(256, 784)
    run = torch.inference_mode()(lambda sizes: NeuralNetwork(sizes)(images))
    run((784, 10, 10))  # what torch loads at its first use doesn't count
    return lambda: run(sizes)


def scaling(options: argparse.Namespace) -> None:
    """How time and memory grow with the weights, the images and the number of k."""
    weights = {2**exponent: (2**exponent,) for exponent in (18, 20, 22, 24, 26)}
    networks = {sum(map(math.prod, pairwise(_widths(width)))): width for width in (125, 250, 500, 1000, 2000)}
    images = (512, 1024, 2048, 4096, 8192)
    rows = [
        _growth_row("weight_mask", "weights", _layer_masks, weights, options),
        _growth_row("find_masks, global", "weights", _global_masks, weights, options),
        _growth_row("training epoch", "weights", _epoch, {n: (width, 2048) for n, width in networks.items()}, options),
        _growth_row("training epoch", "images", _epoch, {n: (1000, n) for n in images}, options),
        _growth_row("sweep", "weights", _sweep, {n: (width, 2048, 4) for n, width in networks.items()}, options),
        _growth_row("sweep", "images", _sweep, {n: (1000, n, 4) for n in images}, options),
        _growth_row("sweep", "number of k", _sweep, {n: (1000, 2048, n) for n in (2, 4, 8, 16, 32)}, options),
    ]
    parts = [
        f"At up to {options.sizes} sizes a row, in turns, on the CPU with random weights and images: medians at the "
        "smallest and the largest, and the exponent fitted to all; what costs the same at any size makes it smaller. "
        "Memory: the peak of a fresh process over what it held before, the weights and images included. Unless they "
        "grow: 2,048 images, 2,386,000 weights (the network's widths keep their proportions), 4 k, both methods.",
        table(rows),
    ]
    report("scaling", "Scaling: how time and memory grow", parts)


def _growth_row(
    task: str, variable: str, make: Callable[..., Callable[..., object]], cases: Mapping[int, tuple[int, ...]],
    options: argparse.Namespace,
) -> dict[str, object]:  # fmt: skip
    """One row: `cases` are sizes and the arguments with which `make` returns the call to measure at that size."""
    sizes = list(cases)[: options.sizes]
    calls = {str(size): make(*cases[size]) for size in sizes}
    took = alternate(calls, seconds=options.seconds, rounds=(2, 25))
    calls.clear()
    times = [took[str(size)].median for size in sizes]
    peaks = [peak_memory(_made_and_called, make, cases[size]) / MIB for size in sizes]
    row: dict[str, object] = {"task": task, "grows with": variable, "from": f"{sizes[0]:,}", "to": f"{sizes[-1]:,}"}
    row |= {"time": f"{times[0] * 1e3:,.3g} to {times[-1] * 1e3:,.3g} ms", "exponent": _exponent(sizes, times)}
    return row | {"memory": f"{peaks[0]:.1f} to {peaks[-1]:.1f} MiB", "its exponent": _exponent(sizes, peaks)}


def _exponent(sizes: Sequence[int], values: Sequence[float]) -> str:
    return f"{np.polyfit(np.log(sizes), np.log(values), 1)[0]:.2f}"


def _made_and_called(make: Callable[..., Callable[..., object]], case: Sequence[int]) -> Callable[[], object]:
    make()()  # a tiny case: what torch loads at its first use doesn't count
    return lambda: make(*case)()


def _widths(width: int) -> tuple[int, ...]:
    return 784, width, width, width // 2, width // 5, 10


def _layer_masks(count: int = 2**10) -> Callable[..., object]:
    weight = torch.randn(256, count // 256)
    return lambda *_: prune.weight_mask(weight, 0.8)


def _global_masks(count: int = 2**12) -> Callable[..., object]:
    model = nn.Sequential(*(nn.Linear(256, count // 1024, bias=False) for _ in range(4)))
    return lambda *_: prune.find_masks(model, "weight", 0.8, scope="global", skip=())


def _random_images(count: int) -> Dataset:
    images, labels = torch.rand(count, 784), torch.randint(10, (count,))
    return Dataset("random", images, labels, images, labels)


def _epoch(width: int = 125, images: int = 64) -> Callable[..., object]:
    precision = pick_precision("auto", torch.device("cpu"))
    return _trainer(precision, _random_images(images), _widths(width))


def _sweep(width: int = 125, images: int = 64, count: int = 2) -> Callable[..., object]:
    model, data = NeuralNetwork(_widths(width)), _random_images(images)
    batches = Batches(data.test_images, data.test_labels, 2000)

    def score(pruned: nn.Module) -> float:
        return Engine(compress.to_sparse(compress.shrink(pruned))).evaluate(batches)

    sparsities = np.linspace(0, 0.95, count).tolist()
    return lambda *_: [prune.sweep(model, method, sparsities, score) for method in ("weight", "unit")]


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("masks", help="making masks, beside torch.nn.utils.prune")
    command.add_argument("--max-weights", type=lambda text: int(float(text)), default=2**30, help="largest model")
    command.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8], help="for the single layers")
    command.set_defaults(run=masks)
    command = commands.add_parser("train", help="the main job, beside an ordinary script and the matrix-product limit")
    workers = sorted({0, 1, 2, os.cpu_count() or 1})
    command.add_argument("--rounds", type=int, default=2, help="runs of each job")
    command.add_argument("--epochs", type=int, default=10, help="of each job")
    command.add_argument("--turns", type=int, default=40, help="turns of the training passes alone")
    command.add_argument("--workers", type=int, nargs="+", default=workers, help="of the ordinary script, to try")
    command.add_argument("--inputs", type=Path, default=ROOT / "inputs", help="folder of MNIST/")
    command.set_defaults(run=train)
    command = commands.add_parser("inference", help="shrunk and sparse networks, beside dense ones and torch-pruning's")
    command.add_argument("--rounds", type=int, default=20, help="turns, in each of which every network is measured")
    command.add_argument("--seconds", type=float, default=0.02, help="of each measurement")
    command.add_argument(
        "--model", type=Path, default=ROOT / "models" / "mnist_model.bin", help="model file, if it exists"
    )
    command.set_defaults(run=inference)
    command = commands.add_parser("scaling", help="how time and memory grow with weights, images and number of k")
    command.add_argument("--sizes", type=int, default=5, help="to measure a row, from the smallest on; 2 to 5")
    command.add_argument("--seconds", type=float, default=2, help="for the times of a row, about")
    command.set_defaults(run=scaling)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
