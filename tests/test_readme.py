"""Documentation keeps its word: commands, snippets, links, examples, and numbers that stand in committed files."""

import doctest
import importlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_csv

PAGES = ["README.md", "plots/README.md"]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def tables(page: str) -> list[list[list[str]]]:
    """Every table of a page, as lines of cells; the first line is the head."""
    blocks = re.findall(r"(?:^\|.*\n)+", text(page), re.M)
    return [
        [[cell.strip() for cell in line.strip("| \n").split("|")] for line in block.splitlines() if "---" not in line]
        for block in blocks
    ]


def test_the_readme_is_short_and_names_the_two_commands():
    assert len(text("README.md").split()) <= 1300
    assert "\npip install -r requirements.txt && python src/train.py\n" in text("README.md")
    assert "\npip install -r requirements-dev.txt && python -m pytest -n 2\n" in text("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text(page))
    assert links
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_accuracies_are_means_of_committed_rows(page):
    """Columns such as "dense" or "weights 95", rows that link to their CSV; fine-tuned if their name says so."""
    checked = 0
    for head, *lines in tables(page):
        for name, *cells in lines:
            if not (link := re.search(r"\]\(([^)]+\.csv)\)", name)):
                continue
            rows = read_csv((ROOT / page).parent / link[1])
            for column, cell in zip(head[1:], cells, strict=True):
                if column == "seeds":
                    assert cell == str(len({row.seed for row in rows}))
                elif found := re.fullmatch(r"(?:(weight|unit)s (\S+)|dense)", column):
                    method, k = found[1] or "weight", float(found[2] or 0)
                    point = [row for row in rows if row.method == method and row.k_percent == k]
                    field = "finetuned_percent" if "fine-tun" in name else "accuracy_percent"
                    values = [getattr(row, field) for row in point]
                    spread = f" ± {np.std(values, ddof=1):.2f}" if "±" in cell else ""
                    assert cell.strip("*") == f"{np.mean(values):.2f}{spread}", (name, column)
                    checked += 1
    assert checked >= 16


PASTE = """
import sys
from pathlib import Path

path = [*sys.path]
for number, code in enumerate(sys.argv[1:]):
    sys.path[:] = path  # each finds the modules by itself
    for file in Path("src").glob("*.py"):
        sys.modules.pop(file.stem, None)
    exec(compile(code, f"<snippet {number}>", "exec"), {})
    print(end="\\0")
"""


def test_snippets_run_when_pasted():
    """One after the other, in a process that imports torch once."""
    snippets = re.findall(r"```python\n(.*?)```", text("README.md"), re.S)
    before = {path for path in ROOT.glob("*/*") if ".git" not in path.parts}
    command = [sys.executable, "-W", "error", "-c", PASTE, *snippets]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for made in {path for path in ROOT.glob("*/*") if ".git" not in path.parts} - before:
        if made.is_file():
            made.unlink()
    assert done.returncode == 0, done.stderr
    *outputs, _ = done.stdout.split("\0")
    assert len(outputs) == len(snippets) > 0 and all(outputs)


EXAMPLES = {"compress": 3, "data": 1, "engine": 1, "model": 1, "prune": 11, "utils": 3}  # at least


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "src").glob("*.py")))
def test_examples_in_docstrings_hold(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted >= EXAMPLES.get(name, 0) and not results.failed
