"""A loss of one's own: local training on the focal loss (Lin et al., 2017, "Focal Loss for Dense Object Detection").

PYTHONPATH=examples fedunlearn run digits rounds=8 train.loss=own_loss:focal
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fedunlearn
from fedunlearn.cli import main


def focal(
    class_logits: Tensor,
    client_logits: Tensor | None,
    embeddings: Tensor,
    class_ids: Tensor,
    client_ids: Tensor,
    **weights: Any,
) -> Tensor:
    """Weigh the cross-entropy of each image by (1 - p)^2, so that images that are known count less (their Eq. 4).

    `weights` are the settings `loss.*`; this loss needs none of them.
    """
    loss = cross_entropy(class_logits.float(), class_ids, reduction="none")
    return ((1 - (-loss).exp()) ** 2 * loss).mean()


def test_a_run_trains_on_it(tmp_path):
    """Train a round on it, and one on the paper's loss: the models differ, and the log has the smaller loss."""
    words = ["rounds=1", "clients=2", "data.limit=200", "strategy=leave", f"home={tmp_path}"]
    for run, loss in (("mine", f"train.loss={__name__}:focal"), ("paper", "loss.disentangle_weight=0")):
        with pytest.raises(SystemExit) as ended:
            main(["run", "digits", "--engine", "local", f"run={run}", loss, *words])
        assert ended.value.code == 0
    mine, paper = (fedunlearn.open_run(run, home=str(tmp_path)) for run in ("mine", "paper"))
    assert 0 < mine.rows()[0]["loss"] < paper.rows()[0]["loss"]
    a, b = (run.model().state_dict()["class_head.out.weight"] for run in (mine, paper))
    assert not torch.equal(a, b)
