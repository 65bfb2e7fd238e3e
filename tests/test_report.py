import re

import pytest

from fedunlearn.runs import report


@pytest.fixture
def pictures():
    """Drawn, as for users."""


def test_page_is_self_contained_and_tells_before_and_after(federate):
    federate("forget.schedule={1:[3]}")
    page = (federate.folder() / "report" / "index.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/svg+xml;base64,") == 2
    for text in ("before forgetting 3", "after forgetting 3", "after round 3", "COMPLETED", "The audit chain holds"):
        assert text in page
    assert "<code>unlearn.alpha</code></td><td><code>2.0</code>" in page


def test_summary_has_a_row_a_group_and_moment(federate):
    federate("forget.schedule={1:[3]} evaluate_every=2")
    rows = report.score_rows(federate.run())
    assert [(when, who) for when, who, _ in rows] == [
        (when, who)
        for when in ("before forgetting 3", "after forgetting 3", "after round 3")
        for who in ("client 3", "others", "test")
    ]
    text = report.summary(federate.run())
    assert all(f"{scores['class']:.3f}" in text for _, _, scores in rows)


def test_figures_show_every_group_and_mark_the_request(federate):
    federate("forget.schedule={1:[3]}")
    figure = report.accuracy_figure(federate.run().metrics())
    by_class, by_client = figure.axes
    assert [line.get_label() for line in by_class.lines if not line.get_label().startswith("_")] == [
        "others",
        "test",
        "client 3",
    ]
    assert [text.get_text().strip() for text in by_client.texts] == ["forget 3"]
    worker = federate.worker()
    counts = report.class_counts(worker.dataset, worker.slices)
    assert counts.sum() == len(worker.dataset.train.labels)
    assert report.split_figure(counts, worker.dataset.class_names).axes[0].images[0].get_array().shape == (4, 10)


def test_rows_that_a_crash_cut_short_or_repeated_count_once(federate):
    federate()
    run = federate.run()
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "round", "round": 2, "lo')
    run.record("round", round=3, loss=1.5)
    assert [row["round"] for row in run.metrics()] == [1, 2, 3]
    assert run.metrics()[-1]["loss"] == 1.5
