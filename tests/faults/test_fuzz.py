"""Thousands of calls with arguments of every wrong kind: documented exceptions alone, and nothing changed after one."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import compress
import data
import prune
import train
from config import Config
from model import NeuralNetwork

SCALARS = [None, True, 0, 1, -1, 3, 10**30, 0.0, 0.5, 1.0, 80, -0.5, float("nan"), float("inf"), "", "weight", "unit"]
OTHERS = [
    "layer",
    "global",
    "random_unit",
    "fc1",
    "0",
    "fc9",
    b"x",
    (),
    ("fc1",),
    ["0"],
    [0.5, 0],
    {},
    {"a": 1},
    print,
    object,
]


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


FUNCTIONS: list[Callable[..., Any]] = [
    prune.weight_mask, prune.unit_mask, prune.find_masks, prune.apply_masks, prune.prune_model,
    prune.achieved_sparsity, prune.sweep, compress.shrink, compress.to_sparse, compress.stored_bytes,
    compress.save_compressed, compress.load_compressed, NeuralNetwork, NeuralNetwork.from_state_dict, data.Batches,
    data.load,
]  # fmt: skip
PARAMETERS = {function: list(inspect.signature(function).parameters.values()) for function in FUNCTIONS}


EVERYTHING = [*SCALARS, *OTHERS, *TENSORS, *MODELS, *MASKS]


def likely(draw: st.DrawFn, name: str) -> Any:
    """An argument that is of the right kind more often than not, so that the calls get past the first check."""
    pools: dict[str, list[Any]] = {"model": MODELS, "weight": TENSORS, "masks": MASKS}
    pool = pools[name] if name in pools and draw(st.integers(0, 3)) else EVERYTHING
    if name == "score":
        pool = [lambda model: 1.0, lambda model: None, 3]
    if name in ("sparsity", "sparsities") and draw(st.booleans()):
        pool = [0.0, 0.3, 1.0] if name == "sparsity" else [[0.0, 0.5], [1.0], []]
    if name == "method" and draw(st.booleans()):
        pool = list(prune.METHODS)
    return copy.deepcopy(pool[draw(st.integers(0, len(pool) - 1))])


def frozen(value: Any) -> Any:
    """Something that can be compared with what it is made of later."""
    if isinstance(value, nn.Module):
        return [(name, frozen(tensor)) for name, tensor in value.state_dict().items()], [
            type(m) for m in value.modules()
        ]
    if isinstance(value, torch.Tensor):
        if isinstance(value, nn.UninitializedParameter) or value.is_meta:
            return type(value)
        return (value.to_dense() if value.is_sparse else value).detach().clone().nan_to_num(nan=7).tolist(), value.dtype
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return copy.copy(value)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=4500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_public_functions_raise_what_they_document_and_change_nothing(tmp_path_factory, draws):
    function = draws.draw(st.sampled_from(FUNCTIONS))
    arguments = {
        parameter.name: draws.draw(st.composite(likely)(parameter.name), label=parameter.name)
        for parameter in PARAMETERS[function]
        if parameter.default is parameter.empty or draws.draw(st.integers(0, 3)) == 0
    }
    if "path" in arguments and isinstance(arguments["path"], str):
        arguments["path"] = tmp_path_factory.getbasetemp() / arguments["path"]
    if "inputs" in arguments:
        # No downloads; a device is torch's to refuse; anything is true or false enough for Python.
        arguments |= {"dataset": "digits", "device": "cpu", "holdout": True}
    before = frozen(arguments)
    try:
        function(**arguments)
    except (ValueError, TypeError, OSError, data.DataError) as error:
        assert str(error).strip()
        assert frozen(arguments) == before
    else:
        if function is not prune.apply_masks:  # the one that is there to change its argument
            assert frozen(arguments) == before


FLAGS = [f"--{name.replace('_', '-')}" for name in Config.__dataclass_fields__] + ["--epoch", "-x", "--", "--no-costs"]
VALUES = ["0", "-1", "x", "nan", "inf", "1e400", "101", "", " ", "3", "0.5", "mnist", "fc1", "weight:90", "unit:", "ö"]


@settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(FLAGS) | st.sampled_from(VALUES) | st.text(max_size=5), max_size=6))
def test_the_command_line_answers_anything_with_one_line(capsys, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "run", lambda config: None)  # what is fuzzed is the reading of it
        try:
            assert train.main(argv) == 0
        except SystemExit as ending:
            assert ending.code == 2 and capsys.readouterr().err.count("\n") == 1
