import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


SHORT = {
    "LEARN, ADAPT = 14, 42": "LEARN, ADAPT = 1, 2",
    "make_patients(360, 3,": "make_patients(60, 3,",
    '"training.stages.0.epochs=6"': '"training.stages.0.epochs=2", "evaluation.robustness.minutes=0.05", "evaluation.attention.cases=6"',
    "PRETRAIN = 40": "PRETRAIN = 2",
    "TUNE = 50": "TUNE = 2",
    "make_patients(240, 5)": "make_patients(60, 5)",
    'name="vit_base_patch16_224"': 'name="vit_small_patch16_224"',
}
"""What takes a notebook long -> what shows no more than that it runs."""


def executed(path: Path, folder: Path, changes: dict[str, str], *further: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in further]
    for cell in notebook.cells:
        for before, after in changes.items():
            cell.source = cell.source.replace(before, after)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    cells = executed(path, tmp_path, SHORT).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


def test_short_epochs_are_those_of_a_notebook():
    sources = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    assert all(any(before in source for source in sources) for before in SHORT)


@pytest.mark.slow
def test_adaptation_shows_what_the_notebook_says(tmp_path):
    (path,) = (path for path in NOTEBOOKS if path.stem.startswith("02"))
    told = executed(path, tmp_path, {}, "import json; print(json.dumps(found))").cells[-1].outputs
    table = json.loads(told[0].text)
    assert table["dann"]["mmd"] < 0.5 * table["supervised"]["mmd"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells)
