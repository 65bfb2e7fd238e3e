"""The Fisher of every kind of layer, beside one backward pass an example; and of models that no rule was made for."""

import pytest
import torch
from torch import nn
from torch.func import vmap
from torch.nn.functional import linear
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import reference
from fedunlearn.nn.model import Outputs
from fedunlearn.unlearning import fisher
from fedunlearn.unlearning.fisher import cost_in_words, diagonal_fisher

EXAMPLES = 7


class Classifier(nn.Module):
    """A body whose values are averaged over all but examples and channels, and a last layer."""

    def __init__(self, body, *, channels_last=False):
        super().__init__()
        self.body, self.channels_last = body, channels_last
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        values = self.body(x)
        if values.ndim > 2:
            values = values.flatten(1, -2).mean(1) if self.channels_last else values.flatten(2).mean(2)
        return Outputs(self.last(values), None, values)


def made(body, **options):
    """The classifier in fp64, with running statistics and weights that are no layer's first ones."""
    torch.manual_seed(0)
    model = Classifier(body(), **options).double()
    model(batch(20, seed=1)[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def batch(n=EXAMPLES, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, 4, 4, generator=g, dtype=torch.float64),
        torch.randint(3, (n,), generator=g),
        torch.zeros(n, dtype=torch.int64),
    )


def batches():
    return list(zip(*(part.split(4) for part in batch()), strict=True))


def assert_exact(model):
    found, expected = diagonal_fisher(model, batches()), reference.fisher(model, batches())
    assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert any(value.abs().sum() > 0 for name, value in found.items() if name.startswith("body"))


@pytest.fixture
def closed(monkeypatch):
    """No parameter may need passes of its own."""

    def refuse(self, batch, names):
        raise AssertionError(f"no closed rule for {names}")

    monkeypatch.setattr(fisher._PerExample, "_add_one_by_one", refuse)


@pytest.fixture
def said(monkeypatch):
    """What the log says of passes over single examples."""
    fisher.said_once.cache_clear()
    lines = []
    monkeypatch.setattr(fisher.log, "info", lines.append)
    return lines


class Tokens(nn.Module):
    """Pixels as 16 tokens of 3 channels."""

    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def sequence(*layers):
    return nn.Sequential(Tokens(), nn.Linear(3, 4), *layers)


class PixelWords(nn.Module):
    """Looks each pixel up in a table, and changes what it found in place."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(4, 5, **options)

    def forward(self, x):
        found = self.table((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long())
        found += 0.5
        return found.flatten(1, 2).transpose(1, 2)


CLOSED = {
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, padding=1, stride=2), nn.ReLU(inplace=True)),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, (3, 2), groups=2, padding=(2, 1), dilation=(2, 1), bias=False)
    ),
    "reflect": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(3, 6, 3, padding=(1, 2), padding_mode="circular", groups=3),
    "same": lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(3, 4, 3, padding="valid"),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 4, 5, stride=2, padding=1),
        nn.Conv1d(4, 4, 3, groups=2, padding=1, padding_mode="replicate"),
    ),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)),
    "batchnorm1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(56, 5), nn.BatchNorm1d(5)
    ),
    "groupnorm": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True)),
    "layernorm of maps": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.LayerNorm((4, 4)), nn.Tanh()),
    "embedding": lambda: nn.Sequential(PixelWords(), nn.Conv1d(5, 4, 1), nn.Tanh()),
    "embedding with padding": lambda: PixelWords(padding_idx=1),
    "a subclass that runs as its parent": lambda: type("Own", (nn.Conv2d,), {})(3, 4, 3),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 4), nn.Dropout(), nn.Linear(4, 5), nn.Tanh()),
}  # fmt: skip

CLOSED_TOKENS = {
    "tokens": lambda: sequence(nn.Tanh(), nn.Linear(4, 5, bias=False), nn.Tanh()),
    "tokens on a grid": lambda: sequence(nn.Unflatten(1, (2, 8)), nn.Linear(4, 5), nn.LayerNorm((8, 5)), nn.Tanh()),
    "layernorm": lambda: sequence(nn.LayerNorm(4, bias=False), nn.Linear(4, 5), nn.LayerNorm(5)),
}


@pytest.mark.parametrize("body", CLOSED.values(), ids=CLOSED)
def test_closed_rules_equal_one_backward_pass_an_example(body, closed):
    assert_exact(made(body))


@pytest.mark.parametrize("body", CLOSED_TOKENS.values(), ids=CLOSED_TOKENS)
def test_closed_rules_sum_over_tokens_before_they_square(body, closed):
    assert_exact(made(body, channels_last=True))


def test_tiles_change_nothing(monkeypatch):
    model = made(CLOSED_TOKENS["tokens on a grid"], channels_last=True)
    whole = diagonal_fisher(model, batches())
    monkeypatch.setattr("fedunlearn.unlearning.fisher_rules.TILE_ELEMENTS", 30)
    monkeypatch.setattr("fedunlearn.unlearning.fisher.ONE_BY_ONE_ELEMENTS", 30)
    assert_close(diagonal_fisher(model, batches()), whole)


def test_by_hand_tokens_add_up_before_they_are_squared(closed):
    # at zero weights p = 1/2: with tokens 1 and 3 the gradient is (-2, 2), and squares of tokens add up to 1/4 + 9/4
    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 2, bias=False)
            nn.init.zeros_(self.linear.weight)

        def forward(self, x):
            return Outputs(self.linear(x).sum(1), None, x)

    example = torch.tensor([[[1.0], [3.0]]]), torch.tensor([0]), torch.tensor([0])
    assert_close(diagonal_fisher(Logistic(), [example])["linear.weight"], torch.full((2, 1), 4.0))


# --- what has no closed rule ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Tokens with a class token, positions, one head of attention and a layer scale."""

    def __init__(self):
        super().__init__()
        self.inward, self.qkv, self.outward = nn.Linear(3, 4), nn.Linear(4, 12), nn.Linear(4, 4)
        self.cls_token, self.positions = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 17, 4))
        self.gamma = nn.Parameter(torch.ones(4))

    def forward(self, x):
        tokens = self.inward(x.flatten(2).transpose(1, 2))
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.positions
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return (tokens + self.gamma * self.outward(nn.functional.scaled_dot_product_attention(q, k, v)))[:, 0]


class MultiHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class SequenceFirst(nn.Module):
    """Layers that see [tokens, examples, channels]."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6)

    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


class Table(nn.Module):
    """Positions looked up for a whole batch at once, with as many rows as a batch has examples."""

    def __init__(self):
        super().__init__()
        self.rows, self.mixed, self.inward = nn.Embedding(4, 5), nn.Linear(5, 5), nn.Linear(48, 5)

    def forward(self, x):
        return torch.tanh(self.inward(x.flatten(1)) + self.mixed(self.rows(torch.arange(4))).sum(0))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.layer = nn.Linear(48, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(self.inward(x.flatten(1)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.one, self.two = nn.Linear(48, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(self.inward(x.flatten(1)))))


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.one = nn.Linear(48, 4), nn.Linear(4, 4)
        self.two = nn.Sequential(self.one, nn.Tanh())

    def forward(self, x):
        return self.two(torch.tanh(self.one(self.inward(x.flatten(1)))))


class UsedBeside(nn.Module):
    """A layer runs once, and its weights are used once more, turned around."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 4)

    def forward(self, x):
        return linear(torch.tanh(self.layer(x.flatten(1))), self.layer.weight.T)


class Recomputed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inward, self.layer = nn.Linear(48, 4), nn.Linear(4, 4)

    def forward(self, x):
        return checkpoint(lambda y: torch.tanh(self.layer(y)), self.inward(x.flatten(1)), use_reentrant=False)


class DependsOnValues(nn.Module):
    """Asks for a value, which nothing that works on many examples at once can answer."""

    def __init__(self):
        super().__init__()
        self.scale, self.other = nn.Parameter(torch.randn(48)), nn.Parameter(torch.randn(48))

    def forward(self, x):
        rows = [row.flatten() * (self.scale if row.sum().item() > 0 else self.other) for row in x]
        return torch.tanh(torch.stack(rows))


def hooked():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda layer, inputs, output: output * layer.weight.mean())
    return layer


def reshaped():
    """Two tokens of each image as examples of their own."""
    return nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (2, 24)), nn.Flatten(0, 1), nn.Linear(24, 4), nn.Tanh(), Pairs(), nn.Linear(8, 4)
    )


class Pairs(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 2 * x.shape[1])


OTHERS = {
    "own attention": Attention,
    "MultiheadAttention": lambda: sequence(MultiHead()),
    "TransformerEncoderLayer": lambda: sequence(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)),
    "sequence first": lambda: sequence(SequenceFirst()),
    "a table of as many rows as examples": Table,
    "examples that are split": reshaped,
    "a layer that runs twice": Twice,
    "weights of two layers": Tied,
    "a layer of two names": TwoNames,
    "weights that are used beside their layer": UsedBeside,
    "recomputed": Recomputed,
    "depends on values": DependsOnValues,
    "parametrised": lambda: weight_norm(nn.Conv2d(3, 4, 3)),
    "hooked": hooked,
    "PReLU": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4)),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3),
    "rms": lambda: sequence(nn.RMSNorm(4), nn.Tanh()),
    "no running statistics": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
}


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_all_else_equals_one_backward_pass_an_example(body):
    assert_exact(made(body, channels_last=body in [OTHERS[name] for name in ("sequence first", "rms")]))


@pytest.mark.parametrize("body", [TwoNames, Tied])
def test_a_model_is_the_same_afterwards(body):
    model = made(body)
    before = dict(model.named_parameters(remove_duplicate=False))
    diagonal_fisher(model, batches())
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is p and p.requires_grad for name, p in before.items())


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (Attention, "body.cls_token, body.positions, body.gamma: "),
        (Twice, "body.layer.weight, body.layer.bias: "),
        (Tied, "body.one.weight, body.one.bias, body.two.bias: "),
        (UsedBeside, "body.layer.weight, body.layer.bias: "),
    ],
)
def test_what_has_no_closed_rule_is_said_once_with_its_cost(body, names, said):
    model = made(body)
    for _ in range(2):
        diagonal_fisher(model, batches())
    (line,) = said
    assert f"one backward pass an example for {names}" in line
    left = sum(p.numel() for name, p in model.named_parameters() if name in names)
    of = sum(p.numel() for p in model.parameters())
    assert f"({left:,} of {of:,} weights, {left / of:.0%})" in line
    assert "each image takes a pass of its own" in line
    assert cost_in_words(model, batches()[0]) == [line]


def test_what_a_fisher_costs_is_known_beforehand(said):
    assert cost_in_words(made(lambda: nn.Conv2d(3, 4, 3)), batches()[0]) == []
    model = made(DependsOnValues)
    lines = cost_in_words(model, batches()[0])
    assert said == []
    diagonal_fisher(model, batches())
    assert said == lines
    assert ["one by one" in line for line in lines] == [False, True]


def test_passes_are_made_one_by_one_where_torch_cannot_make_many(said, monkeypatch):
    model, calls = made(DependsOnValues), []
    monkeypatch.setattr(fisher, "vmap", lambda *given, **how: calls.append(1) or vmap(*given, **how))
    diagonal_fisher(model, batches())
    assert len(calls) == 1
    assert any("one by one" in line for line in said)


def test_what_needs_no_gradient_has_a_fisher_of_zero():
    model = made(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)))
    whole = diagonal_fisher(model, batches())
    model.body[0].requires_grad_(False)
    found = diagonal_fisher(model, batches())
    assert not found["body.0.weight"].any()
    assert not model.body[0].weight.requires_grad
    assert_close(found["body.2.weight"], whole["body.2.weight"])


def test_layers_that_do_not_run_cost_nothing(closed):
    model = made(lambda: nn.Conv2d(3, 4, 3))
    model.aside = nn.Linear(2, 2).double()
    assert not diagonal_fisher(model, batches())["aside.weight"].any()


def test_passes_over_single_examples_in_bf16_are_close():
    model = made(Attention).float()
    examples = [tuple(part.float() if part.is_floating_point() else part for part in b) for b in batches()]
    exact, rounded = (diagonal_fisher(model, examples, precision=p) for p in ("fp32", "bf16"))
    for name in ("body.cls_token", "body.positions", "body.gamma"):
        assert 0 < float((rounded[name] - exact[name]).norm() / exact[name].norm()) < 0.1
