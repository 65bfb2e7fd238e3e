import csv
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.superlink import free_ports
from command_line import command
from fedunlearn.apps import scale
from fedunlearn.errors import UserError
from fedunlearn.federation.server_data import ServerData
from fedunlearn.runs.run import Run

SCALING = Path(__file__).parent.parent / "simulations" / "scaling"
SMALL = "overrides='data.limit=40 data.test_limit=20 data.image_size=8 model.width=8 train.epochs=2'"


def study(*settings):
    return scale.load_study(SCALING, settings)


def test_the_repositorys_study_is_complete_and_can_be_changed():
    assert study() == scale.ScalingStudy(clients=[10, 100], actors=[1, 2])
    assert study("clients=[5]", "gpus=[0.5]").clients == [5]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("bogus=1", "bogus is no setting"),
        ("client=[1]", r"client is no setting: did you mean clients\?"),
        ("clients=[x]", "clients.0=x is not a whole number"),
        ("rounds=2", r"rounds=2 is not in 3\.\.inf"),
        ("actors=[]", "actors="),
        ("clients=[", "clients="),
        ("rounds", "'rounds' is no setting of the form name=value"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message) as caught:
        study(setting)
    assert "\n" not in str(caught.value)


def test_an_app_without_a_study_is_named():
    with pytest.raises(UserError, match=r"conf/study.yaml does not exist: name an app with a study"):
        scale.load_study(SCALING.parent / "digits", [])
    assert command("scale", "--app", "digits") == command("scale", "bogus=1") == 2


def test_every_combination_is_a_run_of_its_own_name(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wanted = study("clients=[20,5]", "actors=[2,1]")
    found = scale.cells(wanted)
    assert [(cell.clients, cell.actors, cell.nodes) for cell in found] == [
        (5, 1, 5),
        (5, 2, 5),
        (20, 1, 10),
        (20, 2, 10),
    ]
    names = {cell.run_name(wanted, SCALING) for cell in found}
    names |= {cell.run_name(study("overrides='model.width=8'"), SCALING) for cell in found}
    assert len(names) == 8
    assert "--workers=2" in found[1].resources(wanted)
    assert {"--nodes=5", "--cpus=1", "--gpus=0.0"} <= set(found[1].resources(wanted))
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "--workers=2" not in found[1].resources(wanted)


def test_efficiency_is_by_the_fewest_actors_with_as_many_clients():
    rates = {(10, 1): 100.0, (10, 2): 150.0, (20, 2): 90.0, (20, 4): 180.0}
    rows = [{"clients": c, "actors": a, "gpus": 0.0, "images_per_second": rate} for (c, a), rate in rates.items()]
    assert [row["efficiency"] for row in scale.with_efficiency(rows)] == [1.0, 0.75, 1.0, 1.0]


@pytest.fixture
def ray_folder(monkeypatch):
    """Where this test's Ray cluster writes down that it exists; a short name, since it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


@contextmanager
def ray_node(*options):
    """A Ray node with one CPU, for as long as the context."""
    start = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", *options]
    node = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in node.stdout:
            if "Ray runtime started" in line:
                break
        yield
    finally:
        node.terminate()
        node.communicate()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_on_two_ray_nodes_a_study_is_measured_once(home, ray_folder, monkeypatch, capsys):
    (port,) = free_ports(1)
    arguments = ["scale", "--app", SCALING, "clients=[4]", "actors=[2]", SMALL]
    with ray_node("--head", f"--port={port}", "--include-dashboard=false"), ray_node(f"--address=127.0.0.1:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert command(*arguments) == 0
    out, err = capsys.readouterr()
    assert "run 1 of 1: 4 clients on 4 nodes" in err
    assert "retraining" in out
    assert command(*arguments) == 0  # without a cluster: nothing is left to do
    assert "1 runs, 1 of them measured already" in capsys.readouterr().err

    folder = home / "scaling" / "scaling"
    (row,) = csv.DictReader((folder / "results.csv").read_text().splitlines())
    assert (folder / "scaling.svg").read_text().startswith("<?xml")
    (run,) = (Run.opened(path.parent) for path in (home / "scaling" / "runs").glob("*/run.json"))
    rounds, (request,) = run.metrics()[:-1], run.metrics()[-1:]
    assert row["actors"] == "2"
    assert row["images"] == "80"  # trained a round: 40, in two epochs
    assert 0 < float(row["overhead"]) < 1
    assert float(row["request_seconds"]) == request["seconds"]
    seconds = sorted(r["seconds"] for r in rounds[1:3])
    assert float(row["retraining_seconds"]) == pytest.approx(200 * sum(seconds) / 2 * 0.75)
    weights = 4 * sum(p.numel() for p in ServerData(run.config).model.parameters())
    assert 2 * 4 * weights < float(row["round_bytes"]) < 2 * 4 * weights * 1.1
