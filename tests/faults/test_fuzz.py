"""Thousands of calls with arguments of every wrong kind: documented exceptions alone, and nothing changed after one."""

import copy
import inspect
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

import compress
import data
import engine
import model
import prune
import results
import train
from config import Config
from engine import Adam, Engine
from model import NeuralNetwork
from results import CostRow, Row

FUZZ = settings(deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
SEEDS = st.integers(0, 2**63)  # one draw an example: hypothesis takes longer to draw arguments than calls take


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
    [CostRow(method, k, 98.0, form, 10, batch, 1.0 + k, 0.1) for k in (0.0, 50.0) for batch in (1, 8)
     for method, form in (("weight", "dense"), ("weight", "sparse"), ("unit", "shrunk"))],
    [CostRow("weight", 0.0, 98.0, "dense", 10, 1, 1.0, 0.1)], [],
]  # fmt: skip
# What main alone hands on is of the right type, if of any value: Python's AttributeError will do for the rest.
TYPED = {
    "rows",
    "costs",
    "curve",
    "dense",
    "title",
    "column",
    "figure",
    "logits",
    "targets",
    "batches",
    "batch",
    "score",
    "retrain",
}
ANYTHING = [*SCALARS, *OTHERS, *TENSORS, *MODELS, *MASKS]
LIKELY: dict[str, list[Any]] = {  # by the name of the argument
    "model": MODELS, "weight": TENSORS, "masks": MASKS, "sparsity": [0.0, 0.3, 1.0], "method": list(prune.METHODS),
    "sparsities": [[0.0, 0.5], [1.0], []], "scope": ["layer", "global"], "skip": [None, (), ("fc1",), ("0",)],
    "score": [lambda model: 1.0, lambda model: None, 3], "dim": [0, 1, -1], "generator": [torch.Generator(), None],
    "retrain": [lambda model, masks: None, None, 3], "sizes": [(4, 3, 2), (1, 1), [2, 2, 2]], "batches": BATCHES,
    "state": [each.state_dict() for each in MODELS[:4]], "info": [{"a": 1}, {"a": [0.5, "b"]}],
    "images": [torch.rand(5, 784), torch.rand(2, 4)], "labels": [torch.arange(5), torch.arange(2)],
    "batch_size": [1, 2], "batch": [torch.rand(2, 4), torch.rand(2, 3)], "min_run_time": [],
    "logits": [torch.rand(2, 3)], "targets": [torch.tensor([0, 2]), torch.tensor([0, 3])],
    "precision": [torch.float32, torch.bfloat16, torch.int8], "label_smoothing": [0, 0.1], "unit_lasso": [0, 0.1],
    "rows": ROWS, "costs": COSTS, "title": ["title"],
    "column": ["accuracy_percent", "finetuned_percent"], "path": [Path("file")],
    "curve": list(results.curves(POINTS).values()), "dense": [98.0], "figure": [Figure((1, 1))], "k": [None, 90.0],
    "dataset": ["digits", "cifar"], "inputs": [Path()],
    "holdout": [True, False], "device": ["cpu"],
}  # fmt: skip


# ── everything public ──


def train_epoch(
    model: Any,
    batches: Any,
    precision: Any = torch.float32,
    label_smoothing: Any = 0.0,
    unit_lasso: Any = 0.0,
    masks: Any = None,
) -> object:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if isinstance(model, nn.Module) else None
    options = {"label_smoothing": label_smoothing, "unit_lasso": unit_lasso, "masks": masks, "precision": precision}
    return Engine(model, optimizer, **options).train_epoch(batches)


def evaluate(model: Any, batches: Any) -> object:
    return Engine(model).evaluate(batches)


def loss(logits: Any, targets: Any) -> object:
    return Engine(NeuralNetwork((4, 3, 2))).loss(logits, targets)


PLAIN = {  # made by the others, and checking nothing
    prune.SweepPoint, compress.SparseLinear, compress.SparseLayers, data.Dataset, data.DataError, results.Row,
    results.CostRow, results.Curve,
}  # fmt: skip
METHODS = {train_epoch: Engine.train_epoch, evaluate: Engine.evaluate, loss: Engine.loss}


def public(module: ModuleType) -> list[Callable[..., Any]]:
    """What a module defines for others."""
    found = [value for name, value in vars(module).items() if not name.startswith("_") and callable(value)]
    return [value for value in found if getattr(value, "__module__", "") == module.__name__ and value not in PLAIN]


FUNCTIONS: list[Callable[..., Any]] = [
    *(function for module in (prune, compress, data, model, results) for function in public(module)),
    NeuralNetwork.from_state_dict, *METHODS,
]  # fmt: skip
assert set(public(engine)) == {Adam, Engine}  # the first is torch's
WEIGHTS = [0.1 if "plot" in function.__name__ else 1 for function in FUNCTIONS]  # those are slow
PARAMETERS = {function: list(inspect.signature(function).parameters.values()) for function in FUNCTIONS}
THEIRS = {compress.latency: {"RuntimeError"}}  # what torch says to a batch that does not fit the model
DOCUMENTED = {
    function: {"TypeError", "ValueError"}
    | {*re.findall(r"\b[A-Z]\w*Error\b", METHODS.get(function, function).__doc__ or "")}
    | THEIRS.get(function, set())
    for function in FUNCTIONS
}


def argument(name: str, chance: random.Random) -> Any:
    """An argument that is of the right kind more often than not, so that the calls get past the first check."""
    pool = LIKELY[name] if name in TYPED or chance.random() < 0.8 else ANYTHING
    return copy.deepcopy(chance.choice(pool))


def arguments(function: Callable[..., Any], chance: random.Random, folder: Path) -> dict[str, Any]:
    given = {
        parameter.name: argument(parameter.name, chance)
        for parameter in PARAMETERS[function]
        if LIKELY[parameter.name] and (parameter.default is parameter.empty or chance.random() < 0.5)
    }
    if isinstance(given.get("path"), str | Path):
        given["path"] = folder / given["path"]
    if function in (evaluate, compress.latency) and "Lazy" in repr(given["model"]):  # whose first batch shapes it
        given["model"] = copy.deepcopy(MODELS[0])
    if function in (results.break_even, results.plot_cost_sparsity):
        typed = {"rows": argument("costs", chance), "batch_size": chance.choice((1, 3, 8))}
        given |= {name: typed[name] for name in typed.keys() & given.keys()}
    if "batches" in given and chance.random() < 0.7:
        given["model"] = copy.deepcopy(MODELS[0])
    if function is compress.latency:
        given["min_run_time"] = 0.001
    if function is data.load:  # no downloads; a device is torch's to refuse; anything is true or false enough
        given |= {"device": "cpu", "holdout": True}
    return given


def frozen(value: Any) -> Any:
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


@pytest.mark.filterwarnings("ignore")
@settings(FUZZ, max_examples=4500)
@given(SEEDS)
def test_public_functions_raise_what_they_document_and_change_nothing(tmp_path_factory, seed):
    chance = random.Random(seed)
    (function,) = chance.choices(FUNCTIONS, WEIGHTS)
    given = arguments(function, chance, tmp_path_factory.getbasetemp())
    note(f"{function.__qualname__}(**{given})")
    before = frozen(given)
    try:
        function(**given)
    except Exception as error:
        assert {kind.__name__ for kind in type(error).__mro__} & DOCUMENTED[function], repr(error)
        assert str(error).strip()
        if function is not train_epoch:  # what a batch has done is done
            assert frozen(given) == before
    else:
        if function not in (prune.apply_masks, train_epoch):  # which are there to change their argument
            assert frozen(given) == before


def test_targets_that_would_be_compared_with_every_image_are_refused():
    images = torch.rand(2, 4)
    for run in (evaluate, train_epoch):
        with pytest.raises(ValueError, match=r"expected 2 targets, one an image, got shape \(2, 1\)"):
            run(NeuralNetwork((4, 3, 2)), [(images, torch.tensor([[0], [1]]))])


# ── the command line ──

FLAGS = [f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__] + ["--epoch", "-x", "--", "--no-costs"]
VALUES = ["0", "-1", "x", "nan", "inf", "1e400", "101", "", " ", "3", "0.5", "mnist", "fc1", "weight:90", "unit:", "ö"]


@settings(FUZZ, max_examples=500)
@given(st.lists(st.sampled_from(FLAGS) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=6))
def test_the_command_line_answers_anything_with_one_line(capsys, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run", lambda config: None)  # what is fuzzed is the reading of it
        try:
            assert train.main(argv) == 0
        except SystemExit as ending:
            assert ending.code == 2 and capsys.readouterr().err.count("\n") == 1
