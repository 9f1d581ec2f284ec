"""Calls with arguments of every wrong kind: documented exceptions alone, and nothing changed after one.

`python -m pytest tests/faults/test_fuzz.py --calls 50000` makes more of them.
"""

import copy
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import compress
import costs
import data
import engine
import files
import model
import prune
import system
import utils
from config import Config, parse_config
from costs import CostRow
from engine import Adam, Engine, gradual_masks, pick_device, pick_precision, random_masks
from model import NeuralNetwork
from utils import Row

# ── arguments ──

SCALARS = [None, True, 0, 1, -1, 3, 10**30, 0.0, 0.5, 1.0, 80, -0.5, float("nan"), float("inf"), "", "weight", b"x"]
OTHERS = ["global", "fc1", "fc9", (), ("fc1",), ["0"], [0.5, 0], {}, {"a": 1}, int, object]
TENSORS = [
    torch.randn(4, 3), torch.randn(0, 3), torch.tensor(1.0), torch.full((2, 2), torch.nan), torch.ones(3, 4).t(),
    torch.ones(4, 3, dtype=torch.int64), torch.randn(4, 3).bfloat16(), torch.randn(2, 3, dtype=torch.complex64),
    torch.rand(4, 3) > 0.5, torch.eye(3).to_sparse(), torch.empty(2, 2, device="meta"), torch.randn(5, 784),
]  # fmt: skip
MODELS = [
    NeuralNetwork((4, 3, 2)), nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), nn.Linear(3, 2),
    nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2)), nn.Identity(),
    nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 3).double(), nn.Linear(3, 2)),
]  # fmt: skip
MASKS: list[dict[Any, Any]] = [
    {"fc1.weight": torch.rand(3, 4) > 0.5}, {"fc1.weight": torch.ones(2, 2, dtype=torch.bool)},
    {"0.weight": torch.rand(4, 3) > 0.5, "0.bias": torch.zeros(4)}, {"fc1.weight": None}, {3: torch.ones(3) > 0},
    {"0.weight": torch.rand(4, 3) > 0.5, "nowhere.weight": torch.rand(4, 3) > 0.5},
]  # fmt: skip
BATCHES: list[Any] = [
    [(torch.rand(2, 4), torch.tensor([0, 1])), (torch.rand(1, 4), torch.tensor([1]))], [], [None], [()],
    [(torch.rand(2, 5), torch.tensor([0, 1]))], [(torch.rand(2, 4), torch.tensor([0, 1, 1]))],
    [(torch.rand(2, 4), torch.tensor([[0], [1]]))], [(torch.rand(2, 4), torch.tensor([0, 2]))],
    [(torch.rand(2, 4), torch.tensor([0.0, 1.0]))], [(torch.rand(2, 4).long(), torch.tensor([0, 1]))],
]  # fmt: skip
POINTS = [Row(seed, method, "layer", k, k, 10, 98.0 - k) for seed in (0, 1) for method in ("weight", "unit")
          for k in (0.0, 50.0)]  # fmt: skip
ROWS: list[Any] = [
    POINTS, POINTS[:1], POINTS[1:2], POINTS[:3], POINTS[:5], [], [Row(0, "magic", "layer", 0.0, 0.0, 10, 98.0)],
    [Row(0, "unit", "layer", 0.0, 0.0, 10, float("nan"))],
]  # fmt: skip
COSTS: list[Any] = [
    [CostRow(method, k, 98.0, form, 10, 40, batch, 1.0 + k, 0.1) for k in (0.0, 50.0) for batch in (1, 8)
     for method, form in (("weight", "dense"), ("weight", "sparse"), ("unit", "shrunk"))],
    [CostRow("weight", 0.0, 98.0, "dense", 10, 40, 1, 1.0, 0.1)],
]  # fmt: skip
# What main alone hands on is of the right type, if of any value: Python's AttributeError will do for the rest.
TYPED = {
    *("rows", "costs", "curve", "dense", "title", "column", "figure", "logits", "targets", "batches", "batch", "score"),
    *("retrain", "published", "device", "steps", "seed", "data", "prune_output", "limit"),
}  # fmt: skip
ANYTHING = [*SCALARS, *OTHERS, *TENSORS, *MODELS, *MASKS]
LIKELY: dict[str, list[Any]] = {  # by the name of the argument
    "model": MODELS, "weight": TENSORS, "masks": MASKS, "sparsity": [0.0, 0.3, 1.0], "method": list(prune.METHODS),
    "sparsities": [[0.0, 0.5], [1.0], []], "scope": ["layer", "global"], "skip": [None, (), ("fc1",), ("0",)],
    "score": [lambda model: 1.0, lambda model: None, 3], "dim": [0, 1, -1], "generator": [torch.Generator(), None],
    "only": [None, ("0.weight",), ("fc1.*",)], "prune_output": [True, False], "limit": [None, 10**6],
    "steps": [0, 4], "seed": [0, 1], "published": [(), utils.LENET_300_100], "data": [b"", b"data"],
    "folder": [Path("folder")], "error": [ValueError("\x1b[31m")], "name": ["auto", "cpu", "bf16"],
    "model_or_state_dict": [*MODELS, *(each.state_dict() for each in MODELS[:4])], "straight_through": [True, False],
    "retrain": [lambda model, masks: None, None, 3], "sizes": [(4, 3, 2), (1, 1), [2, 2, 2]], "batches": BATCHES,
    "state": [each.state_dict() for each in MODELS[:4]], "info": [{"a": 1}, {"a": [0.5, "b"]}],
    "images": [torch.rand(5, 784), torch.rand(2, 4)], "labels": [torch.arange(5), torch.arange(2)],
    "batch_size": [1, 2], "batch": [torch.rand(2, 4), torch.rand(2, 3)], "min_run_time": [],
    "logits": [torch.rand(2, 3)], "targets": [torch.tensor([0, 2]), torch.tensor([0, 3])],
    "precision": [torch.float32, torch.bfloat16, torch.int8], "label_smoothing": [0, 0.1], "unit_lasso": [0, 0.1],
    "rows": ROWS, "costs": COSTS, "title": ["title"],
    "column": ["accuracy_percent", "finetuned_percent"], "path": [Path("file")],
    "curve": list(utils.curves(POINTS).values()), "dense": [98.0], "figure": [Figure((1, 1))], "k": [None, 90.0],
    "dataset": ["digits", "cifar"], "inputs": [Path()],
    "holdout": [True, False], "device": [torch.device("cpu")],
}  # fmt: skip


# ── everything public ──


def train_epoch(
    model, batches, precision=torch.float32, label_smoothing=0.0, unit_lasso=0.0, masks=None, straight_through=False
):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if isinstance(model, nn.Module) else None
    options = {"label_smoothing": label_smoothing, "unit_lasso": unit_lasso, "masks": masks, "precision": precision}
    return Engine(model, optimizer, straight_through=straight_through, **options).train_epoch(batches)


def evaluate(model, batches):
    return Engine(model).evaluate(batches)


def loss(logits, targets):
    return Engine(NeuralNetwork((4, 3, 2))).loss(logits, targets)


def masks_of_steps(model, steps, seed):
    return list(random_masks(model, steps, seed))


def gradually(model, method, sparsity, steps, **choice):
    return list(gradual_masks(model, method, sparsity, steps, **choice))


LEFT_OUT = {  # made by the others, and checking nothing; what is for axes of our own; what ends or silences a process
    *(prune.SweepPoint, compress.SparseLinear, data.Dataset, data.DataError, utils.Row, utils.Curve, utils.Published),
    *(CostRow, utils.new_figure, utils.stretch_k_axis, utils.log_axis, utils.label_ends),
    *(system.say, system.begin_program, system.exit_status),
}
METHODS = {train_epoch: Engine.train_epoch, evaluate: Engine.evaluate, loss: Engine.loss,
           masks_of_steps: prune.find_masks, gradually: prune.find_masks}  # fmt: skip


def public(module):
    """What a module defines for others."""
    found = [value for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
    return [value for value in found if getattr(value, "__module__", "") == module.__name__ and value not in LEFT_OUT]


def parameters(function):
    """Those of a function; in the place of any options those of find_masks."""
    own = list(inspect.signature(function).parameters.values())
    if own[-1:] and own[-1].kind is inspect.Parameter.VAR_KEYWORD:
        taken = {parameter.name for parameter in own}
        own[-1:] = [
            each for each in parameters(prune.find_masks) if each.name not in taken and each.default != each.empty
        ]
    return own


MODULES = (prune, compress, data, model, utils, costs, system)
FUNCTIONS: list[Callable[..., Any]] = [
    *(function for module in MODULES for function in public(module)), NeuralNetwork.from_state_dict,
    *METHODS, pick_device, pick_precision, files.load_model,
]  # fmt: skip
assert set(public(engine)) == {Adam, Engine, random_masks, gradual_masks, pick_device, pick_precision}
SLOW = {"Network": 0.3, "plot": 0.1, "measure": 0.1, "precision": 0.1, "machine": 0.1, "latency": 0.3}
WEIGHTS = [next((rate for word, rate in SLOW.items() if word in each.__name__), 1) for each in FUNCTIONS]
PARAMETERS = {function: parameters(function) for function in FUNCTIONS}
TORCHS = (compress.latency, costs.measure_costs, prune.recalibrate, utils.l2)
SMALL = (utils.l2, utils.write_csv, utils.save_figure, files.load_model, compress.to_sparse, prune.recalibrate)
THEIRS = {  # what torch says to a batch that does not fit the model, the system of files that are not there, …
    **{function: {"RuntimeError", "IndexError", "AttributeError"} for function in TORCHS},
    **{function: {"RuntimeError", "IndexError", "AttributeError", "OSError"} for function in SMALL},
    train_epoch: {"KeyError"},  # masks of another model
}
DOCUMENTED = {
    function: {"TypeError", "ValueError"}
    | {*re.findall(r"\b[A-Z]\w*Error\b", METHODS.get(function, function).__doc__ or "")}
    | THEIRS.get(function, set())
    for function in FUNCTIONS
}


def argument(name, chance):
    """An argument that is of the right kind more often than not, so that the calls get past the first check."""
    pool = LIKELY[name] if name in TYPED or chance.random() < 0.8 else ANYTHING
    return copy.deepcopy(chance.choice(pool))


def arguments(function, chance, folder):
    given = {
        parameter.name: argument(parameter.name, chance)
        for parameter in PARAMETERS[function]
        if LIKELY[parameter.name] and (parameter.default is parameter.empty or chance.random() < 0.5)
    }
    for name in ("path", "folder"):
        if isinstance(given.get(name), str | Path):
            given[name] = folder / given[name]
    if function in (evaluate, compress.latency) and "Lazy" in repr(given["model"]):  # whose first batch shapes it
        given["model"] = copy.deepcopy(MODELS[0])
    if function in (costs.break_even, costs.plot_cost_sparsity):
        typed = {"rows": argument("costs", chance), "batch_size": chance.choice((1, 8))}
        given |= {name: typed[name] for name in typed.keys() & given.keys()}
    if function is costs.measure_costs:
        given |= {"images": torch.rand(256, 784), "model": chance.choice((NeuralNetwork((784, 3, 2)), given["model"]))}
    if function is prune.recalibrate and isinstance(given["model"], nn.Identity):  # which has no device
        given["model"] = nn.Linear(4, 4)
    if function is train_epoch:
        given |= {"masks": chance.choice((None, [None] * 4, [chance.choice(MASKS)] * 4))}
    if "batches" in given and chance.random() < 0.7:
        given["model"] = copy.deepcopy(MODELS[0])
        given["batches"] = chance.choice((given["batches"], copy.deepcopy(BATCHES[0])))
    if function is compress.latency:
        given["min_run_time"] = 0.001
    if function is data.load:  # no downloads; a device is torch's to refuse; anything is true or false enough
        given |= {"device": "cpu", "holdout": True}
    return given


def frozen(value):
    """Something that can be compared with what it is made of later."""
    if isinstance(value, nn.Module):
        return [(name, frozen(each)) for name, each in value.state_dict().items()], [type(m) for m in value.modules()]
    if isinstance(value, torch.Tensor):
        if isinstance(value, nn.UninitializedParameter) or value.is_meta:
            return type(value)
        return (value.to_dense() if value.is_sparse else value).detach().clone().nan_to_num(nan=7).tolist(), value.dtype
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [frozen(item) for item in value]
    return repr(value)


@pytest.fixture(scope="module", autouse=True)
def quick_measurements():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "ROUNDS", 1)
        patch.setattr(costs, "ROUND_SECONDS", 1e-4)
        yield


@pytest.mark.filterwarnings("ignore")
def test_public_functions_raise_what_they_document_and_change_nothing(tmp_path, pytestconfig):
    for seed in range(pytestconfig.getoption("--calls")):
        chance = random.Random(seed)
        (function,) = chance.choices(FUNCTIONS, WEIGHTS)
        given = arguments(function, chance, tmp_path)
        before = frozen(given)
        try:
            function(**given)
        except Exception as error:
            call = f"{seed}: {function.__qualname__}(**{given}) raised {error!r}"
            assert {kind.__name__ for kind in type(error).__mro__} & DOCUMENTED[function], call
            assert str(error).strip(), call
            changed = function is not train_epoch and frozen(given) != before  # what a batch has done is done
        else:  # these are there to change their argument
            changed = function not in (prune.apply_masks, train_epoch) and frozen(given) != before
        assert not changed, f"{seed}: {function.__qualname__}(**{given})"


# ── the command line ──

FLAGS = [f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__] + ["--epoch", "-x", "--", "--no-costs"]
VALUES = ["0", "-1", "x", "nan", "inf", "1e400", "101", "", " ", "3", "0.5", "mnist", "fc1", "weight:90", "unit:", "ö"]


def test_the_command_line_answers_anything_with_one_line(capsys, pytestconfig):
    for seed in range(pytestconfig.getoption("--calls") // 10):
        chance = random.Random(seed)
        argv = chance.choices([*FLAGS, *VALUES, *map(chr, chance.sample(range(0xD800), 5))], k=chance.randrange(7))
        try:
            parse_config(argv)
        except SystemExit as ending:
            assert ending.code == 2 and capsys.readouterr().err.count("\n") == 1, argv
