import threading

import pytest

from fedunlearn.data.selection import Selection
from fedunlearn.errors import UserError
from fedunlearn.runs.hints import forget_command
from fedunlearn.runs.ledger import Ledger, State, due


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "runs" / "one" / "ledger.sqlite")
    yield ledger
    ledger.close()


def test_asking_twice_gives_the_same_request(ledger):
    (first,) = ledger.file([3])
    (again,) = ledger.file([3])
    assert again == first
    assert (first.id, first.clients, first.state) == ("r1", [3], State.RECEIVED)
    assert len(ledger.requests()) == 1


def test_one_request_for_two_and_only_the_rest_is_new(ledger):
    ledger.file([5, 3, 3])
    earlier, new = ledger.file([3, 7])
    assert (earlier.clients, new.clients) == ([3, 5], [7])


@pytest.mark.parametrize("state", [State.REFUSED, State.QUARANTINED])
def test_a_failed_request_may_be_asked_again(ledger, state):
    (request,) = ledger.file([3])
    ledger.advance(request, state, reason="no client would be left")
    (again,) = ledger.file([3])
    assert again.id == "r2"


def test_a_request_is_not_accepted_where_another_covers_one_of_its_clients(ledger):
    (request,) = ledger.file([2, 3])
    ledger.advance(request, State.QUARANTINED, gate={"passed": False})
    (other,) = ledger.file([3])
    for state in (State.COLLECTING, State.COMPLETED):
        ledger.advance(other, state)
        with pytest.raises(UserError, match="accepted any more") as refused:
            ledger.accept("r1", "somebody")
        assert str(refused.value) == (
            f"request r1 for clients 2, 3 cannot be accepted any more: r2 for client 3 is {state}; "
            f"`{forget_command([2], (), ledger.folder)}` asks for the rest"
        )
    assert ledger.request("r1").state == State.QUARANTINED
    assert ledger.file([2])[0].id == "r3"


def test_a_request_is_accepted_where_the_other_one_has_failed_too(ledger):
    (request,) = ledger.file([2, 3])
    ledger.advance(request, State.QUARANTINED, gate={"passed": False})
    ledger.advance(ledger.file([3])[0], State.QUARANTINED)
    assert ledger.accept("r1", "somebody").state == State.COLLECTING


def test_details_of_steps_add_up_to_the_receipt(ledger):
    (request,) = ledger.file([3])
    ledger.advance(request, State.COLLECTING, attempts=1)
    ledger.commit(6, "a.safetensors", "00", request=request, round=6)
    request = ledger.advance(request, State.COMPLETED, after=0.5)
    filed = {"not_before": 0, "asked_by": "", "right": "", "due_at": due(request.received_at, 1)}
    assert request.detail == filed | {"attempts": 1, "round": 6, "after": 0.5}
    assert ledger.clients_in([State.COMPLETED]) == [3]


def test_a_commit_is_checkpoint_and_request_or_neither(ledger):
    (request,) = ledger.file([3])
    ledger.commit(5, "five", "55")
    with pytest.raises(TypeError):
        ledger.commit(6, "six", "66", request=request, impossible=object())
    assert ledger.current().checkpoint == "five"
    assert ledger.request("r1").state == State.RECEIVED
    ledger.commit(6, "six", "66", request=request)
    assert (ledger.current().round, ledger.request("r1").state) == (6, State.APPLIED)


def test_a_run_finishes_only_without_open_requests(ledger):
    ledger.commit(1, "one", "11")
    (request,) = ledger.file([3])
    assert not ledger.finish()
    ledger.advance(request, State.COMPLETED)
    assert ledger.finish()
    assert ledger.current().finished
    (later,) = ledger.file([4])
    assert ledger.current().finished  # whoever files now sees that nobody will look again
    ledger.commit(1, "one-r2", "12", request=later)
    assert not ledger.current().finished


def test_a_run_that_goes_on_takes_its_mark_back(ledger):
    ledger.commit(1, "one", "11")
    assert ledger.finish()
    ledger.reopen()
    assert not ledger.current().finished
    assert ledger.current().checkpoint == "one"


def test_a_request_that_is_not_there_is_named_with_those_that_are(ledger):
    with pytest.raises(UserError, match="there is no request r1: there are none"):
        ledger.request("r1")
    ledger.file([3])
    ledger.file([4])
    with pytest.raises(UserError, match="there is no request r9: there are r1, r2"):
        ledger.request("r9")


def test_a_copy_has_everything_and_goes_its_own_way(ledger, tmp_path):
    ledger.file([3])
    ledger.commit(1, "one", "11")
    copy = Ledger(tmp_path / "runs" / "copy" / "ledger.sqlite")
    ledger.copy_to(copy)
    assert (copy.requests(), copy.current()) == (ledger.requests(), ledger.current())
    *events, own = copy.events()
    assert (events, own["fork_of"]) == (ledger.events(), ledger.head().root)
    copy.file([4])
    assert copy.signed_head() == copy.kept_head()
    assert len(ledger.requests()) == 1
    copy.close()


def test_every_event_is_kept_with_its_time_and_hash(ledger):
    ledger.file([3])
    ledger.commit(1, "one", "11")
    key, received, committed = ledger.events()
    assert (key["key"], received["request"], committed["round"]) == (ledger.head().key, "r1", 1)
    assert ledger.head().size == 3
    assert ledger.signed_head().is_signed


def test_two_processes_may_file_at_once(tmp_path):
    def file(clients):
        ledger = Ledger(tmp_path / "runs" / "one" / "ledger.sqlite")
        for client in clients:
            ledger.file([client])
        ledger.close()

    threads = [threading.Thread(target=file, args=(range(start, 20),)) for start in (0, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = Ledger(tmp_path / "runs" / "one" / "ledger.sqlite")
    assert sorted(client for r in ledger.requests() for client in r.clients) == list(range(20))
    assert ledger.signed_head() == ledger.kept_head()
    ledger.close()


def test_a_request_about_some_images_is_met_when_their_clients_have_left_whole(ledger):
    (request,) = ledger.file([2, 3], selection=Selection.by(classes=[7]), first_portion=4)
    ledger.advance(ledger.advance(request, State.COLLECTING), State.QUARANTINED)
    for client, unmet in ((2, ["r1"]), (3, [])):
        (whole,) = ledger.file([client])
        for state in (State.COLLECTING, State.APPLIED, State.COMPLETED):
            whole = ledger.advance(whole, state)
        assert [request.id for request in ledger.unmet()] == unmet


def test_a_request_on_which_a_later_one_counts_is_not_taken_back_while_it_waits(ledger):
    (request,) = ledger.file([3])
    ledger.file([3, 4])
    with pytest.raises(UserError, match="r1 cannot be taken back before r2, which counts on it"):
        ledger.cancel("r1", signed={"nonce": "1"})
    ledger.advance(request, State.REFUSED, reason="why")
    assert ledger.cancel("r1").state == State.CANCELLED


def test_a_request_that_was_asked_for_again_with_a_signature_is_not_taken_back_without_one(ledger):
    ledger.file([3])
    ledger.file([3])
    ledger.file([3], signed={"nonce": "1"})
    with pytest.raises(UserError, match="r1 was asked for with a signature too"):
        ledger.cancel("r1")
    assert ledger.cancel("r1", signed={"nonce": "2"}).state == State.CANCELLED


def test_no_request_overtakes_one_that_waits(ledger):
    ledger.file([3], not_before=6)
    assert ledger.file([4])[-1].detail["not_before"] == 6
    ledger.cancel("r1")
    ledger.cancel("r2")
    assert ledger.file([5])[-1].detail["not_before"] == 0
