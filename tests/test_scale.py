import csv
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedunlearn.apps import scale, simulate
from fedunlearn.errors import UserError
from fedunlearn.runs.run import Run
from test_flower import APP

SCALING = APP.parent / "scaling"
SMALL = "overrides='data.limit=40 data.test_limit=20 data.image_size=8 model.width=8 train.epochs=2'"


def study(*settings):
    return scale.load_study(SCALING, settings)


def test_the_repositorys_study_is_complete_and_can_be_changed():
    assert study() == scale.Study(clients=[10, 100], actors=[1, 2])
    assert study("clients=[5]", "gpus=[0.5]").clients == [5]


@pytest.mark.parametrize(
    ("setting", "message"),
    [("bogus=1", "bogus"), ("clients=[x]", "x"), ("rounds=2", "take 3 or more"), ("actors=[]", "nothing to measure")],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(UserError, match=message):
        study(setting)


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
    assert "init-args-num-cpus=2" in found[1].federation(wanted)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert "init-args" not in found[1].federation(wanted)


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
    command = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--num-cpus=1", *options]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in node.stdout:
            if "Ray runtime started" in line:
                break
        yield
    finally:
        node.terminate()
        node.communicate()


@pytest.mark.timeout(600)
def test_on_two_ray_nodes_a_study_is_measured_once(home, ray_folder, monkeypatch, capsys):
    (port,) = simulate.free_ports(1)
    arguments = ["--app", str(SCALING), "clients=[4]", "actors=[2]", SMALL]
    with ray_node("--head", f"--port={port}", "--include-dashboard=false"), ray_node(f"--address=127.0.0.1:{port}"):
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert scale.main(arguments) == 0
    assert "run 1 of 1: 4 clients on 4 nodes" in capsys.readouterr().out
    assert scale.main(arguments) == 0  # without a cluster: nothing is left to do
    assert "1 runs, 1 of them measured already" in capsys.readouterr().out

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
    weights = 4 * sum(p.numel() for p in scale_model(run))
    assert 2 * 4 * weights < float(row["round_bytes"]) < 2 * 4 * weights * 1.1


def scale_model(run):
    from fedunlearn.federation.client import Worker

    return Worker(run.config).model.parameters()
