"""`python src/train.py` beside an ordinary script that does the same: whole processes in turns, and their start."""

import os
import re
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path

import numpy as np
from timing import ROOT, alternate, make_parser, print_machine, print_table, spread

import data  # src/ is on the path since timing
from engine import pick_device, pick_precision

# Runs a script up to its first backward pass, of which either has one a step.
FIRST_STEP = """
import os, runpy, sys, torch
torch.Tensor.backward = lambda *_: os._exit(0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
sys.exit("no step was taken")
"""


def main() -> None:
    """Print two tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--turns", type=int, default=3, help="runs of each job")
    parser.add_argument("--other", type=Path, help="the train.py of another checkout, to run as well")
    options = parser.parse_args()
    data.load("mnist", ROOT / "inputs")  # unpacks the files, as torchvision wants them
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        main_job = ["src/train.py", "--dataset", "mnist", "--inputs", "inputs", "--models", folder, "--plots", folder]
        ordinary = ["benchmarks/ordinary.py", "--plot", f"{folder}/ordinary.png", "--workers"]
        start_table(main_job, [*ordinary, "0"], 0 if options.quick else 60)
        epochs, turns, workers = (1, 1, {0}) if options.quick else (10, options.turns, {0, 1, 2, os.cpu_count() or 1})
        # One epoch and two points: training and evaluation in about the proportion of the whole job.
        tried = {n: run([*ordinary, str(n), "--epochs", "1", "--k", "50"])[0] for n in sorted(workers)}
        fastest = min(tried, key=lambda n: tried[n])
        jobs = {"main job": main_job, "ordinary script": [*ordinary, str(fastest)]}
        if pick_precision("auto", pick_device("auto")) == "bf16":
            jobs["main job, fp32"] = [*main_job, "--precision", "fp32"]
        if options.other:
            jobs["other"] = [str(options.other.resolve()), *main_job[1:]]
        results = np.array([[run([*job, "--epochs", str(epochs)]) for job in jobs.values()] for _ in range(turns)])
    rows = []
    for name, seconds, accuracy in zip(jobs, *results.transpose(2, 1, 0), strict=True):  # (2, jobs, turns)
        row = {"job": name, "whole": spread(seconds, "s"), "accuracy": f"{np.median(accuracy):.2f} %"}
        ratios = {f"{base} / this": results[:, place, 0] / seconds for place, base in enumerate([*jobs][:2])}
        rows.append(row | {base: spread(ratio, "x") for base, ratio in ratios.items()})
    trial = ", ".join(f"{n} in {taken:.1f} s" for n, taken in tried.items())
    title = f"Whole processes, epochs: {epochs}, points: 26, turns: {turns}. Loader workers of the ordinary script"
    print_table(f"{title}: {fastest}, as a trial of one epoch took with {trial}.", rows)


def start_table(main_job: list[str], ordinary: list[str], seconds: float) -> None:
    """Print how long processes take to get going."""
    commands = {
        "train.py --help": ["src/train.py", "--help"],
        "import torch": ["-c", "import torch"],
        "train.py, first step": ["-c", FIRST_STEP, *main_job],
        "ordinary.py, first step": ["-c", FIRST_STEP, *ordinary],
    }
    sides = {name: lambda _, command=command: run(command) for name, command in commands.items()}
    times = alternate(sides, seconds=seconds)
    rows = [{"from start to": name, "takes": spread(1e3 * taken, "ms")} for name, taken in times.items()]
    print_table("Start of a process; first step: with MNIST on the disk, up to its backward pass.", rows)


def run(command: list[str]) -> tuple[float, float]:
    """Seconds that Python takes for a command, and the last accuracy in % that it prints."""
    start = timeit.default_timer()
    printed = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    accuracies = re.findall(r"esting(?: Set Accuracy:)? (\S+)%", printed)
    return timeit.default_timer() - start, float(accuracies[-1]) if accuracies else np.nan


if __name__ == "__main__":
    main()
