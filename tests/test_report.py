"""What a run leaves for people: the page, its pictures and the table."""

import re

import pytest

from fedunlearn.federation.auditor import Auditor
from fedunlearn.runs import report


@pytest.fixture
def pictures():
    """Drawn, as for users."""


@pytest.fixture
def forgot(federate):
    """A finished run of three rounds, which has forgotten client 3 after the second."""
    federate.shared("forget.schedule={2:[3]}", name="test")
    return federate.run()


@pytest.fixture
def page(forgot):
    """Its report."""
    auditor = Auditor(forgot.config)
    return report.write(forgot, auditor.class_counts(), auditor.class_names).read_text()


def test_page_is_self_contained_and_tells_before_and_after(page):
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/svg+xml;base64,") == 2
    for text in ("before forgetting 3", "after forgetting 3", "after round 3", "COMPLETED", "The audit chain holds"):
        assert text in page
    assert "<code>unlearn.alpha</code></td><td><code>2.0</code>" in page
    assert "<code>train.epochs</code></td><td><code>1</code></td>" in page


def test_without_an_auditor_the_page_does_not_say_who_has_what(forgot):
    text = report.write(forgot, None, []).read_text()
    assert "Who has what" not in text
    assert text.count('<img alt="') == 1


def test_a_changed_ledger_shows(forgot):
    forgot.ledger._db.execute("UPDATE events SET event = replace(event, '[3]', '[2]')")
    assert "is BROKEN: the ledger was changed by hand" in report.write(forgot, None, []).read_text()


def test_summary_has_a_row_a_group_and_moment(federate):
    federate("forget.schedule={1:[3]} evaluate_every=2")
    rows = report.score_rows(federate.run())
    assert [(when, who) for when, who, _ in rows] == [
        (when, who)
        for when in ("before forgetting 3", "after forgetting 3", "after round 3")
        for who in ("client 3", "retain clients", "test")
    ]
    text = report.summary(federate.run())
    assert all(f"{scores['class']:.3f}" in text for _, _, scores in rows)


def test_figures_show_every_group_and_mark_the_request(forgot):
    figure = report.accuracy_figure(forgot.metrics())
    by_class, by_client = figure.axes
    assert [line.get_label() for line in by_class.lines if not line.get_label().startswith("_")] == [
        "retain clients",
        "test",
        "client 3",
    ]
    assert [text.get_text().strip() for text in by_client.texts] == ["forget 3"]
    auditor = Auditor(forgot.config)
    counts = auditor.class_counts()
    assert counts.sum() == 120
    assert report.split_figure(counts, auditor.class_names).axes[0].images[0].get_array().shape == (4, 10)


def test_rows_that_a_crash_cut_short_or_repeated_count_once(forgot):
    with open(forgot.folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "round", "round": 2, "lo')
    forgot.record("round", round=3, loss=1.5)
    rounds = [row for row in forgot.metrics() if row["kind"] == "round"]
    assert [row["round"] for row in rounds] == [1, 2, 3]
    assert rounds[-1]["loss"] == 1.5
