"""What this project does, side by side with what a user would pick instead.

    python benchmarks/run.py masks

times both sides alternately in one process, prints a table and puts it into its own section of benchmarks/RESULTS.md.
A further subcommand is one function that ends in `report`, and its parser in `main`.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.utils.prune as torch_prune
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

import prune  # noqa: E402
from utils import atomic_write  # noqa: E402

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
MIB, GIB = 2**20, 2**30


class Timing(NamedTuple):
    """Seconds that one side took, over all rounds."""

    median: float
    low: float
    high: float

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

    Args:
        sides: what to time, by name; each is called with what `prepare` returns.
        prepare: called anew, untimed, before every call of a side.
        seconds: about how long to go on, within the limits of `rounds`.
        rounds: least and most calls of each side, after one that isn't counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for number in range(rounds[1] + 1):
        for name, side in sides.items():
            state = prepare()
            gc.collect()
            began = time.perf_counter()
            result = side(state)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            elapsed = time.perf_counter() - began
            del result, state
            if number:  # the first call warms up
                taken[name].append(elapsed)
        if number >= rounds[0] and time.perf_counter() - start > seconds:
            break
    return {name: Timing(statistics.median(times), min(times), max(times)) for name, times in taken.items()}


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
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}; "
        f"{torch.get_num_threads()} threads"
    )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """A Markdown table, its columns aligned so that it also reads well in a terminal."""
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
    command = "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]])
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
    took = alternate(sides, lambda: _holder(weight))
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
    took = alternate(sides, lambda: _stack(weights), rounds=(1, 5) if count > 1 else (3, 25))
    weights.clear()
    masks = {"prune.py": size, "torch": 4 * size}  # torch's are floats
    over = {name: (peak_memory(_ready, side, count) - masks[name]) / GIB for name, side in sides.items()}
    row: dict[str, object] = {"weights": f"{size / 1e6:,.0f} M", "prune.py": took["prune.py"]}
    row |= {"torch": took.get("torch", "does not fit"), "ratio": _ratio(took) if "torch" in sides else ""}
    return row | {f"{name} over": f"{over[name]:.2f} GiB" if name in over else "" for name in masks}


def _ratio(took: Mapping[str, Timing]) -> str:
    return f"{took['torch'].median / took['prune.py'].median:.3g} x"


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("masks", help="making masks, beside torch.nn.utils.prune")
    command.add_argument("--max-weights", type=lambda text: int(float(text)), default=2**28, help="largest model")
    command.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.95], help="for the single layers")
    command.set_defaults(run=masks)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
