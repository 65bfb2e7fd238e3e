"""A small federation of digits that forgets client 3, and what strategies are made of, written naively."""

from torch.testing import assert_close

from fedunlearn.federation.client import ClientRuntime
from fedunlearn.federation.server_data import ServerData
from fedunlearn.runs.ledger import State
from fedunlearn.unlearning.pruning import pruned as pruned_state
from fedunlearn.unlearning.retrain_estimate import estimate_retrained

SETTINGS = "rounds=2 train.client_head_by=local train.server_momentum=0.5 batch_norm_fraction=0"
FORGETS = "forget.schedule={2:[3]}"
UNLEARN = {
    "ssd": "unlearn.tune=fixed unlearn.alpha=2 unlearn.lambda_=0.5",
    **dict.fromkeys(("ascent", "pga", "negate"), "unlearn.repair_rounds=1"),
}


class Pooled:
    """Every client's data and the server's in one place, with a model: what naive references are made of.

    Attributes:
        config: settings of the run.
        server: its held-out images.
        model: at first with the run's initial weights.
    """

    def __init__(self, config):
        self.config = config
        self._runtime, self.server = ClientRuntime(config), ServerData(config)
        self.model = self._runtime.model
        self.images = self._runtime.dataset.train.images

    def client(self, number, round_=0):
        """The client, with random draws of that round."""
        return self._runtime.client(number, round_)

    def state(self):
        """A copy of the model's tensors."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def batches(self, client, generator=None):
        return self.client(client).batches(generator)

    def examples(self, *clients):
        return sum(self.client(client).examples for client in clients)

    def class_counts(self, clients):
        """How many images of each class these clients have together, [K]."""
        return sum(self.client(client).class_counts for client in clients)

    def evaluate(self, client):
        return self.client(client).evaluate(self.model)

    def predictions(self):
        """The model's, on held-out images."""
        return self.server.predict(self.model)


ONCE = "unlearn.passes=1 unlearn.most_rounds=1"  # relabelling goes on no further, whatever came of it


def settings_of(strategy, more=""):
    """Settings of a run of two rounds and its strategy."""
    return f"{SETTINGS} strategy={strategy} {UNLEARN.get(strategy, '')} {more}"


def before(federate, training=""):
    """The model as it was when the request came, and all clients' data; `training` is further settings of training."""
    federate.shared(f"{SETTINGS} {training}")
    pooled = federate.pooled(f"{SETTINGS} {training}")
    pooled.model.load_state_dict(federate.state("before"))
    return pooled


def forgotten(federate, strategy, more="", *, training="", forgets=FORGETS, grid=None, run="forgets"):
    """The model, and the receipt, when the run before goes on by forgetting; `more` is settings of the strategy."""
    federate.shared(f"{SETTINGS} {training}")
    federate(f"{settings_of(strategy, more)} {training} {forgets} fork=before run={run}", nodes=1, grid=grid)
    (request,) = federate.requests(run)
    assert request.state == State.COMPLETED
    return federate.state(run), request.detail


def trained(pooled, client, state, round_, **how):
    """The client's model after its training of a round."""
    pooled.model.load_state_dict(state)
    pooled.client(client, round_).fit(pooled.model, **how)
    return pooled.state()


def average(pooled, states):
    """Of the states of clients, by examples."""
    total = pooled.examples(*states)
    first = next(iter(states.values()))
    floating = {name for name, value in first.items() if value.is_floating_point()}
    return {
        name: sum(pooled.examples(c) / total * state[name] for c, state in states.items())
        if name in floating
        else value
        for name, value in first.items()
    }


def pruned(state, *clients):
    """The state without these clients' neurons; without client 3's by default."""
    return pruned_state(state, clients or [3])


def assert_same(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if value.is_floating_point():
            assert_close(value, expected[name], rtol=1e-4, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def estimated(federate, pooled, forget):
    """What the model would predict of held-out images had it never seen those clients'."""
    found, counts = pooled.predictions(), pooled.class_counts(range(4))
    by_round = {1: federate.server_state("before").predictions["1"], 2: found.class_probs}
    retain = pooled.class_counts(set(range(4)) - set(forget))
    return found._replace(class_probs=estimate_retrained(by_round, found.class_labels, counts, retain))
