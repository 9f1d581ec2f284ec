"""Sides timed in turns, peak memory, Markdown tables; importing it puts src/ on the path."""

import argparse
import os
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # bytes
TURNS = (3, 50)  # fewest and most
SHORTEST = 0.01  # seconds: faster calls are repeated within a turn, so that the caches are filled


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flag that all benchmarks take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="see that it works; its numbers mean nothing")
    return parser


def alternate(
    sides: Mapping[str, Callable[[Any], object]], prepare: Callable[[], Any] = lambda: None, *, seconds: float
) -> dict[str, np.ndarray]:
    """Seconds a call of each side in every turn: what else the machine does hits all sides alike.

    Args:
        sides: what to time, by name; each gets what `prepare` returns, which is called before every call, untimed.
        seconds: about how long to go on, within the limits of `TURNS`; one more turn warms up.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    start = timeit.default_timer()
    for turn in range(1 + TURNS[1]):
        for name, side in sides.items():
            calls = 1 + int(SHORTEST / taken[name][-1]) if turn else 1
            arguments = iter([prepare() for _ in range(calls)])
            taken[name].append(timeit.timeit(lambda: side(next(arguments)), number=calls) / calls)  # noqa: B023
        if turn >= TURNS[0] and timeit.default_timer() - start > seconds:
            break
    return {name: np.array(times[1:]) for name, times in taken.items()}


def peak_memory(make: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Bytes that the call made by a module's function takes over what its fresh process held before. Linux only."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak, make, arguments).result()


def _peak(make: Callable[..., Callable[[], object]], arguments: Sequence[Any]) -> int:
    call, before = make(*arguments), _status("VmRSS")
    call()
    return _status("VmHWM") - before  # getrusage would count what the parent process had


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def spread(values: np.ndarray, unit: str) -> str:
    """Median and quartiles."""
    quartiles = np.quantile(values, (0.5, 0.25, 0.75))
    return "{} ({} to {}) {}".format(
        *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in quartiles), unit
    )


def beside(times: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Cells of a table: how long two sides take, and how many times as long the second one, turn by turn."""
    (first, quick), (second, slow) = times.items()
    return {first: spread(1e3 * quick, "ms"), second: spread(1e3 * slow, "ms"), "ratio": spread(slow / quick, "x")}


def print_machine() -> None:
    """Print what was run, hardware, versions and threads: no number means anything without them."""
    from system import describe_machine  # in src/

    machine = describe_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    facts = ", ".join(f"{name} {value}" for name, value in machine.items())
    print(f"`python {' '.join(sys.argv)}`: {facts}, cores {os.cpu_count()}, memory {MEMORY / 2**30:.0f} GiB.")
    print("Medians of turns, with their quartiles.", flush=True)


def print_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    print(f"\n{title}\n", *(f"| {' | '.join(map(str, line))} |" for line in lines), sep="\n", flush=True)
