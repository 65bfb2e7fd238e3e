"""With `forget.signed` a request counts only if its client's key has signed it; all others change nothing."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa

from command_line import command
from fedunlearn.errors import UserError
from fedunlearn.runs import keys, signed
from fedunlearn.runs.ledger import State
from fedunlearn.runs.signed import SignedRequest, UnsignedError, check, read, sign
from local_grid import equal

RUN, NOW = "ab" * 32, datetime.now(UTC)


OPENSSH = serialization.PrivateFormat.OpenSSH
PKCS8 = serialization.PrivateFormat.PKCS8


def written(file, private, form=OPENSSH, password=None):
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    file.write_bytes(private.private_bytes(serialization.Encoding.PEM, form, secret))
    return file


@pytest.fixture
def key(tmp_path):
    return keys.new_key(tmp_path / "client3.pem"), tmp_path / "client3.pem"


def checked(asked, key, **others):
    about = {"clients": [3], "run": RUN, "owners": {3: key[0]}, "at": datetime.now(UTC), "used": set(), **others}
    check(asked, **about)


def test_what_the_client_signed_counts_also_after_a_journey_as_json(key):
    asked = sign([3], run=RUN, key=key[1])
    checked(asked, key)
    again = read(json.dumps(asdict(asked)).encode())
    checked(again, key)
    assert again == asked


@pytest.mark.parametrize(
    ("change", "about", "reason"),
    [
        (lambda asked: None, {}, "not signed"),
        (lambda asked: replace(asked, clients=[4]), {"clients": [4]}, "signature is not valid"),
        (lambda asked: replace(asked, nonce="00"), {}, "signature is not valid"),
        (lambda asked: replace(asked, expires_at="2099-01-01T00:00:00+00:00"), {}, "signature is not valid"),
        (lambda asked: replace(asked, key="cd" * 32), {}, "signature is not valid"),
        (lambda asked: replace(asked, signature=""), {}, "signature is not valid"),
        (lambda asked: asked, {"run": "cd" * 32}, "for another run"),
        (lambda asked: asked, {"clients": [3, 4]}, r"to forget clients \[3\]"),
        (lambda asked: asked, {"action": "cancel r1"}, r"to forget clients \[3\]"),
        (lambda asked: asked, {"owners": {3: "cd" * 32}}, "not that of client 3"),
        (lambda asked: asked, {"owners": {}}, "not that of client 3"),
        (lambda asked: asked, {"at": NOW + timedelta(days=31)}, "has expired on .*: sign anew"),
        (
            lambda asked: asked,
            {"at": NOW - timedelta(days=1)},
            "future, at .* when it was .* here: set the clocks",
        ),
        (lambda asked: asked, {"used": "its own"}, "was filed before"),
    ],
)
def test_everything_else_does_not(key, change, about, reason):
    asked = sign([3], run=RUN, key=key[1])
    if about.get("used"):
        about = {"used": {asked.nonce}}
    with pytest.raises(UnsignedError, match=reason):
        checked(change(asked), key, **about)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"\xff", b"{}", json.dumps({"run": "a"}).encode()],
)
def test_what_is_no_signed_request_is_not_read(data):
    with pytest.raises(UnsignedError, match="no signed request"):
        read(data)


def test_times_without_a_zone_and_words_for_clients_are_not_read(key):
    asked = asdict(sign([3], run=RUN, key=key[1]))
    for wrong in ({"clients": ["3"]}, {"expires_at": "2026-01-01T00:00:00"}, {"issued_at": "never"}):
        with pytest.raises(UnsignedError, match="no signed request"):
            read(json.dumps(asked | wrong).encode())


@pytest.mark.parametrize("zone", ["+00:00", "+14:00", "-14:00"])
def test_times_at_the_ends_of_the_calendar_are_times(key, zone):
    asked = sign([3], run=RUN, key=key[1])
    first, last = f"0001-01-01T00:00:00{zone}", f"9999-12-31T23:59:59{zone}"
    for issued_at, expires_at, reason in ((first, first, "has expired"), (last, last, "in the future")):
        other = replace(asked, issued_at=issued_at, expires_at=expires_at, signature="")
        other = read(asdict(replace(other, signature=keys.signature_of(keys.load(key[1]), other.message))))
        with pytest.raises(UnsignedError, match=reason):
            checked(other, key)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--days", "1e12"], "in 0..36500 days, not in 1e+12"),
        (["--days", "nan"], "in 0..36500 days, not in nan"),
        (["--days", "inf"], "in 0..36500 days, not in inf"),
        (["--client", "--3"], "client '--3' is not a whole number"),
        (["--client", "1" * 5000], f"client '{'1' * 20}' is not a whole number of at most 9 digits"),
    ],
)
def test_what_cannot_be_signed_gets_one_line(key, tmp_path, capsys, words, message):
    about = ["--client", "3", "--key", key[1], "--run-key", RUN]
    assert command("keys", "ask", tmp_path / "asked.json", *about, *words) == 2
    error = capsys.readouterr().err
    assert (message in error, error.count("\n")) == (True, 1)


def test_a_file_that_cannot_be_used_gets_one_line(federate, key, tmp_path, capsys):
    federate.shared("rounds=1", name="test")
    capsys.readouterr()
    missing, private = tmp_path / "no folder" / "file.json", key[1]
    forget = ("forget", "--client", "3", "--engine", "local")
    for words, message in (
        ((*forget, "--signed", missing), f"{missing} cannot be used (No such file or directory)"),
        ((*forget, "--signed", tmp_path), f"{tmp_path} cannot be used (Is a directory)"),
        ((*forget, "--signed", tmp_path / ("n" * 300)), "cannot be used (File name too long)"),
        (("keys", "sign", missing, "--key", private), f"{missing} cannot be used"),
        (("keys", "sign", private, "--key", private), "it is no envelope with a receipt"),
        (("keys", "ask", missing, "--client", "3", "--key", private, "--run-key", RUN), f"{missing} cannot be used"),
        (("keys", "ask", tmp_path, "--client", "3", "--key", private, "--run-key", RUN), f"{tmp_path} cannot be used"),
        (("keys", "new", private / "below.pem"), f"{private} cannot be used"),
    ):
        assert command(*words) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run test ")]
        assert (len(lines), message in lines[0]) == (1, True)


def test_a_run_that_wants_signatures_forgets_for_its_clients_alone(federate, key, tmp_path, capsys):
    federate(f"rounds=1 forget.signed=true forget.keys={{3:'{key[0]}'}}")
    before = federate.state()
    other = tmp_path / "other.pem"
    keys.new_key(other)
    forget = ["forget", "--run", "test", "--client", "3", "--engine", "local"]
    assert command(*forget) == 2
    assert "turned away: it is not signed" in capsys.readouterr().err
    assert command(*forget, "--key", str(other)) == 2
    assert command(*forget[:3], "--client", "1", *forget[5:], "--key", str(key[1])) == 2
    assert federate.requests() == []
    assert equal(before, federate.state())

    run_key = federate.run().ledger.head().key
    file = tmp_path / "request.json"
    assert command("keys", "ask", str(file), "--client", "3", "--key", str(key[1]), "--run-key", run_key) == 0
    assert command(*forget, "--dry-run") == 2
    assert "it is not signed" in capsys.readouterr().err
    assert command(*forget, "--signed", str(file), "--dry-run") == 0
    assert federate.requests() == []
    assert command(*forget, "--signed", str(file)) == 0
    (request,) = federate.requests()
    assert request.state == State.COMPLETED
    assert SignedRequest(**request.detail["signed"]).key == key[0]
    assert command(*forget, "--signed", str(file)) == 0  # as whoever repeats a command that was cut short
    assert len(federate.requests()) == 1
    forged = json.loads(file.read_text()) | {"clients": [1]}
    file.write_text(json.dumps(forged))
    assert command(*forget, "--signed", str(file)) == 2
    events = federate.run().ledger.events()
    reasons = [event["reason"] for event in events if "turned_away" in event]
    assert [reason.partition(":")[0].partition(" (")[0] for reason in reasons] == [
        "it is not signed",
        "its key is not that of client 3",
        "its key is not that of client 1",
        "its signature is not valid",
    ]


def test_a_request_that_got_into_the_ledger_without_a_signature_is_refused(federate, key):
    """Whoever holds the run's key, but not the client's."""
    federate(f"rounds=1 forget.signed=true forget.keys={{3:'{key[0]}'}}")
    before = federate.state()
    run = federate.run()
    run.ledger.file([3])
    asked = sign([3], run=run.ledger.key, key=key[1])
    run.ledger.file([1], signed=asdict(asked))
    run.ledger.close()
    with pytest.raises(UserError, match="r1 is REFUSED"):
        federate(f"rounds=1 forget.signed=true forget.keys={{3:'{key[0]}'}}")
    assert [(r.state, r.detail["reason"].split(" (")[0]) for r in federate.requests()] == [
        (State.REFUSED, "it is not signed"), (State.REFUSED, "what was signed is to forget clients [3]"),
    ]  # fmt: skip
    assert equal(before, federate.state())


def test_only_who_asked_takes_a_request_back(federate, key):
    federate(f"rounds=1 forget.signed=true forget.keys={{3:'{key[0]}'}}")
    run = federate.run()
    run_key = run.ledger.key
    run.request([3], signed=sign([3], run=run_key, key=key[1]))
    for asked in (None, sign([3], run=run_key, key=key[1]), sign([3], run=run_key, key=key[1], action="cancel r2")):
        with pytest.raises(UserError, match="turned away"):
            run.cancel("r1", signed=asked)
    assert run.ledger.request("r1").state == State.RECEIVED
    run.cancel("r1", signed=signed.sign([3], run=run_key, key=key[1], action="cancel r1"))
    assert run.ledger.request("r1").state == State.CANCELLED
    run.ledger.close()


@pytest.mark.parametrize("words", ["forget.schedule={1:[3]}", "forget.keys={3:abc}", "forget.keys={9:abc}"])
def test_settings_that_do_not_go_together_are_named(federate, words):
    with pytest.raises(UserError, match=r"forget\.schedule|is no id|client 9 is not in"):
        federate(f"rounds=1 forget.signed=true {words}")


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()])
@pytest.mark.parametrize("form", [OPENSSH, PKCS8])
def test_the_key_of_a_supernode_signs_and_no_other_does(curve, form, tmp_path):
    file = written(tmp_path / "supernode", ec.generate_private_key(curve), form)
    other = written(tmp_path / "another", ec.generate_private_key(curve), form)
    owner = keys.id_of(keys.load(file)), file
    checked(sign([3], run=RUN, key=file), owner)
    with pytest.raises(UnsignedError, match="not that of client 3"):
        checked(sign([3], run=RUN, key=other), owner)
    forged = replace(sign([3], run=RUN, key=other), key=owner[0])
    with pytest.raises(UnsignedError, match="signature is not valid"):
        checked(forged, owner)


def test_a_key_made_by_ssh_keygen_signs(tmp_path):
    if not shutil.which("ssh-keygen"):
        pytest.skip("there is no ssh-keygen here")
    about = ["-t", "ecdsa", "-b", "384", "-N", "", "-C", "", "-f", str(tmp_path / "client3")]
    subprocess.run(["ssh-keygen", "-q", *about], check=True)
    file = tmp_path / "client3"
    owner = keys.id_of(keys.load(file)), file
    asked = sign([3], run=RUN, key=file)
    assert keys.is_signed(asked.signature, asked.message, owner[0])
    checked(asked, owner)


@pytest.mark.parametrize(
    ("private", "password", "reason"),
    [
        (lambda: rsa.generate_private_key(65537, 2048), None, "neither an Ed25519 key nor one of P-256"),
        (lambda: ec.generate_private_key(ec.SECP256K1()), None, "neither an Ed25519 key nor one of P-256"),
        (lambda: dsa.generate_private_key(1024), None, "neither an Ed25519 key nor one of P-256"),
        (lambda: ec.generate_private_key(ec.SECP384R1()), b"secret", "has a password"),
    ],
)
def test_other_keys_are_refused_with_the_reason(private, password, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        keys.load(written(tmp_path / "key", private(), PKCS8, password))


def test_a_changed_signature_of_a_curve_is_not_valid(tmp_path):
    private = ec.generate_private_key(ec.SECP384R1())
    signature, owner = keys.signature_of(private, b"this"), keys.id_of(private)
    assert keys.is_signed(signature, b"this", owner)
    assert not keys.is_signed(signature, b"that", owner)
    for place in range(len(signature)):
        changed = f"{signature[:place]}{'0' if signature[place] != '0' else '1'}{signature[place + 1 :]}"
        assert not keys.is_signed(changed, b"this", owner)


def test_a_client_whose_key_is_its_supernodes_asks_and_countersigns(federate, tmp_path, capsys):
    file = written(tmp_path / "client3", ec.generate_private_key(ec.SECP384R1()))
    owner = keys.id_of(keys.load(file))
    federate(f"rounds=1 forget.schedule={{}} forget.signed=true forget.keys={{3:{owner}}}")
    assert command("forget", "--run", "test", "--client", "3", "--engine", "local", "--key", file) == 0
    receipt = federate.folder() / "receipts" / "r1.json"
    assert command("keys", "sign", receipt, "--key", file) == 0
    (countersigned,) = receipt.parent.glob("r1.*.json")
    capsys.readouterr()
    assert command("verify", countersigned) == 0
    assert f"a countersigner's key {owner}" in capsys.readouterr().out
