"""The notebook runs from its first cell to its last, as plain Python."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "train_forget_plot.ipynb"


@pytest.mark.slow
def test_the_notebook_trains_forgets_and_plots(home, monkeypatch):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gca()))
    cells = [
        "".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert sum(bool(line.strip()) for cell in cells for line in cell.splitlines()) <= 12
    words, names = '"rounds=12"', {}
    assert words in cells[0]
    cells[0] = cells[0].replace(words, f'{words}, "data.limit=300"')
    for cell in cells:
        exec(cell, names)
    (axes,) = shown
    test, client = axes.get_lines()
    assert [*test.get_xdata()] == [*client.get_xdata()] == [*range(1, 13)]
    assert names["rows"][-1]["forgotten"]["3"]["class"] == client.get_ydata()[-1]
    plt.close("all")
