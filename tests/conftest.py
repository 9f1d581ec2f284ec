import csv
import os
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, and for the processes that tests start: threads that wait for each other make small work
# several times slower on a machine that does something else as well.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
MNIST = ROOT / "inputs" / "MNIST" / "raw"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=1, help="how often to kill a run at a random moment (default: 1)")
    parser.addoption("--calls", type=int, default=2000, help="how many calls to fuzz (default: 2000)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("mnist") is None)  # the long ones first, beside all others
    names = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    if all((MNIST / name).is_file() or (MNIST / f"{name}.gz").is_file() for name in names):
        return
    for item in items:
        if item.get_closest_marker("mnist"):
            item.add_marker(pytest.mark.skip(reason=f"the four MNIST files are not in {MNIST}"))


def read_csv(path: Path) -> list[Any]:
    """The rows of an accuracy_sparsity.csv."""
    from utils import Row  # not above: what hands tests out to processes has no need of torch

    types: dict[str, type] = {"seed": int, "method": str, "scope": str, "weights_kept": int}
    with path.open(newline="", encoding="utf-8") as file:
        lines = [*csv.DictReader(file)]
    return [Row(**{key: types.get(key, float)(cell) if cell else None for key, cell in line.items()}) for line in lines]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch

    torch.manual_seed(0)
