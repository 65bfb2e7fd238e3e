"""The report of the paper's study: tables as CSV and LaTeX, pictures, an HTML page and a Markdown file."""

import base64
import csv
import io
from importlib.resources import files
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from fedunlearn.config import settings
from fedunlearn.runs.files import write_atomically
from fedunlearn.runs.formats import duration
from fedunlearn.study.pooled.figures import all_figures
from fedunlearn.study.pooled.plan import Plan
from fedunlearn.study.pooled.tables import Cell, Row, Table, all_tables, heading, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSV_COLUMNS = (
    "row", "column", "ours", "sd", "seeds", "retrained", "deviation", "paper", "difference", "paper_deviation", "note"
)  # fmt: skip

NOTES = {"stage": "fine-tuning better? (epochs)", "ablation": "later"}


def write(plan: Plan, root: Path) -> Path:
    """Write the study's `report/` from what has been measured so far; returns the path of `index.html`."""
    folder, tables, figures = root / "report", all_tables(plan, root), all_figures(plan, root)
    for table in tables:
        write_atomically(folder / "tables" / f"{table.name}.csv", as_csv(table).encode())
        write_atomically(folder / "tables" / f"{table.name}.tex", as_latex(table).encode())
    drawn = {name: svg(figure) for name, (_, figure) in figures.items()}
    for name, content in drawn.items():
        write_atomically(folder / "figures" / f"{name}.svg", content)
    words = {
        "title": f"{plan.settings.dataset}, {plan.settings.scale} scale",
        "about": about(plan, root),
        "paper_data": "CIFAR-100" if plan.settings.dataset == "cifar100" else "CIFAR-10",
        "tables": [view(table) for table in tables],
        "settings": [
            (name, _shown(name, value), declared.description) for name, declared, value in settings(plan.settings)
        ],
    }
    pages = {
        "index.html": {name: (caption, _embedded(drawn[name])) for name, (caption, _) in figures.items()},
        "REPORT.md": {name: (caption, f"figures/{name}.svg") for name, (caption, _) in figures.items()},
    }
    for name, pictures in pages.items():
        template = files("fedunlearn.study.pooled").joinpath(f"{name}.jinja").read_text()
        environment = Environment(autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(template).render(figures=pictures, **words)
        write_atomically(folder / name, page.encode())
    return folder / "index.html"


def about(plan: Plan, root: Path) -> dict[str, Any]:
    """Say how much of the study is there, what it took, and on which machine."""
    everything = plan.tasks()
    done = [task for task in everything if task.is_done(root)]
    results = [task.result(root) for task in done]
    return {
        "done": len(done),
        "tasks": len(everything),
        "seeds": len(plan.settings.study.seeds),
        "images": plan.images,
        "model": plan.settings.model.title,
        "epochs": plan.settings.learning.epochs,
        "hours": duration(sum(result["seconds"] for result in results)),
        "machines": sorted({result["machine"] for result in results}),
        "speed": _speed(plan, root),
    }


def view(table: Table) -> dict[str, Any]:
    """Write a table as words.

    Every cell is ours, the paper's, the difference, the retrained model's, and the deviations from that.
    """
    measured = any(cell.ours for row in table.rows for cell in row.cells)
    return {
        "title": f"Table {table.number}" if table.number else "Not in the paper's tables",
        "caption": table.caption,
        "here": table.here,
        "measured": measured,
        "columns": [heading(column) for column in table.columns],
        "rows": [_lines(table, row) for row in table.rows],
        "notes": NOTES.get(table.kind, "") if any(row.note or row.paper_note for row in table.rows) else "",
    }


def as_csv(table: Table) -> str:
    """Write one line a number."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            values = [
                cell.mean, cell.sd, len(cell.ours), cell.retrained_mean, cell.deviation, cell.paper,
                cell.mean - cell.paper, cell.paper_deviation,
            ]  # fmt: skip
            words = ["" if isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([row.name, column, *words, row.note])
    return buffer.getvalue()


def as_latex(table: Table) -> str:
    """Write a `tabular` in the paper's layout: ours, the deviation from the retrained model, the paper's below."""
    lines = [
        f"% Table {table.number}: {table.caption}" if table.number else f"% {table.caption}",
        rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}",
        r"\hline",
        " & ".join(["", *(heading(column).replace("%", r"\%") for column in table.columns)]) + r" \\",
        r"\hline",
    ]
    for row in table.rows:
        ours = [_latex(cell, column) for column, cell in zip(table.columns, row.cells, strict=True)]
        theirs = [number(cell.paper, column) for column, cell in zip(table.columns, row.cells, strict=True)]
        lines.append(" & ".join([row.name, *ours]) + r" \\")
        lines.append(" & ".join([r"\quad paper", *theirs]).replace("–", "--") + r" \\")
    return "\n".join([*lines, r"\hline", r"\end{tabular}", ""])


def _latex(cell: Cell, column: str) -> str:
    text = number(cell.mean, column)
    text += "" if isnan(cell.sd) else rf" $\pm$ {number(cell.sd, column)}"
    text += "" if isnan(cell.deviation) else f" ({number(cell.deviation, column)})"
    return text.replace("–", "--")


def _lines(table: Table, row: Row) -> dict[str, Any]:
    cells = list(zip(table.columns, row.cells, strict=True))
    lines = [
        ("ours", [_with_sd(cell, column) for column, cell in cells], row.note),
        ("paper", [number(cell.paper, column) for column, cell in cells], row.paper_note),
        ("ours − paper", [_signed(cell.mean - cell.paper, column) for column, cell in cells], ""),
        ("our retrained", [number(cell.retrained_mean, column) for column, cell in cells], ""),
        ("|ours − retrained|", [number(cell.deviation, column) for column, cell in cells], ""),
        ("|paper − retrained|", [number(cell.paper_deviation, column) for column, cell in cells], ""),
    ]
    shown = [line for i, line in enumerate(lines) if i == 0 or any(value != "–" for value in line[1])]
    return {"name": row.name, "lines": shown}


def _with_sd(cell: Cell, column: str) -> str:
    return number(cell.mean, column) + ("" if isnan(cell.sd) else f" ± {number(cell.sd, column)}")


def _signed(value: float, column: str) -> str:
    sign = "+" if value >= 0 else "−"
    return "–" if isnan(value) else f"{sign}{number(abs(value), column)}"


def _speed(plan: Plan, root: Path) -> str:
    """Say how many images a second were trained on, over all trainings that are there."""
    speeds = []
    for task in plan.training() + plan.retraining():
        if task.is_done(root):
            history = task.result(root)["history"]
            images = len(history) * (plan.images - plan.owned(task.settings["forgotten"]))
            speeds.append(images / sum(row[-1] for row in history))
    return f"{min(speeds):,.0f} to {max(speeds):,.0f}" if speeds else "an unknown number of"


def _shown(name: str, value: Any) -> Any:
    """Show a value; where files lie on a machine is nobody else's business."""
    return Path(value).name if name in ("data.root", "study.home", "study.clip") else value


def svg(figure: "Figure") -> bytes:
    """Write a picture as SVG; the same bytes for the same picture."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "fedunlearn"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _embedded(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
