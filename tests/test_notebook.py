"""The notebook runs in a clean kernel without a network, and what it was committed with is what it shows then."""

import copy
import json
import os
import re
import subprocess
import sys

import matplotlib.font_manager  # noqa: F401 - caches its fonts here: a kernel that has to do it says so on stderr
import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from traitlets.config import Config

PATH = ROOT / "notebooks" / "prune_your_model.ipynb"
FIGURES = 5
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
    "bytes": [stored_bytes(candidate) for candidate in (model, small, network, cut)],
    "spared": spared,
    "only": achieved_sparsity(pruned_transformer, only=only),
    "network": accuracy(network),
    "swept": {scope: {point.sparsity: point[2:] for point in points} for scope, points in swept.items()},
    "held": achieved_sparsity(pruned),
    "normed": accuracy(normed),
    "recalibrated": {
        f"{method} {scope}": sweep(normed, method, [sparsity], accuracy, scope=scope, retrain=take_statistics)[0][2:]
        for method, sparsity, scope in (("unit", 0.5, "layer"), ("weight", 0.75, "layer"), ("weight", 0.75, "global"))
    },
    "cut": accuracy(cut),
    "channels": [layer.out_channels for layer in cut if isinstance(layer, nn.Conv2d)],
    "lamp_agrees": all(torch.equal(mask, lamp_masks[1][name]) for name, mask in lamp_masks[0].items()),
}))
"""

# Jupyter's packages are not always up to date with Python and with each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(asyncio|jupyter|nbclient|nbformat|traitlets|zmq)")


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(PATH, as_version=4)


@pytest.fixture(scope="module")
def rerun(committed, tmp_path_factory):
    """The notebook, executed anew with a cell of facts at its end; its file stays as it is."""
    notebook = copy.deepcopy(committed)
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    client = NotebookClient(
        notebook,
        timeout=300,
        extra_arguments=[OFFLINE],
        coalesce_streams=True,
        resources={"metadata": {"path": str(PATH.parent)}},
        config=Config({"KernelSpecManager": {"kernel_dirs": []}}),  # with none registered, this very Python is taken
    )
    own = {
        "IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")),  # the user's own settings stay out
        "CUDA_HOME": str(ROOT),  # as if a CUDA toolkit were there: without a GPU, torch warns of that
    }
    client.execute(env=os.environ | own)
    return notebook


@pytest.fixture(scope="module")
def facts(rerun):
    return json.loads(rerun.cells[-1].outputs[0].text)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell shows, but for numbers and the space around them, which differ between machines."""
    outputs = [each.get("text") or str(sorted(each.get("data", each))) for each in cell.outputs]
    return [re.sub(r"[\d.,\s]+", " ", output) for output in outputs]


def test_runs_without_a_warning(rerun):
    outputs = [output for cell in code_cells(rerun) for output in cell.outputs]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_is_committed_as_it_runs(committed, rerun):
    cells = code_cells(committed)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell, again in zip(cells, code_cells(rerun)[:-1], strict=True):
        assert cell.outputs, f"nothing is shown by\n{cell.source}"
        assert shown(cell) == shown(again)
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == FIGURES


def test_file_is_small_and_clean(committed):
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 400_000
    assert str(ROOT) not in text
    assert committed.metadata.kernelspec.name == "python3"
    assert not any(cell.metadata for cell in committed.cells)


def test_starts_in_the_root_as_well(committed):
    lines = code_cells(committed)[0].source.splitlines()
    plain = "\n".join(line for line in lines if not line.startswith("%"))
    subprocess.run([sys.executable, "-E", "-c", plain], cwd=ROOT, check=True)


def test_numbers_of_the_first_network(facts):
    weight, unit = facts["weight"], facts["unit"]
    assert facts["model"] > 0.96
    assert all(abs(achieved - float(sparsity)) < 0.001 for sparsity, (achieved, _) in weight.items())
    assert weight["0.7"][1] > facts["model"] - 0.02
    assert min(weight["0.9"][1], unit["0.5"]) > 0.9
    assert unit["0.9"] < weight["0.9"][1] - 0.1
    assert max(weight["0.99"][1], unit["0.99"]) < 0.8
    assert facts["sizes"] == [784, 500, 500, 250, 100, 10]
    assert facts["shrunk_error"] < 1e-4
    assert facts["bytes"][1] < 0.35 * facts["bytes"][0]


def test_numbers_of_other_models(facts):
    assert facts["spared"] == ["conv1.weight", *(f"layer{n}.0.downsample.0.weight" for n in (2, 3, 4)), "fc.weight"]
    assert abs(facts["only"] - 0.95) < 0.001


def test_numbers_of_the_own_network(facts):
    by_layer, overall = (facts["swept"][scope]["0.95"] for scope in ("layer", "global"))  # pruned, then fine-tuned
    assert facts["network"] > 0.96
    assert overall[0] > by_layer[0] + 0.2
    assert by_layer[1] > max(by_layer[0] + 0.2, 0.8)
    assert overall[1] > max(overall[0], 0.92)
    assert abs(facts["held"] - 0.95) < 0.001
    assert facts["lamp_agrees"]


def test_numbers_with_batchnorm(facts):
    units, by_layer, overall = (facts["recalibrated"][name] for name in ("unit layer", "weight layer", "weight global"))
    assert facts["normed"] > 0.96
    assert units[1] > units[0] + 0.2
    assert by_layer[1] > by_layer[0] + 0.1
    assert overall[0] > by_layer[0] + 0.2
    assert overall[1] > max(by_layer[1] + 0.05, 0.94)


def test_numbers_of_the_network_that_is_cut(facts):
    assert facts["channels"] == [8, 16, 32]
    assert facts["bytes"][3] < 0.5 * facts["bytes"][2]
    assert facts["cut"] > 0.94
