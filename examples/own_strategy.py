"""A strategy of your own in one file: both halves, its settings, and its test.

Copy it, and run it from the folder where it lies:

    PYTHONPATH=. fedunlearn run digits strategy=own_strategy:RandomLabels rounds=8 'forget.schedule={4:[3]}'
    PYTHONPATH=. fedunlearn study federated dataset=digits 'study.strategies=[leave,own_strategy:RandomLabels]'
    PYTHONPATH=. python -m pytest own_strategy.py

Seven ideas are all that it needs:

1. `Strategy`: the class that you write. It has one method, `forget`.
2. `Settings`: its own settings, `unlearn.lr=0.02` on the command line, checked and documented by themselves.
3. `client_task`: a function that runs where the data is. What it returns is all that a client shares.
4. `Client`: one client's images, given to client tasks only.
5. `federation.run / apply / train`: ask clients, change the model, let clients train.
6. `ForgetSet`: whose images are to be forgotten.
7. The receipt: `forget` returns what it should say beside what every receipt says.
"""

from typing import Any

import pytest
import torch
from pydantic import Field
from torch.nn.functional import cross_entropy

import fedunlearn
from fedunlearn import Client, Federation, ForgetSet, Strategy, Update, client_task
from fedunlearn.cli import main
from fedunlearn.nn.model import TwoHeadModel


class RandomLabels(Strategy):
    """Fine-tune on random labels where the forget clients' images are, then repair with the retain clients."""

    label, colour = "random labels", "#ff7f0e"

    class Settings(fedunlearn.Settings):
        """Settings of random labels."""

        epochs: int = Field(default=2, ge=1, description="of the forget clients on random labels")
        lr: float = Field(default=0.02, gt=0, description="learning rate of these epochs")
        repair_rounds: int = Field(default=1, ge=0, description="of the retain clients afterwards")

    @client_task
    @staticmethod
    def unlearn(client: Client, model: TwoHeadModel, settings: Settings) -> Update:
        """Its model's update after fine-tuning on random labels for its images."""
        optimiser = torch.optim.SGD(model.parameters(), lr=settings.lr)
        draws = client.generator()
        model.train()
        for batch in (batch for epoch in client.epochs(settings.epochs) for batch in epoch):
            logits = model(batch[0]).class_logits
            labels = torch.randint(logits.shape[1], (len(logits),), generator=draws).to(logits.device)
            optimiser.zero_grad()
            cross_entropy(logits, labels).backward()
            optimiser.step()
        return Update(client.changes(model), client.examples, client.evaluate(model))

    def forget(self, federation: Federation, forget: ForgetSet) -> dict[str, Any]:
        """Unlearn on the forget clients, repair on the retain clients."""
        results = federation.run(self.unlearn, on=forget)
        federation.apply(results.mean())
        federation.train(on=federation.retain, rounds=self.settings.repair_rounds)
        return {"accuracy_on_random_labels": results.total.class_accuracy}


def test_it_forgets_a_client_and_the_receipt_says_how(tmp_path):
    """Run it on a few digits, in this process."""
    words = ["rounds=3", "clients=4", "data.limit=200", "forget.schedule={2:[3]}", "unlearn.epochs=1"]
    command = ["run", "digits", "--engine", "local", f"home={tmp_path}", "run=mine"]
    with pytest.raises(SystemExit) as ended:
        main([*command, f"strategy={__name__}:RandomLabels", *words])
    assert ended.value.code == 0
    with fedunlearn.open_run("mine", home=str(tmp_path)).opened() as run:
        (request,) = run.ledger.requests()
    assert request.state == "COMPLETED"
    assert 0 <= request.detail["accuracy_on_random_labels"] <= 1
    assert request.detail["costs"]["unlearn"]["queries"] == 1
