"""The page: what it shows, what it files and for whom, and what it refuses."""

import contextlib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import pytest

from command_line import command
from conftest import rewrite
from fedunlearn.apps.serve import class_map
from fedunlearn.apps.serve.charts import chart
from fedunlearn.apps.serve.guard import is_loopback, names_of
from fedunlearn.apps.serve.server import listening, made
from fedunlearn.build import open_dataset
from fedunlearn.runs import keys, signed
from fedunlearn.runs.ledger import Ledger, State
from fedunlearn.runs.lock import lock

TINY = "model.width=8 train.client_head_steps=5"
LOCAL = ["--engine=local", "--nodes=2"]
FORM = {"clients": "1", "by": "Ada", "right": "Art. 17 GDPR"}


@dataclass
class Page:
    """A page that is served from a thread of this process."""

    home: Path
    url: str
    token: str
    browser: httpx.Client

    def get(self, path, **headers):
        return self.browser.get(path, headers=headers)

    def form_token(self, run="test"):
        return re.search(r'name="token" value="(\w+)"', self.get(f"/runs/{run}/ask").text)[1]

    def post(self, path, form=FORM, *, token=None, files=None, **headers):
        own = {"origin": self.url} | headers
        data = {"token": self.form_token() if token is None else token, **form}
        return self.browser.post(path, data=data, files=files, headers=own)

    def news(self, path):
        """Each part that is sent, as long as somebody asks for the next."""
        with self.browser.stream("GET", path, timeout=20) as stream:
            for line in stream.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def served(home, host="127.0.0.1"):
    with listening("127.0.0.1", 0) as here:
        port = here.getsockname()[1]
        server, token = made(home, host=host, port=port, options=LOCAL)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [here]}, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as browser:
            yield Page(home, url, token, browser)
        server.should_exit = server.force_exit = True
        thread.join(10)


@pytest.fixture
def page(home):
    with served(home) as page:
        yield page


@pytest.fixture
def finished(federate, page):
    """A finished run of three rounds, which has forgotten client 3 after the second; and its page."""
    federate.shared(f"{TINY} forget.schedule={{2:[3]}}", name="test")
    return federate


@contextlib.contextmanager
def held(federate):
    """Hold the run as a process does that trains it."""
    folder = federate.folder()
    with lock(folder, trains=True):
        ledger = Ledger(folder / "ledger.sqlite")
        ledger.reopen()
        ledger.close()
        yield


def contents(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file() and file.name != "lock"}


# --- looking ------------------------------------------------------------------------------------------------------


def test_without_runs_the_page_says_how_to_start_one(page):
    assert "fedunlearn run digits" in page.get("/").text


def test_runs_are_listed_and_a_damaged_one_does_not_hide_the_others(finished, page):
    shutil.copytree(finished.folder(), finished.folder("broken"))
    (finished.folder("broken") / "ledger.sqlite").write_bytes(b"no ledger")
    text = page.get("/").text
    assert "round 3 of 3" in text
    accuracy = finished.run().metrics()[-1]["test"]["class"]
    assert f"{accuracy:.3f} <small>on test images" in text
    assert "none open" in text
    assert "damaged" in text
    one = page.get("/runs/broken")
    assert one.status_code == 200
    assert "ledger.sqlite" in one.text
    assert page.get("/runs/broken/ask").status_code == 422


def test_an_open_and_an_overdue_request_are_in_the_list(finished, page):
    config = finished.run().config
    late = config.model_copy(update={"forget": config.forget.model_copy(update={"due_months": 0})})
    rewrite(finished.folder(), config=late.model_dump())
    finished.run().request([1])
    text = page.get("/").text
    assert "r2 RECEIVED" in text
    assert "r2 overdue" in text


def test_a_run_shows_its_curves_its_requests_and_its_receipts(finished, page):
    text = page.get("/runs/test").text
    assert "After round 3 of 3" in text
    assert 'href="/runs/test/report"' in text
    assert "sandbox" in page.get("/runs/test/report").headers["content-security-policy"]
    assert re.search(
        r'aria-label="Class accuracy over the rounds\. Last: [^"]*test 0\.\d{3}[^"]*client 3 0\.\d{3}', text
    )
    assert "Request r1: client 3 <span>COMPLETED</span>" in text
    for state in ("RECEIVED", "COLLECTING", "APPLIED", "RECOVERING", "COMPLETED"):
        assert f"&nbsp;{state}" in text
    assert "valid, signed by this run" in text
    receipt = page.get("/runs/test/receipts/r1.json")
    assert receipt.content == (finished.folder() / "receipts" / "r1.json").read_bytes()
    assert receipt.headers["content-disposition"] == 'attachment; filename="test-r1.json"'
    readable = page.get("/runs/test/receipts/r1.html")
    assert "Receipt of request r1" in readable.text
    assert "sandbox" in readable.headers["content-security-policy"]


def test_a_receipt_that_was_changed_is_not_called_valid(finished, page):
    file = finished.folder() / "receipts" / "r1.json"
    file.write_bytes(file.read_bytes().replace(b'"keyid"', b'"keyId"'))
    text = page.get("/runs/test").text
    assert "<strong>NOT valid</strong>: it is not the one that was written" in text
    assert text.count("valid, signed by this run") == len(list(file.parent.glob("*.json"))) - 1


def test_what_others_wrote_is_text_and_no_part_of_the_page(finished, page):
    finished.run().request([1], by="<script>alert(1)</script>", right='"><img src=x onerror=alert(1)>')
    text = page.get("/runs/test").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<img src=x" not in text
    sent = next(part for part in page.news("/runs/test/events") if part["part"] == "requests")
    assert "<script>" not in sent["html"]


def test_what_changes_is_sent_and_nothing_else(finished, page):
    news = page.news("/runs/test/events")
    assert {next(news)["part"] for _ in range(4)} == {"now", "said", "curves", "requests"}
    finished.run().request([1])
    sent = [next(news), next(news)]
    assert {one["part"] for one in sent} == {"said", "requests"}
    assert "Request r2 to forget client 1 is RECEIVED" in next(one["html"] for one in sent if one["part"] == "said")


def test_looking_changes_no_file(finished, page):
    before = contents(page.home)
    for path in ("/", "/runs/test", "/runs/test/ask", "/runs/test/report", "/runs/test/receipts/r1.json", "/live.js"):
        assert page.get(path).status_code == 200, path
    next(page.news("/events"))
    assert contents(page.home) == before


def test_the_map_is_the_auditors(finished, page):
    open_dataset(finished.run().config_here())
    text = page.get("/runs/test/map").text
    assert "data:image/svg+xml;base64," in text
    assert "only a simulation can" in text


def test_without_images_nobody_draws_a_map(finished, home, capsys):
    assert class_map.main("test", str(home)) == 1
    assert capsys.readouterr().err == "its decoded images are not in this state folder\n"


@pytest.mark.parametrize(
    "path",
    [
        "/runs/nope", "/runs/%2e%2e%2f", "/runs/..%2f..%2fetc", "/runs/nope/events", "/runs/nope/ask",
        "/runs/test/receipts/run.json", "/runs/test/receipts/..%2frun.json",
        "/runs/test/receipts/%2e%2e%2fledger.sqlite",
        "/runs/test/receipts/r9.json", "/etc/passwd", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_nothing_but_pages_and_receipts_can_be_had(finished, page, path):
    answer = page.get(path)
    assert answer.status_code == 404
    assert "root:" not in answer.text


def test_a_link_out_of_the_run_is_not_followed(finished, page, tmp_path):
    (tmp_path / "secret.html").write_text("secret")
    (finished.folder() / "receipts" / "r7.html").symlink_to(tmp_path / "secret.html")
    assert page.get("/runs/test/receipts/r7.html").status_code == 404


# --- asking -------------------------------------------------------------------------------------------------------


def test_a_request_is_asked_for_twice_before_a_live_run_has_it(finished, page):
    with held(finished):
        asked = page.post("/runs/test/ask")
        assert asked.status_code == 200
        assert "Forget client 1?" in asked.text
        assert "takes it up after the present round" in asked.text
        assert len(finished.requests()) == 1
        done = page.post("/runs/test/requests")
        assert (done.status_code, done.headers["location"]) == (303, "/runs/test")
        assert "Request r2 to forget client 1 is RECEIVED" in page.get("/runs/test").text
    request = finished.requests()[-1]
    assert (request.clients, request.state) == ([1], State.RECEIVED)
    assert (request.detail["asked_by"], request.detail["right"]) == ("Ada", "Art. 17 GDPR")
    assert not (page.home / "logs").exists()


def test_the_accuracy_is_that_of_the_model_as_it_is_now(finished, page):
    """Also where a request came after the last round."""
    rows = finished.run().metrics()
    asked = next(row for row in rows if row["kind"] == "forget")
    later = {
        **asked,
        "request": "r2",
        "round": 3,
        "after": {**asked["after"], "test": {**asked["after"]["test"], "class": 0.123}},
    }
    with (finished.folder() / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(later) + "\n")
    assert "After request r2 the model gets 12.3 % of the test images right" in page.get("/runs/test").text
    assert "0.123 <small>on test images" in page.get("/").text


def test_a_request_that_was_not_taken_up_can_be_taken_back(finished, page):
    with held(finished):
        page.post("/runs/test/requests")
        link = re.search(r'href="(/runs/test/requests/r2/cancel)"', page.get("/runs/test").text)[1]
        assert "Take request r2 back?" in page.get(link).text
        assert finished.requests()[-1].state == State.RECEIVED
        assert page.post(link, {}, token="").status_code == 403
        done = page.post(link, {})
        assert (done.status_code, done.headers["location"]) == (303, "/runs/test")
    assert finished.requests()[-1].state == State.CANCELLED
    assert "/cancel" not in page.get("/runs/test").text
    for late, status in (("r1", 422), ("r2", 303)):  # what is taken back stays so
        assert "Only a request that is RECEIVED or REFUSED can be taken back" in page.get(link.replace("r2", late)).text
        assert page.post(link.replace("r2", late), {}).status_code == status
    assert page.get(link.replace("r2", "r9")).status_code == 422
    assert [request.state for request in finished.requests()] == [State.COMPLETED, State.CANCELLED]


def test_of_a_run_that_nobody_holds_the_page_says_which_command_it_would_start(finished, page):
    text = page.post("/runs/test/ask", {"clients": "1, 2", "by": "A & B"}).text
    assert "Run test (digits, strategy=ssd, idle, after round 3 of 3) is to forget client 1" in text
    assert "fedunlearn forget --run=test &#39;--client=1, 2&#39; &#39;--by=A &amp; B&#39; --engine=local" in text
    assert len(finished.requests()) == 1


def test_a_class_of_a_client_or_of_all_clients_can_be_asked_for(finished, page):
    text = page.post("/runs/test/ask", {"clients": "1", "class": "5"}).text
    assert "Forget class 5 of client 1?" in text
    assert "fedunlearn forget --run=test --client=1 --class=5 --engine=local" in text
    assert "Forget class 5 of all clients?" in page.post("/runs/test/ask", {"class": "5"}).text
    with held(finished):
        assert page.post("/runs/test/requests", {"clients": "1", "class": "5"}).status_code == 303
        assert "Request r2 to forget class 5 of client 1 is RECEIVED" in page.get("/runs/test").text
    request = finished.requests()[-1]
    assert (request.owners, request.selection.classes) == ([1], (5,))


def test_clients_that_have_names_are_called_by_them(finished, page):
    config, names = finished.run().config, ["hospital_a", "hospital_b", "St. Mary, Ward 2", "<b>"]
    partition = config.partition.model_copy(update={"kind": "folders", "names": names})
    rewrite(finished.folder(), config=config.model_copy(update={"partition": partition}).model_dump())
    assert "hospital_a, hospital_b, St. Mary, Ward 2, &lt;b&gt;" in page.get("/runs/test/ask").text
    text = page.post("/runs/test/ask", {"clients": "hospital_b"}).text
    assert "Forget client hospital_b?" in text
    assert "--client=hospital_b" in text
    assert "did you mean hospital_" in page.post("/runs/test/ask", {"clients": "hospital_c"}).text
    with held(finished):
        page.post("/runs/test/requests", {"clients": "St. Mary, Ward 2"})
        text = page.get("/runs/test").text
    assert "Request r2: client &#39;St. Mary, Ward 2&#39; <span>RECEIVED" in text
    assert "Request r1: client &#39;&lt;b&gt;&#39;" in text
    assert finished.requests()[-1].clients == [2]


def test_a_client_that_was_forgotten_is_not_asked_for_again(finished, page):
    text = page.post("/runs/test/ask", {"clients": "3"}).text
    assert "Request r1 covers this and is COMPLETED" in text


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"clients": "4"}, "client 4 is not in 0..3"),
        ({"clients": ""}, "say whom: a client, or a class or a patient"),
        ({"clients": "1;2"}, "is not a whole number"),
        ({"clients": "--accept=r1"}, "is not a whole number"),
        ({"clients": "1", "class": "10"}, "class 10 is not in 0..9"),
        ({"clients": "1", "class": "x"}, "is not the number of one"),
        ({"clients": "1", "by": "x" * 201}, "has 201 characters"),
        ({"clients": "1", "by": "a\nb"}, "control character"),
    ],
)
@pytest.mark.parametrize("step", ["ask", "requests"])
def test_what_cannot_be_asked_is_said_beside_the_form(finished, page, step, form, reason):
    answer = page.post(f"/runs/test/{step}", form)
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    assert reason in answer.text
    assert len(finished.requests()) == 1


def test_a_run_that_wants_signatures_takes_nothing_else(finished, page, tmp_path):
    owner, other = tmp_path / "client1.pem", tmp_path / "other.pem"
    key = keys.new_key(owner)
    keys.new_key(other)
    config = finished.run().config
    forget = config.forget.model_copy(update={"signed": True, "keys": {1: key}, "schedule": {}})
    rewrite(finished.folder(), config=config.model_copy(update={"forget": forget}).model_dump())
    run = finished.run().ledger.key
    good, bad = (json.dumps(asdict(signed.sign([1], run=run, key=file))) for file in (owner, other))
    assert "--run-key " + run in page.get("/runs/test/ask").text
    with held(finished):
        for text, reason in (
            ("", "it is not signed"),
            ("{}", "this is no signed request"),
            (bad, "its key is not that"),
        ):
            answer = page.post("/runs/test/ask", files={"signed": ("request.json", text)})
            assert answer.status_code == 422
            assert reason in answer.text
        confirmed = page.post("/runs/test/ask", files={"signed": ("request.json", good)})
        assert "valid: it is that of client 1" in confirmed.text
        assert page.post("/runs/test/requests", FORM | {"signed": bad}).status_code == 422
        filed = page.post("/runs/test/requests", FORM | {"signed": good})
        assert filed.status_code == 303
        again = page.post("/runs/test/requests", FORM | {"signed": good})
        assert (again.status_code, again.headers["location"]) == (303, filed.headers["location"])
    assert [request.state for request in finished.requests()] == [State.COMPLETED, State.RECEIVED]
    assert finished.requests()[-1].detail["signed"]["key"] == key


# --- refusing -----------------------------------------------------------------------------------------------------


def test_a_form_of_another_page_or_browser_files_nothing(finished, page):
    with held(finished):
        good = page.form_token()
        for token, headers in (
            ("", {}),
            ("0" * 64, {}),
            (good, {"origin": "http://evil.example"}),
            (good, {"origin": "null"}),
            (good, {"origin": page.url.replace("127.0.0.1", "localhost")}),
            (good, {"origin": page.url[:-1]}),
        ):
            data, headers = {"token": token, **FORM}, {"origin": page.url} | headers
            for path in ("/runs/test/requests", "/runs/test/ask"):
                assert page.browser.post(path, data=data, headers=headers).status_code == 403, headers
        with httpx.Client(base_url=page.url, headers={"origin": page.url}) as other:
            assert other.post("/runs/test/requests", data={"token": good, **FORM}).status_code == 403
        no_origin = page.browser.post("/runs/test/requests", data={"token": good, **FORM})
        assert no_origin.status_code == 403
    assert len(finished.requests()) == 1


def test_a_name_that_points_here_is_not_this_machine(finished, page):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "", "a b", "["):
        answer = page.get("/", host=host)
        assert answer.status_code in (400, 421), host
        assert "test" not in answer.text


def test_another_page_may_link_to_this_one_and_take_nothing_in(finished, page):
    for site in ("cross-site", "same-site"):
        elsewhere = {"sec-fetch-site": site}
        assert page.get("/runs/test/map", **elsewhere, **{"sec-fetch-dest": "image"}).status_code == 403
        assert page.get("/events", **elsewhere, **{"sec-fetch-dest": "empty"}).status_code == 403
        assert page.get("/runs/test", **elsewhere, **{"sec-fetch-dest": "iframe"}).status_code == 403
        assert page.get("/runs/test", **elsewhere, **{"sec-fetch-dest": "document"}).status_code == 200
    assert page.get("/live.js", **{"sec-fetch-site": "same-origin", "sec-fetch-dest": "script"}).status_code == 200


def test_this_machine_may_be_called_by_each_of_its_names_and_through_a_tunnel(page):
    for host in ("localhost", "127.0.0.1:9000", "[::1]:80", "LOCALHOST:1"):
        assert page.get("/", host=host).status_code == 200


def test_a_form_that_is_too_large_or_has_no_length_is_not_read(finished, page):
    token = page.form_token()
    large = page.browser.post(
        "/runs/test/requests", data={"token": token, "by": "x" * 200_000}, headers={"origin": page.url}
    )
    assert large.status_code == 413
    endless = page.browser.post(
        "/runs/test/requests", content=(b"token=1" for _ in range(3)), headers={"origin": page.url}
    )
    assert endless.status_code == 413
    assert page.browser.put("/runs/test/requests").status_code == 405
    assert page.get("/runs/test/requests").status_code == 405


def test_every_answer_forbids_what_the_page_does_not_need(finished, page):
    for path in ("/", "/runs/test", "/runs/test/ask", "/runs/nope", "/live.js"):
        answer = page.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?! src=)|\son\w+=|\sstyle=|https?://", answer.text.replace(page.url, ""))
        for nonce in re.findall(r'nonce="([^"]+)"', answer.text):
            assert f"'nonce-{nonce}'" in policy
    cookie = httpx.get(f"{page.url}/").headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie


def test_beyond_this_machine_nobody_gets_in_without_the_token(finished, home):
    with served(home, host="0.0.0.0") as page:
        assert len(page.token) >= 43
        for path in ("/", "/runs/test", "/events", "/?token=", "/?token=wrong", "/?token=é"):
            assert page.get(path).status_code == 401
        first = page.get(f"/?token={page.token}")
        assert (first.status_code, first.headers["location"]) == (303, "/")
        assert page.get("/").status_code == 200  # by its cookie
        assert page.get("/", host="192.0.2.7:8000").status_code == 200
        assert page.get("/", host="evil.example").status_code == 421
        with held(finished):
            assert page.post("/runs/test/requests").status_code == 303
        assert httpx.get(f"{page.url}/").status_code == 401


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("127.8.8.8", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False), ("localhost.example.org", False)],
)  # fmt: skip
def test_only_loopback_needs_no_token(host, loopback):
    assert is_loopback(host) is loopback
    assert host in names_of(host)


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_ends_at_once_although_a_page_listens(finished):
    words = [sys.executable, "-m", "fedunlearn", "serve", "--port", "0"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"at (http://127\.0\.0\.1:\d+)/ ", process.stderr.readline())[1]
        with httpx.Client(base_url=url) as browser, browser.stream("GET", "/events", timeout=20) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            started = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 130
            assert time.monotonic() - started < 1
        assert "stopped by SIGINT: runs go on" in process.stderr.read()


def test_a_port_that_is_taken_is_one_line(page, capsys):
    assert command("serve", "--port", page.url.rpartition(":")[2], "--engine", "local") == 2
    assert "--port 0 takes a free port" in capsys.readouterr().err


# --- curves -------------------------------------------------------------------------------------------------------


def test_a_curve_by_hand():
    drawn = chart(
        "Accuracy", {"test": [(0, 0.0), (5, float("nan")), (10, 1.0)]}, rounds=10, top=1.0, requests={10: "r1"}
    )
    (line,) = drawn.lines
    assert line.points == "34.0,178.0 350.0,18.0"  # the corners of the picture
    assert line.last == "1.000"
    assert [(mark.at, mark.text) for mark in drawn.rounds] == [(34, "0"), (192, "5"), (350, "10")]
    assert [(mark.at, mark.text) for mark in drawn.values] == [(178, "0"), (98, "0.5"), (18, "1")]
    assert drawn.requests == [(350, "r1")]
    assert drawn.in_words == "Accuracy over the rounds. Last: test 1.000"


def test_without_numbers_there_is_no_curve():
    assert chart("Loss", {"loss": []}, rounds=0).lines == []
    assert chart("Loss", {"loss": [(1, float("inf"))]}, rounds=3).lines == []
    assert chart("Loss", {"loss": [(1, 0.0)]}, rounds=3).lines[0].points == "139.3,178.0"


def test_the_hash_of_a_page_is_of_all_of_it():
    from fedunlearn.apps.serve.look import stamp

    assert stamp("a") == hashlib.sha256(b"a").hexdigest()[:16]
