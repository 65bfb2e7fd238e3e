"""What a run leaves for people: the verdict, the page, its pictures and the table."""

import base64
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from fedunlearn.apps.asking import images_of
from fedunlearn.apps.scale import figure as scaling_figure
from fedunlearn.errors import UserError
from fedunlearn.federation.auditor import Auditor
from fedunlearn.federation.strategy import strategy_class
from fedunlearn.naming import named
from fedunlearn.runs import page as pages
from fedunlearn.runs import report
from fedunlearn.runs.figures import Mark, shortened
from fedunlearn.runs.ledger import Request, State
from fedunlearn.runs.uncertainty import Estimate, fraction, held_out, memorisation_gap
from fedunlearn.runs.verdicts import Level, beside_retrained, verdicts

NASTY = [r"$\frac$", "$x_1$", "caf\udce9", "a\x01b\nc", "<b>&amp;</b>", "犬", "100 %", "{}", "\\", "a name " * 20]


@pytest.fixture
def pictures():
    """Drawn, as for users."""


@pytest.fixture
def forgot(federate):
    """A finished run of three rounds, which has forgotten client 3 after the second."""
    federate.shared("forget.schedule={2:[3]}", name="test")
    return federate.run()


def written(run, **options):
    auditor = Auditor(run.config)
    return report.write(run, auditor.class_counts(), auditor.class_names, **options).read_text()


def words(page):
    """What a reader sees of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]))


# Verdicts ---------------------------------------------------------------------------------------------------------


def scores(gaps, *, held_out=0.8, test=1000):
    """Scores of a model that knows the clients' 100 images better by so much than held-out images, one a client."""
    forgotten = {
        str(client): {"class": held_out + gap, "client_id": 0.0, "examples": 100, "held_out": held_out}
        for client, gap in gaps.items()
    }
    groups = {"retain": {"class": 0.9, "client_id": 0.5, "examples": 900}, "test": {"class": 0.8, "examples": test}}
    return {"forgotten": forgotten, "retain_clients": {}} | groups


def completed(before, after, *, state=State.COMPLETED, clients=(3,), **detail):
    """A request that was applied after round 20; its scores, by client, before and after."""
    detail = {"round": 20, "completes_at": 22, "seconds": 6.81, "before": scores(before), **detail}
    if after is not None:
        detail |= {"completed_round": 20, "after": scores(after)}
    return Request("r1", list(clients), state, "2026-11-28T07:05:53.715+00:00", detail)


def later(gaps, round_=30):
    return {"kind": "round", "round": round_, **scores(gaps)}


def verdict(request, rows=(), **options):
    (one,) = verdicts([request], list(rows), label="relabelling", **options)
    return one


# of 100 images at 0.8 and 1,000 held-out ones at 0.8: sqrt(0.16/100 + 0.16/1000) = 0.042
def test_a_client_is_forgotten_where_the_gap_is_within_two_standard_errors():
    said = verdict(completed({3: 0.15}, {3: 0.01}))
    assert (said.level, said.title, said.request) == (Level.GOOD, "Forgotten", "r1")
    assert said.text == (
        "The request to forget client 3 was applied after round 20 by relabelling, in 6.8 s. The model knows its "
        "100 images no better than held-out ones: memorisation gap +0.01 ± 0.04 (before: +0.15 ± 0.03)."
    )


def test_a_client_that_is_still_known_better_is_not_called_forgotten():
    said = verdict(completed({3: 0.15}, {3: 0.12}))
    assert (said.level, said.title) == (Level.WARNING, "Not forgotten")
    assert "still knows its 100 images better than held-out ones: memorisation gap +0.12 ± 0.03" in said.text
    assert "forgotten" not in said.text


def test_forgetting_too_much_is_told():
    said = verdict(completed({3: 0.15}, {3: -0.3}))
    assert said.level == Level.WARNING
    assert "gets fewer of its 100 images right than of held-out ones: memorisation gap −0.30 ± 0.05" in said.text
    assert "A model that never saw them has a gap near 0." in said.text


def test_a_client_that_comes_back_in_later_rounds_is_not_called_forgotten():
    request = completed({3: 0.15}, {3: 0.01})
    said = verdict(request, [later({3: 0.02}, 25), later({3: 0.15}, 30)])
    assert said.level == Level.WARNING
    assert "But after round 30 the model knows its 100 images better than held-out ones again" in said.text
    assert "memorisation gap +0.15 ± 0.03 (before: +0.15 ± 0.03; after: +0.01 ± 0.04)" in said.text
    assert verdict(request, [later({3: 0.15}, 25), later({3: 0.02}, 30)]).level == Level.GOOD


def test_rounds_before_the_request_say_nothing_of_it():
    request = completed({3: 0.15}, {3: 0.01})
    assert verdict(request, [later({}, 20), later({}, 10)]) == verdict(request)


@pytest.mark.parametrize(
    ("retrained", "title", "level"),
    [
        (0.0, "Like the retrained model", Level.GOOD),
        (-0.2, "Knows more", Level.WARNING),
        (0.15, "Forgets too much", Level.WARNING),
    ],
)
def test_beside_the_retrained_model_a_client_is_known_as_well_or_better_or_less(retrained, title, level):
    request = completed({3: 0.15}, {3: 0.0})
    said = beside_retrained(request, [later({3: 0.0})], [later({3: retrained}, 20), later({3: retrained}, 30)])
    assert (said.title, said.level) == (title, level)
    assert f"After round 30 a model that was retrained without client 3 gets {0.8 + retrained:.2f}" in said.text


@pytest.mark.parametrize(
    ("retrained", "title"),
    [
        ([0.0], "Knows more"),
        ([-0.02, 0.02], "Knows more"),
        ([-0.15, 0.15], "Like the retrained model"),  # they differ by more than this one does from them
        ([0.3, 0.32], "Forgets too much"),
    ],
)
def test_beside_several_retrained_models_one_more_of_them_could_be_this_one(retrained, title):
    request = completed({3: 0.15}, {3: 0.15})
    said = beside_retrained(request, [later({3: 0.15})], *([later({3: gap})] for gap in retrained))
    assert said.title == title
    mean = 0.8 + sum(retrained) / len(retrained)
    assert f"retrained without client 3 get{'s' * (len(retrained) == 1)} {mean:.2f} ± " in said.text


def test_beside_the_retrained_model_a_destroyed_one_is_no_success():
    destroyed = later({3: 0.0})
    destroyed["test"] = {"class": 0.3, "examples": 1000}
    said = beside_retrained(completed({3: 0.15}, {3: 0.0}), [destroyed], [later({3: 0.0})])
    assert (said.title, said.level) == ("Forgotten, at a price", Level.WARNING)


def test_a_request_after_the_last_round_is_compared_with_the_retrained_model_of_that_round():
    request = completed({3: 0.15}, {3: 0.0})  # completed after round 20, in which it was applied
    said = beside_retrained(request, [later({}, 20)], [later({3: 0.0}, 20)])
    assert "After round 20" in said.text
    assert said.level == Level.GOOD


def test_models_that_were_never_measured_after_the_same_round_are_not_compared():
    request = completed({3: 0.15}, {3: 0.0})
    assert beside_retrained(request, [later({3: 0.0}, 30)], [later({3: 0.0}, 25)]) is None
    assert beside_retrained(request, [later({}, 30)], [later({}, 30)]) is None  # nobody has looked at its images


def test_forgetting_that_harms_the_model_has_its_price_told():
    request = completed({3: 0.15}, {3: 0.01})
    request.detail["after"]["test"]["class"] = 0.7
    said = verdict(request)
    assert (said.level, said.title) == (Level.WARNING, "Forgotten, at a price")
    assert "It has a price: the model gets 0.70 ± 0.01 of the test images right (before: 0.80 ± 0.01)." in said.text
    request.detail["after"]["test"]["class"] = 0.78
    assert verdict(request).level == Level.GOOD


def test_where_nothing_was_memorised_before_the_verdict_says_so():
    said = verdict(completed({3: 0.05}, {3: 0.01}))
    assert said.title == "No trace found"
    assert said.text.endswith("It did not know them better before, so that this says little of relabelling.")
    assert "says little" not in verdict(completed({3: 0.15}, {3: 0.01})).text


def test_few_images_hide_a_gap():
    request = completed({3: 0.2}, {3: 0.01})
    for moment in ("before", "after"):
        request.detail[moment]["forgotten"]["3"]["examples"] = 40
    said = verdict(request)
    assert said.title == "No trace found"
    assert "With so few images a gap below 0.13 cannot be seen." in said.text


def test_several_clients_are_judged_together_and_the_one_that_is_still_known_is_named():
    said = verdict(completed({1: 0.15, 2: 0.15}, {1: 0.01, 2: -0.01}, clients=(1, 2)))
    assert said.level == Level.GOOD
    assert "forget clients 1 and 2 was applied" in said.text
    assert "their 200 images no better" in said.text
    said = verdict(completed({1: 0.15, 2: 0.15}, {1: 0.14, 2: -0.12}, clients=(1, 2)))
    assert said.level == Level.WARNING
    assert "But client 1 alone is still known better: +0.14 ± 0.03." in said.text


def test_without_an_auditor_the_gap_is_unknown():
    said = verdict(completed({}, {}))
    assert (said.level, said.title) == (Level.PLAIN, "Applied")
    assert said.text.endswith("What the model still knows of its images was not measured.")
    assert "memorisation gap" not in said.text


def test_a_client_without_images_has_no_gap():
    request = completed({3: 0.1}, {3: 0.1})
    request.detail["after"]["forgotten"]["3"] |= {"examples": 0, "held_out": float("nan")}
    assert "was not measured" in verdict(request).text


@pytest.mark.parametrize(
    ("state", "detail", "level", "says"),
    [
        (State.RECEIVED, {}, Level.OPEN, "The request to forget client 3 waits for the end of a round."),
        (State.COLLECTING, {}, Level.OPEN, "is at work, by relabelling. It trains no more."),
        (State.COLLECTING, {"attempts": 2, "reason": "no answer"}, Level.OPEN, "2 attempts without success so far: no"),
        (State.REFUSED, {"reason": "no client would be left"}, Level.FAILED, "was refused: no client would be left."),
        (State.QUARANTINED, {"attempts": 3, "reason": "late"}, Level.FAILED, "set aside after 3 attempts: late. "),
        (State.QUARANTINED, {"attempts": 1, "reason": "x"}, Level.FAILED, "Its client stays out of training, but the"),
        ("CANCELLED", {"reason": "a mistake"}, Level.PLAIN, "request to forget client 3 is cancelled: a mistake."),
        ("ASTRAY", {}, Level.PLAIN, "The request to forget client 3 is astray."),
    ],
)  # fmt: skip
def test_every_state_has_its_words(state, detail, level, says):
    said = verdict(Request("r1", [3], state, "2026-11-28T07:05:53+00:00", detail))
    assert said.level == level
    assert says in said.text
    assert said.title


@pytest.mark.parametrize("state", [State.APPLIED, State.RECOVERING])
def test_an_applied_request_says_when_it_is_completed(state):
    said = verdict(completed({3: 0.15}, None, state=state))
    assert said.level == Level.OPEN
    assert said.text.endswith("It is completed after round 22.")
    said = verdict(completed({3: 0.15}, None, state=state), [later({3: 0.01}, 21)])
    assert "After round 21 the model knows its 100 images no better" in said.text
    assert said.level == Level.OPEN


def test_a_failed_request_names_a_later_one_of_its_clients():
    failed = Request("r1", [3], State.QUARANTINED, "", {"attempts": 3, "reason": "no answer"})
    again = Request("r2", [3, 4], State.RECEIVED, "", {})
    first, _ = verdicts([failed, again], [], label="ssd")
    assert first.text.endswith("Request r2, which came later, covers it too.")
    first, _ = verdicts([failed, Request("r2", [3, 4], State.CANCELLED, "", {})], [], label="ssd")
    assert "covers it" not in first.text


def test_a_request_of_another_strategy_is_called_by_that_ones_name():
    own = Request("r1", [3], State.COLLECTING, "", {"how": {"strategy": "negate"}})
    (said,) = verdicts([own], [], label="ssd")
    assert "at work, by negate." in said.text


def test_without_a_request_the_verdict_is_of_the_test_images():
    (said,) = verdicts([], [later({}, 12)], label="ssd")
    assert said.text == (
        "No client asked to be forgotten. After round 12 the model gets 0.80 ± 0.01 of the 1,000 test images right."
    )
    (said,) = verdicts([], [], label="ssd")
    assert "nothing has been measured yet" in said.text


def test_many_clients_are_not_all_named():
    assert named([7]) == "client 7"
    assert named([1, 2, 3, 4, 5]) == "clients 1, 2, 3, 4 and 5"
    assert named(range(9), capital=True) == "Clients 0, 1, 2, 3 and 5 more"


# Standard errors --------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_fraction_is_that_of_repeated_draws():
    assert fraction(0.8, 100).error == pytest.approx(0.04)
    draws = np.random.default_rng(0).binomial(100, 0.8, size=20_000) / 100
    assert fraction(0.8, 100).error == pytest.approx(draws.std(), rel=0.02)
    assert 0 < fraction(1.0, 100).error < 0.01  # all right is not certainty
    assert fraction(1.0, 100).error == pytest.approx(fraction(0.0, 100).error)


def test_held_out_images_of_few_classes_say_less():
    even, one = np.full(10, 30), np.eye(10)[0] * 300
    assert held_out(0.8, 1000, even).error == pytest.approx(held_out(0.8, 1000, None).error)
    assert held_out(0.8, 1000, one).error == pytest.approx(fraction(0.8, 100).error)
    # the naive way: 100 images of each class, the mean of each weighed by the client's counts
    counts, rng = np.arange(10), np.random.default_rng(1)
    by_class = rng.binomial(100, 0.8, size=(20_000, 10)) / 100
    spread = (by_class @ (counts / counts.sum())).std()
    assert held_out(0.8, 1000, counts).error == pytest.approx(spread, rel=0.02)


def test_the_gap_of_several_clients_is_that_of_all_their_images():
    together = {
        "1": {"class": 0.9, "held_out": 0.8, "examples": 300},
        "2": {"class": 0.5, "held_out": 0.6, "examples": 100},
    }
    gap = memorisation_gap(together, 1000)
    assert gap.value == pytest.approx(0.8 - 0.75)
    own = ((0.75**2) * 0.09 / 300 + (0.25**2) * 0.25 / 100) ** 0.5
    assert gap.error == pytest.approx((own**2 + 0.75 * 0.25 / 1000) ** 0.5)


def test_numbers_are_written_as_people_read_them():
    assert Estimate(-0.0312, 0.04).short(signed=True) == "−0.03 ± 0.04"
    assert Estimate(0.5703, 0.0012).short() == "0.570 ± 0.001"
    assert not Estimate(0.08, 0.04).is_above_zero
    assert Estimate(0.081, 0.04).is_above_zero


# The page ---------------------------------------------------------------------------------------------------------


def test_page_is_self_contained_and_tells_before_and_after(forgot):
    page = written(forgot)
    assert not re.findall(r'(?:src|srcset|href)="(?!data:|#)', page)
    assert not re.findall(r"<(?:script|link)", page)
    assert page.count("data:image/svg+xml;base64,") == 4  # two figures, each for a light and for a dark page
    text = words(page)
    for said in (
        "The request to forget client 3 was applied after round 2 by ssd",
        "COMPLETED",
        "The ledger is as the run wrote it",
        "after round 3",
    ):
        assert said in text
    assert "<code>train.client_head_steps</code></td><td><code>20</code>" in page


def test_first_words_are_the_verdict(forgot):
    text = words(written(forgot, label="dampening"))
    assert text.index("by dampening") < 300
    assert text.index("memorisation gap") < text.index("The class accuracy on a client's images less that on held-out")


def test_a_card_shows_what_the_ledger_knows(forgot):
    (request,), events = forgot.ledger.requests(), forgot.ledger.events()
    text = words(written(forgot))
    (commit,) = [event for event in events if event.get("checkpoint") == "round-00002-r1.safetensors"]
    assert f"round-00002-r1.safetensors (replaced since by those of later rounds), SHA-256 {commit['sha256']}" in text
    for state, at, _ in report.timeline(request, events):
        assert f"{at} &nbsp;{state}" in text
    assert [state for state, *_ in report.timeline(request, events)] == [
        "RECEIVED", "COLLECTING", "APPLIED", "RECOVERING", "COMPLETED",
    ]  # fmt: skip
    before = request.detail["before"]["forgotten"]["3"]
    assert str(fraction(before["class"], before["examples"])) in text.replace("\u00a0", " ")
    assert f"selected {request.detail['selected']:.4g}" in text
    for task in request.detail["costs"]:
        assert f" {task} " in text
    assert forgot.ledger.head().root in text


def test_a_digest_that_is_the_present_model_is_not_called_replaced(forgot):
    (request,) = forgot.ledger.requests()
    commit = next(event for event in forgot.ledger.events() if event.get("checkpoint") == "round-00002-r1.safetensors")
    forgot.ledger.commit(2, commit["checkpoint"], commit["sha256"])
    assert "replaced since" not in written(forgot)
    assert request.state == State.COMPLETED


def test_settings_that_differ_from_the_defaults_come_first(forgot):
    changed, unchanged = report.shown_settings(forgot.config, strategy_class("ssd").Settings)
    names = [name for name, *_ in changed]
    assert {"clients", "rounds", "train.lr", "unlearn.tune", "forget.schedule"} <= set(names)
    assert "train.epochs" not in names
    assert not {"run", "home", "data.root"} & {name for name, *_ in changed + unchanged}
    assert all(text for *_, text in changed + unchanged)
    page = written(forgot, own_settings=strategy_class("ssd").Settings)
    assert page.index("<code>unlearn.tune</code>") < page.index("<details><summary>All other settings")
    assert page.index("<details><summary>All other settings") < page.index("<code>train.epochs</code>")


def test_a_failed_request_is_red_on_the_first_screen(forgot):
    (filed,) = forgot.ledger.file([1])
    forgot.ledger.advance(filed, State.QUARANTINED, attempts=1, reason="client 1 <b>is silent</b>")
    page = written(forgot)
    place = page.index('<div class="verdict failed">')
    assert place < page.index("What the words mean")
    assert "client 1 &lt;b&gt;is silent&lt;/b&gt;" in page[place:]
    assert "<b>is silent" not in page
    assert '<section class="card failed" id="r2">' in page
    assert "attempt 1: client 1" in page
    assert report.marks(forgot.ledger.requests(), forgot.ledger.events()) == [Mark(2, [3]), Mark(3, [1], failed=True)]


def test_a_run_without_requests_has_its_numbers(federate):
    federate("rounds=1")
    text = words(written(federate.run()))
    assert "No client asked to be forgotten. After round 1 the model gets" in text
    assert "How good the model is" in text
    assert "held-out, as" not in text


def test_without_an_auditor_the_page_does_not_say_who_has_what(forgot):
    text = report.write(forgot, None, []).read_text()
    assert "Who has what" not in text
    assert text.count('<img alt="') == 1


def test_summary_has_a_row_a_group_and_moment(federate):
    federate("forget.schedule={1:[3]} evaluate_every=2")
    rows = [row[:3] for row in report.score_rows(federate.run())]
    assert [(when, who) for when, who, _ in rows] == [
        (when, who)
        for when in ("before forgetting client 3", "after forgetting client 3", "after round 3")
        for who in ("client 3", "retain clients", "test")
    ]
    counts = Auditor(federate.run().config).class_counts()
    text = report.summary(federate.run(), counts)
    assert all(str(fraction(scores["class"], scores["examples"])) in text for _, _, scores in rows)
    first = rows[0][2]
    assert memorisation_gap({"3": first}, 40, counts).text(signed=True) in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_summary_of_many_clients_stays_within_a_terminal_and_cuts_no_number(forgot):
    rows = [row for row in forgot.metrics() if row["kind"] == "forget"]
    forgot.record("forget", **{k: v for k, v in rows[0].items() if k != "kind"} | {"clients": list(range(60))})
    text = report.summary(forgot)
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("±") == report.summary(forgot).count("±")
    scores = rows[0]["before"]["retain"]
    assert f" {fraction(scores['class'], scores['examples'])} " in text


# Figures ----------------------------------------------------------------------------------------------------------


def labels(axes):
    return [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]


def test_figures_show_every_group_and_mark_the_request(forgot):
    requests, events = forgot.ledger.requests(), forgot.ledger.events()
    figure = report.accuracy_figure(forgot.metrics(), report.marks(requests, events))
    by_class, by_client = figure.axes
    assert labels(by_class) == ["retain clients", "test", "client 3", "held-out, as client 3"]
    assert labels(by_client) == ["retain clients", "client 3"]
    assert [text.get_text() for text in by_class.texts] == ["forget 3"]
    for axes in figure.axes:
        assert [line.get_xdata()[0] for line in axes.lines if line.get_label().startswith("_")] == [2]
    auditor = Auditor(forgot.config)
    counts = auditor.class_counts()
    assert counts.sum() == 120
    assert report.split_figure(counts, auditor.class_names).axes[0].images[0].get_array().shape == (4, 10)


def test_the_map_leaves_names_out_of_what_a_refused_request_was_about():
    names = ["a", "b", "patient p9 of a", "patient p9 of b"]
    (axes, _) = report.split_figure(np.ones((2, 3)), ["x", "y", "z"], names).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_the_dashed_line_is_what_held_out_images_get_in_the_clients_colour(forgot):
    rows = forgot.metrics()
    lines = {line.get_label(): line for line in report.accuracy_figure(rows).axes[0].lines}
    dashed = lines["held-out, as client 3"]
    assert dashed.get_linestyle() == "--"
    assert dashed.get_color() == lines["client 3"].get_color() != lines["test"].get_color()
    asked = next(row for row in rows if row["kind"] == "forget")
    points = [scores["forgotten"]["3"]["held_out"] for scores in (asked["before"], asked["after"], rows[-1])]
    assert list(dashed.get_ydata()) == points


def test_ticks_are_whole_rounds_and_the_legend_covers_no_data(forgot):
    figure = report.accuracy_figure(forgot.metrics())
    figure.draw_without_rendering()
    ticks = figure.axes[1].get_xticks()
    assert (ticks == ticks.round()).all()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_one_evaluated_round_is_drawn(forgot):
    rows = [row for row in forgot.metrics() if row["kind"] == "round"][:1]
    figure = report.accuracy_figure(rows)
    pages.embedded(figure)
    low, high = figure.axes[0].get_xlim()
    assert low < rows[0]["round"] < high


def test_requests_close_to_each_other_have_words_that_do_not_overlap(forgot):
    asked = [Mark(1, [3]), Mark(2, [0, 1, 2]), Mark(3, list(range(20)), failed=True)]
    figure = report.accuracy_figure(forgot.metrics(), asked)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "forget 3", "forget 0, 1 and 2", "forget 0, 1, 2, 3 and 16 more failed",
    ]  # fmt: skip
    assert all(text.get_rotation() > 0 for text in figure.axes[0].texts)
    apart = report.accuracy_figure(forgot.metrics(), [Mark(1, [3]), Mark(3, [0])])
    apart.draw_without_rendering()
    first, second = (text.get_window_extent() for text in apart.axes[0].texts)
    assert not first.overlaps(second)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_is_taken_literally(name):
    names = [name, *"bcdefghij"]
    picture = pages.embedded(report.split_figure(np.arange(40).reshape(4, 10), names))
    for address in picture:
        root = ElementTree.fromstring(base64.b64decode(address.partition(",")[2]))
        texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        shown = shortened(pages.literal(name))
        assert " ".join(shown.split()) in [" ".join(text.split()) for text in texts]
    assert "$" not in name or name in pages.literal(name)


def test_a_page_with_names_that_are_no_text_is_written(forgot):
    page = report.write(forgot, np.arange(40).reshape(4, 10), NASTY, label="caf\udce9 $\\frac$ <i>").read_text()
    assert "by caf? $\\frac$ &lt;i&gt;, in" in page


def test_light_and_dark_pictures_differ_in_colours_alone(forgot):
    drawn = pages.embedded(report.accuracy_figure(forgot.metrics()))
    light, dark = (base64.b64decode(address.partition(",")[2]).decode() for address in drawn)
    assert pages.INK in light
    assert pages.INK not in dark
    colour = re.compile(r"#[0-9a-f]{6}\b")
    assert colour.sub("", light) == colour.sub("", dark)
    assert "#ffffff" not in light  # no background


def test_legends_of_the_scaling_study_cover_no_bar():
    rows = [
        {
            "clients": clients, "actors": actors, "gpus": 0, "images_per_second": 1000 * actors, "round_seconds": 9,
            "request_seconds": 90, "retraining_seconds": 900,
        }
        for clients in (4, 16)
        for actors in (1, 2)
    ]  # fmt: skip
    figure = scaling_figure(rows)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert not axes.get_legend().get_window_extent().overlaps(axes.patch.get_window_extent())


def test_rows_that_a_crash_cut_short_or_repeated_count_once(forgot):
    with open(forgot.folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "round", "round": 2, "lo')
    forgot.record("round", round=3, loss=1.5)
    rounds = [row for row in forgot.metrics() if row["kind"] == "round"]
    assert [row["round"] for row in rounds] == [1, 2, 3]
    assert rounds[-1]["loss"] == 1.5


SCORE = {"class": 0.5, "client_id": 0.5, "examples": 10}
SCORES = {"retain": SCORE, "test": SCORE, "forgotten": {}, "retain_clients": {}}


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "round", "retain_clients": [1]},
        {"kind": "round", "retain_clients": {"1": 5}},
        {"kind": "round", "retain_clients": {"a": SCORE}},
        {"kind": "mine", "retain_clients": [1]},
        {"kind": "mine", "test": 1},
        {"kind": "score", "forgotten": [3]},
        {"kind": "purge", "request": "r1", "class_counts": [1]},
        {"kind": "purge", "request": "r1", "class_counts": {"9": [1] * 10}},
        {"kind": "purge", "request": "r1", "class_counts": {"3": [1, 2]}},
        {"kind": "purge", "request": "r1", "class_counts": {"3": [10**30] * 10}},
        {"kind": "round", "clients": ["3"]},
        {"kind": "round", **SCORES, "forgotten": {"77": [1]}},
        {"kind": "round", **SCORES, "forgotten": {"-9": SCORE}},
        {"kind": "round", **SCORES, "forgotten": {"77": SCORE}},
        {"kind": "round", **SCORES, "forgotten": {"03": SCORE}},
        {"kind": "round", **SCORES, "forgotten": {"3": [1, 2]}},
        {"kind": "round", **SCORES, "forgotten": {"3": SCORE | {"examples": "10"}}},
        {"kind": "round", **SCORES, "test": SCORE | {"class": float("inf")}},
    ],
)
def test_rows_that_commands_cannot_rely_on_are_passed_over(forgot, row):
    before = forgot.metrics()
    forgot.record(round=3, **row)
    assert forgot.metrics() == before
    images_of(forgot)
    report.summary(forgot, Auditor(forgot.config).class_counts())


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "mine", "words": ["of", "somebody"]},
        {"kind": "purge", "request": "r1", "class_counts": {"3": [1] * 10}},
        {"kind": "round", **SCORES, "forgotten": {"3": SCORE | {"held_out": float("nan")}}},
    ],
)
def test_rows_that_are_sound_are_taken(forgot, row):
    forgot.record(round=3, **row)
    assert {"round": 3, **row}.keys() in [found.keys() for found in forgot.metrics()]


def test_a_run_beside_the_retrained_model(forgot, federate):
    federate("rounds=3 strategy=leave forget.schedule={0:[3]} run=retrained")
    retrained = federate.run("retrained")
    page = words(written(forgot, retrained=[retrained]))
    assert "a model that was retrained without client 3 gets" in page
    assert "The dotted line is the model that was retrained without it." in page
    assert "retrained" not in words(written(forgot))
    rows = retrained.metrics()
    assert "3" not in rows[-1]["retain_clients"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("rounds=3 forget.schedule={1:[3]}", "is no retrained model: client 3 took part in it"),
        ("rounds=3 forget.schedule={0:[1]}", "is no retrained model: client 3 took part in it"),
        ("rounds=3 forget.schedule={0:[3],1:[1]}", "is no retrained model: it is without client 1 too"),
        ("rounds=3 forget.schedule={0:[3]} partition.seed=1", "was trained on other data than run test"),
        ("rounds=3 forget.schedule={0:[3]} data.test_limit=30", "was trained on other data than run test"),
    ],
)
def test_what_is_no_retrained_model_is_refused(forgot, federate, settings, reason):
    federate(f"{settings} strategy=leave run=other")
    with pytest.raises(UserError, match=f"run other {reason}"):
        written(forgot, retrained=[federate.run("other")])
