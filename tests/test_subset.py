"""The default pipeline beside a naive version, and at its limits, on four clients of handwritten digits."""

import pytest
import torch

import reference
from fedunlearn.federation import messages
from fedunlearn.unlearning.dampening import dampening_cost, largest_alpha
from local_grid import LocalGrid, asked, equal
from naive import ONCE, before, forgotten, pruned
from strategies.relabel import Relabelling
from strategies.subset import SubsetUnlearning

QUICK = f"unlearn.rounds=1 unlearn.epochs=1 {ONCE}"


def softened_fisher(pooled, clients, temperature):
    """Mean over the clients' images of the squared gradient of each one's loss at logits / T, one by one."""
    total, examples = {}, 0
    pooled.model.eval()
    for client in clients:
        for images, labels, _ in pooled.batches(client):
            for image, label in zip(images, labels, strict=True):
                pooled.model.zero_grad()
                logits = pooled.model(image[None]).class_logits / temperature
                torch.nn.functional.cross_entropy(logits, label[None]).backward()
                for name, p in pooled.model.named_parameters():
                    square = torch.zeros_like(p) if p.grad is None else p.grad.square()
                    total[name] = total.get(name, 0) + square
                examples += 1
    return {name: value / examples for name, value in total.items()}


def dampened_by_hand(pooled, epsilon, temperature=4.0):
    """The model's parameters, dampened where F_f > alpha F_D, with the smallest alpha that epsilon allows."""
    theta = {name: p.detach().clone() for name, p in pooled.model.named_parameters()}
    full = softened_fisher(pooled, range(4), temperature)
    forget = softened_fisher(pooled, [3], temperature)
    low, high = 1.0, largest_alpha(pooled.examples(*range(4)), pooled.examples(3)) + 1
    for _ in range(60):
        alpha = (low * high) ** 0.5
        after = reference.dampen(theta, full, forget, alpha=alpha, lambda_=1, exponent=1)
        low, high = (alpha, high) if dampening_cost(theta, after, full) > epsilon else (low, alpha)
    after = reference.dampen(theta, full, forget, alpha=high, lambda_=1, exponent=1)
    return theta, after, dampening_cost(theta, after, full)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1e-6, 3e-6])
def test_dampening_spends_the_budget_and_no_more(federate, monkeypatch, epsilon):
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: False)
    pooled = before(federate)
    theta, expected, spent = dampened_by_hand(pooled, epsilon)
    settings = f"unlearn.epsilon={epsilon} unlearn.fisher_fraction=1 unlearn.freeze_fraction=0"
    found, detail = forgotten(federate, "subset", settings)
    assert 0 < detail["selected"] < 1
    assert detail["spent"] == pytest.approx(spent, rel=0.02)
    assert 0.5 * epsilon < detail["spent"] <= epsilon * 1.001
    moved, wanted = ({n: a[n] - theta[n] for n in theta} for a in (found, pruned(pooled.state() | expected)))
    distance = sum(float((moved[n] - wanted[n]).square().sum()) for n in theta)
    assert distance < 1e-3 * sum(float(value.square().sum()) for value in wanted.values())


def test_without_a_budget_the_pipeline_is_relabelling(federate, memorised):
    settings = "unlearn.lr=0.03 unlearn.guide=kronecker unlearn.guide_images=30 unlearn.ridge=0.1"
    grid = LocalGrid(1)
    found, detail = forgotten(federate, "subset", f"{QUICK} {settings} unlearn.epsilon=0", grid=grid)
    relabelled, _ = forgotten(federate, "relabel", f"{QUICK} {settings}", run="relabelled")
    assert "selected" not in detail
    assert not grid.sent_for("fisher")
    assert equal(found, relabelled)


def test_a_budget_too_small_for_any_weight_changes_nothing(federate, monkeypatch):
    monkeypatch.setattr("strategies.relabel.is_known_better", lambda *found: False)
    pooled = before(federate)
    found, detail = forgotten(federate, "subset", "unlearn.epsilon=1e-30")
    assert detail["selected"] == detail["spent"] == 0
    assert equal(found, pruned(pooled.state()))


def test_the_receipt_says_what_dampening_and_relabelling_did(federate, memorised, capsys):
    grid = LocalGrid(2)
    _, detail = forgotten(federate, "subset", f"{QUICK} unlearn.epsilon=0.01", grid=grid)
    assert {"alpha", "lambda_", "selected", "spent", "predicted", "relabelled"} <= detail.keys()
    said = capsys.readouterr().err
    for words in ("Fisher diagonals of 1 forget and 3 retain clients", "dampening", "alpha", "nats", "relabelling"):
        assert words in said
    tasks = [task for task, _ in asked(grid)]
    assert tasks.index("fisher") < tasks.index("relabel") < tasks.index("repair")


def test_fishers_are_of_softened_predictions_and_the_model_is_not(federate, memorised):
    grid = LocalGrid(1)
    pooled = before(federate)
    forgotten(federate, "subset", f"{QUICK} unlearn.temperature=2 unlearn.epsilon=1e-30", grid=grid)
    last = pooled.state()["class_head.out.weight"]
    for task, scale in (("fisher", 0.5), ("relabel", 1.0)):
        sent = messages.unpack(grid.sent_for(task)[0])["class_head.out.weight"]
        torch.testing.assert_close(sent, scale * last)


def test_fishers_and_updates_travel_in_half_of_the_bytes_whatever_the_dtype_of_messages(federate, memorised):
    grid, dtypes = LocalGrid(2), {}

    def deliver(message):
        reply, task = grid.call(message), messages.task_of(message).name
        if "arrays" in reply.content.array_records:
            arrays = reply.content["arrays"].items()
            dtypes.setdefault(task, set()).update(a.dtype for n, a in arrays if not n.endswith(messages.STATISTICS))
        return reply

    grid.deliver = deliver
    forgotten(federate, "subset", f"{QUICK} unlearn.epsilon=1e-6", grid=grid)
    for task in ("fisher", "relabel", "repair"):
        assert dtypes[task] == {"int16"}, task


def test_the_pipeline_has_the_settings_of_relabelling_and_its_own():
    own, shared = SubsetUnlearning.Settings.model_fields.keys(), Relabelling.Settings.model_fields.keys()
    assert own - shared == {"epsilon", "lambda_", "fisher_fraction"}
