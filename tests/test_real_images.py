"""CIFAR-10's images, as files: split as in the paper's Table 1, trained on two nodes and on ten."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from torch.testing import assert_close

from fedunlearn.apps.server_app import server_app
from fedunlearn.data import datasets
from fedunlearn.data.partition import dirichlet_partition
from fedunlearn.federation.server_data import ServerData
from fedunlearn.federation.server_state import ServerState
from fedunlearn.runs.run import Run
from local_grid import LocalGrid

REPOSITORY = Path(__file__).parent.parent
ARCHIVE = REPOSITORY.parent / "shared" / "data" / "cifar10-jpeg.tar.xz"

pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason=f"{ARCHIVE} is not here")


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    """A state folder in which the archive is unpacked once."""
    home = tmp_path_factory.mktemp("home")
    datasets.load("folder", root=str(ARCHIVE), cache=home / "data", limit=600, test_limit=100)
    return home


def test_the_files_give_the_papers_clients(state):
    (tree,) = (state / "data").glob("unpacked-*")
    classes = sorted(folder.name for folder in (tree / "train").iterdir())
    sizes = [len(list((tree / "train" / name).iterdir())) for name in classes]
    assert sizes == [5000] * 10
    labels = np.repeat(np.arange(10), sizes)
    owned = [len(indices) for indices in dirichlet_partition(labels, 10)]
    assert owned == [2575, 5913, 3263, 5538, 6895, 2359, 7847, 7200, 3226, 5184]


def test_one_round_on_two_nodes_and_on_ten_gives_the_same_model(state, monkeypatch):
    monkeypatch.setenv("FEDUNLEARN_HOME", str(state))
    settings = f"rounds=1 data.name=folder data.root={ARCHIVE} data.limit=600 data.test_limit=100 model.width=8"
    models = []
    for nodes in (2, 10):
        context = Context(1, 1, {}, RecordDict(), {"overrides": f"{settings} run=on-{nodes}"})
        server_app(REPOSITORY / "simulations" / "cifar10" / "conf")(LocalGrid(nodes), context)
        run = Run.opened(state / "runs" / f"on-{nodes}")
        model = ServerData(run.config).model
        initial = {name: value.clone() for name, value in model.state_dict().items()}
        models.append(ServerState.from_tensors(*run.restore(model, beside=None)).params)
    assert any(not torch.equal(value, initial[name]) for name, value in models[0].items())
    assert_close(models[0], models[1], rtol=1e-5, atol=1e-6)
