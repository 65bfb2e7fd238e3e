"""A small federation of digits of which client 3 leaves, and what strategies are made of, written naively."""

from torch.testing import assert_close

from fedunlearn.federation import messages as wire
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning import retrain_estimate
from fedunlearn.unlearning.pruning import prune_clients

SETTINGS = "rounds=2 train.client_head=local train.server_momentum=0.5 unlearn.recover=1 unlearn.recalibrate=false"
LEAVES = "forget.schedule={2:[3]}"


def before(federate, more=""):
    """A worker that holds the model as it was when the request came."""
    federate(f"{SETTINGS} {more} run=before")
    worker = federate.worker(f"{SETTINGS} {more}")
    worker.model.load_state_dict(federate.state("before"))
    return worker


def forgotten(federate, strategy, more="", leaves=LEAVES):
    federate(f"{SETTINGS} {more} strategy={strategy} {leaves} run={strategy}")
    (request,) = federate.requests(strategy)
    assert request.state == State.COMPLETED
    return federate.state(strategy), request.detail


def asked(grid):
    """(kind, client) of every message, for each client that it names."""
    tasks = [(message.metadata.message_type, wire.task_of(message)) for message in grid.sent]
    return [(kind, client) for kind, task in tasks for client in task.clients]


def trained(worker, client, state, round_, **task):
    """The client's model after its training of a round."""
    worker.model.load_state_dict(state)
    worker.fit(client, round_, **task)
    return {name: value.clone() for name, value in worker.model.state_dict().items()}


def average(worker, states):
    """Of the states of clients, by examples."""
    total = sum(worker.examples(c) for c in states)
    first = next(iter(states.values()))
    floating = {name for name, value in first.items() if value.is_floating_point()}
    return {
        name: sum(worker.examples(c) / total * state[name] for c, state in states.items())
        if name in floating
        else value
        for name, value in first.items()
    }


def pruned(worker, state, client=3):
    worker.model.load_state_dict(state)
    prune_clients(worker.model, [client])
    return worker.model.state_dict()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def foretold(federate, worker, leaving):
    """What the model would say of unseen images had it never seen those clients'."""
    said, everybody = worker.predict_test(), worker.class_mix(range(4))
    answers = {1: federate.beside("before")["answers.1"], 2: said.class_probs}
    staying = worker.class_mix(set(range(4)) - set(leaving))
    return said._replace(class_probs=retrain_estimate.foretold(answers, said.class_labels, everybody, staying))
