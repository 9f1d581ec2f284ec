"""The notebook runs in a clean kernel without a network, and what it has been committed with is what it shows then."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.font_manager  # noqa: F401 - caches its fonts here: a kernel that has to do it says so on stderr
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

PATH = ROOT / "notebooks" / "prune_your_model.ipynb"
OFFLINE = "--IPKernelApp.exec_lines=['import socket', 'socket.getaddrinfo = None']"  # looking up any host fails
FACTS = """
import json

lamp_masks = [find_masks(each, "lamp", 0.9, scope="global") for each in (network, rescaled)]
print(json.dumps({
    "model": accuracy(model),
    "weight": {point.sparsity: (point.achieved, point.score) for point in by_weight},
    "unit": {point.sparsity: point.score for point in by_unit},
    "sizes": small.sizes,
    "shrunk_error": (small(digits.test_images) - pruned_units(digits.test_images)).abs().max().item(),
    "bytes": [stored_bytes(each) for each in (model, small)],
    "network": accuracy(network),
    "swept": {scope: [point[2:] for point in points] for scope, points in swept.items()},
    "held": achieved_sparsity(pruned),
    "lamp_agrees": all(torch.equal(mask, lamp_masks[1][name]) for name, mask in lamp_masks[0].items()),
}))
"""

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def committed() -> NotebookNode:
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def rerun(committed: NotebookNode, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """The notebook, executed anew with a cell of facts at its end; nothing is written."""
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.from_dict, json.loads(json.dumps(committed.cells)))])
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    client = NotebookClient(
        notebook,
        timeout=300,
        extra_arguments=[OFFLINE],
        coalesce_streams=True,
        resources={"metadata": {"path": str(PATH.parent)}},
        # Without any folder to find kernels in, there is only that of this very Python.
        config=Config({"KernelSpecManager": {"kernel_dirs": []}}),
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "PYTHONPATH")}
    environment["IPYTHONDIR"] = str(tmp_path_factory.mktemp("ipython"))  # the settings of whoever runs this stay out
    environment["TORCH_LOGS"] = "-torch.utils.cpp_extension"  # it warns of a CUDA toolkit on a machine without a GPU
    client.execute(env=environment)
    return notebook


@pytest.fixture(scope="module")
def facts(rerun: NotebookNode) -> dict[str, Any]:
    return json.loads(rerun.cells[-1].outputs[0].text)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell: NotebookNode) -> list[str]:
    """What a cell shows, but for numbers and the space around them, which differ between machines."""
    outputs = [each.get("text") or str(sorted(each.get("data", each))) for each in cell.outputs]
    return [re.sub(r"[\d.,\s]+", " ", output) for output in outputs]


def test_runs_without_any_warning(rerun: NotebookNode) -> None:
    assert [
        output.text for cell in code_cells(rerun) for output in cell.outputs if output.get("name") == "stderr"
    ] == []


def test_is_committed_as_it_runs(committed: NotebookNode, rerun: NotebookNode) -> None:
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell, again in zip(cells, code_cells(rerun), strict=False):
        assert cell.outputs, f"shows nothing: {cell.source}"
        assert shown(cell) == shown(again)


def test_file_is_small_and_clean(committed: NotebookNode) -> None:
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert str(ROOT) not in text
    assert str(Path.home()) not in text.replace(str(ROOT), "")
    assert committed.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in committed.cells)


def test_starts_in_the_root_too(committed: NotebookNode) -> None:
    lines = code_cells(committed)[0].source.splitlines()
    plain = "\n".join(line for line in lines if not line.startswith("%"))
    subprocess.run([sys.executable, "-c", plain], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": ""})


def test_first_part(facts: dict[str, Any]) -> None:
    """The curves that the text speaks of: flat, then bent; and a shrunk network that is the same function."""
    weight, unit = facts["weight"], facts["unit"]
    assert facts["model"] > 0.96
    assert all(abs(achieved - float(sparsity)) < 0.001 for sparsity, (achieved, _) in weight.items())
    assert min(weight[sparsity][1] for sparsity in ("0.25", "0.5", "0.7")) > facts["model"] - 0.02
    assert min(weight["0.9"][1], unit["0.5"]) > 0.9
    assert unit["0.9"] < weight["0.9"][1] - 0.1
    assert max(weight["0.99"][1], unit["0.99"]) < 0.8
    assert facts["sizes"] == [784, 500, 500, 250, 100, 10]
    assert facts["shrunk_error"] < 1e-4
    assert facts["bytes"][1] < 0.35 * facts["bytes"][0]


def test_own_network(facts: dict[str, Any]) -> None:
    """Global pruning does better here, fine-tuning helps both, zeros are held, and LAMP doesn't mind the scale."""
    by_layer, overall = facts["swept"]["layer"], facts["swept"]["global"]  # at 60, 80, 90, 95, 98 %
    assert facts["network"] > 0.96
    assert overall[3][0] > by_layer[3][0] + 0.2
    for pruned, tuned in (by_layer[3], overall[3]):
        assert tuned > max(pruned, 0.88)
    assert abs(facts["held"] - 0.95) < 0.001
    assert facts["lamp_agrees"]
