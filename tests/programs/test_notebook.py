"""notebooks/walkthrough.ipynb: it runs from top to bottom, and what is committed is what it printed."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.runs import write_text

PATH = ROOT / "notebooks" / "walkthrough.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
STEPS = ["bigram", "one head", "four heads", "MLP", "residuals", "LayerNorm", "four layers", "dropout"]


def text_outputs(notebook: dict) -> str:
    """All that the code cells printed."""
    outputs = [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]
    return "".join("".join(output.get("text", "")) for output in outputs)


def table(notebook: dict) -> dict[str, float]:
    """The last table of the notebook: the losses by the names of the steps."""
    rows = text_outputs(notebook).split("   loss    change\n")[1]
    return {name: float(loss) for loss, name in re.findall(r"^ *(\d\.\d{4}) +(?:[+-]\d\.\d{4})? +(.+)$", rows, re.M)}


def test_committed_outputs_are_of_one_run_without_errors() -> None:
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name") != "stderr", output
    assert "shakespeare_char: 1,003,854 characters" in text_outputs(NOTEBOOK)
    assert PATH.stat().st_size < 200_000


def test_committed_losses_fall_at_each_step_or_the_text_says_why_not() -> None:
    losses = table(NOTEBOOK)
    assert list(losses)[: len(STEPS)] == STEPS
    for before, after in pairwise(STEPS[:-1]):
        assert losses[after] < losses[before], f"{after} bought nothing"
    assert losses["dropout"] > losses["four layers"]
    prose = "".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")
    assert "dropout is only noise, and **the loss rises**" in prose
    assert losses["20,000 characters, with dropout"] < losses["20,000 characters, without dropout"]
    assert f"{losses['bigram']:.2f} nats per character" in prose
    assert abs(losses["four layers"] - 2.0) < 0.05, "the text says about 2.0"


def test_it_runs_from_top_to_bottom(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    why = "the notebook runs only where nbclient and ipykernel are installed"
    nbformat = pytest.importorskip("nbformat", reason=why)
    nbclient = pytest.importorskip("nbclient", reason=why)
    pytest.importorskip("ipykernel", reason=why)
    monkeypatch.setenv("WALKTHROUGH_STEPS", "3")
    monkeypatch.setenv("WALKTHROUGH_DATA", str(write_text(tmp_path, 30_000)))
    notebook = nbformat.read(PATH, as_version=4)
    resources = {"metadata": {"path": str(PATH.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    losses = table(notebook)
    assert list(losses)[: len(STEPS)] == STEPS
    assert all(0 < loss < 10 for loss in losses.values())
