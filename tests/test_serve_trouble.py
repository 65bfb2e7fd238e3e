"""The page when something is wrong: damaged runs, removed ones, odd names, odd methods, double clicks, long runs."""

import json
import shutil
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import command
from fedunlearn.apps.serve import ask, class_map
from fedunlearn.apps.serve.charts import MOST_POINTS, chart, thinned
from fedunlearn.apps.serve.jobs import Jobs
from fedunlearn.apps.serve.look import Look
from fedunlearn.build import open_dataset
from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.runs import rows, verifying
from fedunlearn.runs.figures import split_figure
from fedunlearn.runs.home import find_run
from fedunlearn.runs.ledger import Ledger, Request, State
from fedunlearn.runs.lock import lock
from fedunlearn.runs.page import Picture
from fedunlearn.runs.timeline import what_follows
from test_serve import finished, held, page  # noqa: F401

REFUSED = {"passed": False, "reason": "the loss on held-out images is 9.000"}


def instead(file):
    """Put a folder where a file should be."""
    file.unlink(missing_ok=True)
    file.mkdir()


# --- damaged and removed runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: instead(folder / "lock"), "lock cannot be read"),
        (lambda folder: instead(folder / "metrics.jsonl"), "metrics.jsonl cannot be read"),
        (lambda folder: (folder / "ledger.sqlite").unlink(), "ledger.sqlite is missing"),
    ],
)
def test_a_run_that_cannot_be_read_hides_no_other_and_says_why(finished, page, damage, reason):  # noqa: F811
    broken = finished.folder("broken")
    shutil.copytree(finished.folder(), broken)
    damage(broken)
    text = page.get("/").text
    assert 'href="/runs/test"' in text
    assert reason in text
    assert reason in page.get("/runs/broken").text
    page.get("/runs/broken/ask")
    assert (broken / "ledger.sqlite").exists() == (reason != "ledger.sqlite is missing")  # looking makes none


def test_a_folder_whose_name_is_no_text_hides_no_run(finished, page):  # noqa: F811
    shutil.copytree(finished.folder(), finished.folder("caf\udce9"))
    text = page.get("/").text
    assert 'href="/runs/test"' in text
    assert "rename the folder" in text


@pytest.mark.parametrize("wrong", [{"loss": "low"}, {"loss": None}, {"loss": [1]}, {"seconds": "1"}])
def test_a_round_whose_figures_are_no_numbers_is_no_row(wrong):
    row = {"kind": "round", "round": 1, "loss": 0.5, "seconds": 2}
    rows.check(row, 4, classes=10)
    with pytest.raises(ValueError, match="valid number"):
        rows.check(row | wrong, 4, classes=10)


def test_a_page_that_is_open_says_that_its_run_was_removed(finished, page):  # noqa: F811
    news = page.news("/runs/test/events")
    for _ in range(4):
        next(news)
    shutil.rmtree(finished.folder())
    sent = next(news)
    assert sent["part"] == "now"
    assert "<strong>Removed</strong>" in sent["html"]
    assert page.get("/runs/test").status_code == 404
    assert not finished.folder().exists()


def test_whoever_looks_at_the_same_moment_reads_a_run_once(finished, home):  # noqa: F811
    read, look = [], Look(home, Jobs(home, []))

    def slowly(folder):
        time.sleep(0.05)
        read.append(folder)
        return "read"

    looks = [
        threading.Thread(target=look._once, args=("what", finished.folder(), slowly, lambda found: found))
        for _ in range(3)
    ]
    for one in looks:
        one.start()
    for one in looks:
        one.join()
    assert read == [finished.folder()]


def test_a_fault_of_the_page_is_a_page_without_its_inside(page, monkeypatch):  # noqa: F811
    monkeypatch.setattr(Look, "listed", lambda look: {}["secret-place"])
    answer = page.get("/")
    assert answer.status_code == 500
    assert "The page has failed (KeyError)" in answer.text
    assert "secret-place" not in answer.text


# --- names, methods, double clicks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a&b=c?d#e%41+", "run with blanks", "प्रयोग ٣", '"<b>'])
def test_a_run_of_any_name_is_found_from_the_list_and_after_a_form(finished, page, name):  # noqa: F811
    shutil.copytree(finished.folder(), finished.folder(name))
    assert page.get(f"/runs/{name.replace('%', '%25').replace('?', '%3F').replace('#', '%23')}").status_code == 200
    with lock(finished.folder(name), trains=True):
        ledger = finished.run(name).ledger
        ledger.reopen()
        ledger.close()
        address = page.browser.build_request("GET", "/").url.copy_with(
            raw_path=b"/runs/" + b"".join(b"%%%02X" % byte for byte in name.encode()) + b"/requests"
        )
        done = page.post(address)
        assert done.status_code == 303
        assert "Request r2 to forget client 1 is RECEIVED" in page.get(done.headers["location"]).text


def test_whoever_asks_for_the_head_alone_gets_that_and_others_are_told_what_they_may_ask(finished, page):  # noqa: F811
    for path in ("/", "/runs/test", "/runs/test/ask", "/live.js", "/runs/test/receipts/r1.json"):
        head, whole = page.browser.head(path), page.get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
    assert page.browser.head("/events").headers["allow"] == "GET"
    assert page.browser.put("/").headers["allow"] == "GET, HEAD, POST"
    assert page.get("/runs/test/requests").headers["allow"] == "POST"
    assert "There is no such page" in page.get("/nowhere").text
    odd = page.browser.post(
        "/runs/test/ask", content=b"--", headers={"origin": page.url, "content-type": "multipart/form-data"}
    )
    assert odd.status_code == 400
    assert "That is not possible" in odd.text


def test_a_double_click_starts_one_command_and_no_other_beside_it(home):
    jobs = Jobs(home, ["--engine=local"])
    name = "ü" * 120  # with what is added to it no file system takes that
    first = jobs.start(name, ["--client=1"])
    assert jobs.start(name, ["--client=1"]) is first
    with pytest.raises(UserError, match=f"a request of run {name} is being taken up"):
        jobs.start(name, ["--client=2"])
    assert first.process.wait(60) == 2  # there is no such run
    second = jobs.start(name, ["--client=1"])
    assert second is not first
    second.process.kill()
    second.process.wait()
    second.log.unlink()  # somebody has emptied logs/
    assert second.lines() == []


def test_a_port_that_there_is_not_is_not_taken_for_another(home):
    assert command("serve", "--port", "99999", "--engine", "local") == 2


# --- what came of a request -----------------------------------------------------------------------------------------


def request(state, **detail):
    return Request("r1", [3], state, datetime.now(UTC).isoformat(), detail)


def test_what_can_be_done_next_is_said():
    folder = Path("/state/runs/demo")
    refused, quarantined = what_follows(request(State.REFUSED), folder), request(State.QUARANTINED, gate=REFUSED)
    assert "You may ask again" in what_follows(request(State.CANCELLED), folder)
    assert "You may ask again" in refused
    assert "forget --cancel=r1 --run=demo --home=/state`" in refused
    assert "--accept" not in what_follows(request(State.QUARANTINED), folder)
    assert "--accept=r1 --by=NAME --run=demo --home=/state`" in what_follows(quarantined, folder)
    later = [Request("r2", [3], State.COMPLETED, "", {})]
    for state in (State.CANCELLED, State.REFUSED, State.QUARANTINED):
        said = what_follows(request(state, gate=REFUSED), folder, later)
        assert said == "Request r2 has taken its place, and is COMPLETED."


def test_of_an_open_request_that_nobody_is_at_work_on_the_page_says_how_to_go_on(finished, page):  # noqa: F811
    finished.run().request([1])
    assert "No process is at work on it" in page.get("/runs/test").text
    with held(finished):
        assert "No process is at work on it" not in page.get("/runs/test").text


def test_what_was_asked_for_already_is_not_asked_for_once_more(finished, page):  # noqa: F811
    done = page.post("/runs/test/ask", {"clients": "3"}).text
    assert "Request r1 covers this and is COMPLETED" in done
    assert "<form" not in done
    finished.run().request([1])
    assert "<form" in page.post("/runs/test/ask", {"clients": "1"}).text  # so that a process goes on with it
    with held(finished):
        assert "<form" not in page.post("/runs/test/ask", {"clients": "1"}).text


def test_what_is_taken_back_twice_is_taken_back_once(finished):  # noqa: F811
    run = finished.run()
    (asked,) = run.request([1]).requests()
    for _ in range(2):
        run.cancel(asked.id)
    states = [event["state"] for event in run.ledger.events() if event.get("request") == asked.id]
    assert states == ["RECEIVED", "CANCELLED"]


def test_a_map_is_drawn_anew_where_others_are_meant_and_for_another_run_of_the_name(finished, page, monkeypatch):  # noqa: F811
    drawn = []
    monkeypatch.setattr(class_map, "drawn", lambda name, home: drawn.append(name) or Picture("data:,a", "data:,b"))

    def looks():
        assert page.get("/runs/test/map").status_code == 200
        return len(drawn)

    assert [looks(), looks()] == [1, 1]
    ledger = finished.run().ledger
    (asked,) = ledger.file([1], selection=Selection((5,)), first_portion=4)
    assert looks() == 1
    ledger.advance(asked, State.COLLECTING)
    assert looks() == 2
    shutil.copytree(finished.folder(), finished.folder("other"))
    finished.run("other").ledger.copy_to(Ledger(finished.folder("copy") / "ledger.sqlite"))  # with a key of its own
    for file in ("ledger.sqlite", "lock"):
        shutil.copy(finished.folder("copy" if file == "ledger.sqlite" else "other") / file, finished.folder())
    (page.home / "heads" / "test.json").unlink()
    assert looks() == 3


def set_aside(finished):  # noqa: F811
    """File a request for client 1 whose model the gate has refused."""
    run = finished.run()
    (asked,) = run.request([1]).requests()
    run.ledger.advance(run.ledger.advance(asked, State.COLLECTING), State.QUARANTINED, gate=REFUSED, reason="bad")
    run.ledger.close()
    return f"/runs/test/requests/{asked.id}/accept"


def test_a_model_that_the_gate_has_refused_is_taken_where_somebody_answers_for_it(finished, page):  # noqa: F811
    path = set_aside(finished)
    assert f'href="{path}"' in page.get("/runs/test").text
    with held(finished):
        asked = page.get(path)
        assert "Take the model of request r2?" in asked.text
        assert "the loss on held-out images is 9.000" in asked.text
        assert page.post(path, {"by": "Ada"}, token="0" * 64).status_code == 403
        assert page.post(path, {"by": "Ada"}, origin="http://evil.example").status_code == 403
        nobody = page.post(path, {"by": "  "})
        assert nobody.status_code == 422
        assert "say who answers for it" in nobody.text
        assert finished.requests()[-1].state == State.QUARANTINED
        done = page.post(path, {"by": "Ada"})
        assert (done.status_code, done.headers["location"]) == (303, "/runs/test")
    taken = finished.requests()[-1]
    assert (taken.state, taken.detail["accepted_by"]) == (State.COLLECTING, "Ada")
    text = page.get("/runs/test").text
    assert "Ada answers for it" in text
    assert path not in text
    again = page.post(path, {"by": "Ada"})
    assert "request r2 is not needed any more: r2 is COLLECTING" in again.text
    assert "Only a model that the gate has refused can be taken" in page.get(path).text


def test_of_an_idle_run_the_page_starts_the_command_that_takes_it(finished, page):  # noqa: F811
    class Noted(Jobs):
        def start(self, run, options, *, given=""):
            started.append(self.words(run, options))

    started, path = [], set_aside(finished)
    assert "This page starts a process" in page.get(path).text
    ask.accept(finished.run(), "r2", "Ada", Noted(page.home, ["--engine=local"]))
    assert started == [["forget", "--run=test", "--accept=r2", "--by=Ada", "--engine=local"]]
    with pytest.raises(UserError, match="r1 is not needed any more"):
        ask.accept(finished.run(), "r1", "Ada", Noted(page.home, []))


def test_a_model_that_is_taken_where_the_gate_is_off_has_a_receipt_that_is_valid(finished, page):  # noqa: F811
    set_aside(finished)
    open_dataset(finished.run().config_here())
    assert command("forget", "--accept", "r2", "--by", "Ada", "--run", "test", "--engine", "local") == 0
    assert finished.requests()[-1].state == State.COMPLETED
    assert "NOT valid" not in page.get("/runs/test").text


def test_a_run_that_is_not_there_is_answered_with_the_newest_twenty(home):
    for number in range(30):
        folder = home / "runs" / f"run{number:02}"
        folder.mkdir(parents=True)
        about = {"data": {}, "images": {}, "versions": {}, "config": {}, "created": f"2026-01-{number + 1:02}"}
        (folder / "run.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"there are run29, run28, .*run10, 10 more$"):
        find_run(home, "nope")


def test_a_request_about_some_images_that_was_refused_spoils_no_map():
    counts = np.ones((4, 2), int)
    figure = split_figure(counts, ["a", "b"], [*"0123", "patient p17 of client 0"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*"0123"]


def test_a_receipt_is_checked_once_as_long_as_it_is_the_same(finished, home, monkeypatch):  # noqa: F811
    checked, check = [], verifying.check_of_run
    monkeypatch.setattr(
        verifying, "check_of_run", lambda run, data, key: checked.append(key) or check(run, data, key=key)
    )
    look = Look(home, Jobs(home, []))
    number = look.run("test")["requests"].count("valid, signed by this run")
    assert len(checked) == number > 0
    finished.run().request([1])
    assert look.run("test")["requests"].count("valid, signed by this run") == number
    assert len(checked) == number
    file = finished.folder() / "receipts" / "r1.json"
    file.write_bytes(file.read_bytes()[:-2])
    finished.run().request([0])
    assert "NOT valid" in look.run("test")["requests"]


# --- long runs ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=200), st.integers(2, 40))
def test_a_curve_that_is_thinned_keeps_its_lowest_and_its_highest_point(values, most):
    points = list(enumerate(values))
    kept = thinned(points, most)
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    assert set(kept) <= set(points)
    assert {min(values, default=0), max(values, default=0)} <= {value for _, value in kept} | {0}


def test_a_curve_of_thousands_of_rounds_is_no_longer_than_a_screen_shows():
    points = [(number, number % 7) for number in range(1, 5001)]
    (line,) = chart("Loss", {"loss": points}, rounds=5000).lines
    assert 100 < len(line.points.split()) <= MOST_POINTS
    assert line.last == "2.000"  # that of round 5000
    json.dumps(line)
