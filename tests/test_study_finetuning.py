import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import study_data
from fedunlearn.nn.rng import generator_of
from fedunlearn.study.pooled.finetuning import FineTuning, adversarial_weight
from fedunlearn.unlearning.pruning import prune_clients


def tuning(model, pool, **options):
    recipe = study_data.recipe(batch_size=64, crop_padding=0, flip=False)
    settings = {"lr": 1e-3, "subset_weight": 0.5, "seed": 3} | options
    return FineTuning(model, pool, pool.without([0]), pool.of_clients([0]), recipe, **settings)


def test_the_adversary_by_hand():
    assert adversarial_weight(0.9, 0.7, 0.5) == pytest.approx(0.1)
    assert adversarial_weight(0.6, 0.7, 0.5) == 0


@pytest.mark.parametrize("adversary", [0.0, 0.3])
def test_one_step_is_algorithm_1_line_6(adversary):
    pool, ours, naive = study_data.pool(), study_data.model(), study_data.model()
    work = tuning(ours, pool)
    work.run_epoch(adversary)

    optimiser = torch.optim.Adam(naive.parameters(), lr=1e-3, fused=False, foreach=False)
    generator = generator_of(3, 0)
    forget = pool.of_clients([0])[torch.randperm(len(pool.of_clients([0])), generator=generator)]
    retain = pool.without([0])[torch.randperm(len(pool.without([0])), generator=generator)]
    naive.train()
    (x_r, y_r, s_r), (x_f, y_f, _) = (next(pool.train.batches(indices)) for indices in (retain, forget))
    out = naive(x_r)
    loss = cross_entropy(out.class_logits, y_r) + 0.5 * cross_entropy(out.client_logits, s_r)
    if adversary:
        loss = loss - adversary * cross_entropy(naive(x_f).class_logits, y_f)
    loss.backward()
    optimiser.step()
    # Adam's first step is lr * sign(g): where g is rounding noise, so is its sign
    differences = [(a - b).abs().flatten() for a, b in zip(ours.parameters(), naive.parameters(), strict=True)]
    assert torch.cat(differences).quantile(0.99) < 1e-5
    assert_close(dict(ours.named_buffers()), dict(naive.named_buffers()), rtol=1e-4, atol=1e-5)


def test_without_an_adversary_the_forget_set_is_not_looked_at():
    pool, states = study_data.pool(), []
    for _ in range(2):
        model = study_data.model()
        tuning(model, pool).run_epoch()
        states.append(model.state_dict())
        pool.train.images[pool.of_clients([0])] = 0
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_masked_weights_stay_and_a_pruned_neuron_stays_pruned():
    pool, model = study_data.pool(), study_data.model()
    prune_clients(model, [0])
    before = {name: value.clone() for name, value in model.named_parameters()}
    masks = {name: torch.zeros_like(value) for name, value in before.items()}
    masks["stem.0.weight"][0] = 1
    tuning(model, pool, masks=masks).run_epoch()
    after = dict(model.named_parameters())
    assert not torch.equal(after["stem.0.weight"][0], before["stem.0.weight"][0])
    assert torch.equal(after["stem.0.weight"][1:], before["stem.0.weight"][1:])
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "stem.0.weight")
    tuning(model, pool).run_epoch()
    assert not model.client_head.out.weight[0].any()


def test_taken_up_again_it_gives_the_same_bits():
    pool, straight = study_data.pool(), study_data.model()
    whole = tuning(straight, pool)
    whole.run_epoch(0.2)
    state = {name: value.clone() for name, value in whole.state().items()}
    whole.run_epoch(0.1)
    resumed = tuning(study_data.model(seed=7), pool)
    resumed.load_state(state)
    resumed.run_epoch(0.1)
    assert resumed.epoch == 2
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in straight.state_dict().items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adversary", [0.0, 0.3])
def test_replayed_graphs_tune_as_the_cpu_does(adversary):
    models = []
    for device in ("cpu", "cuda"):
        pool, model = study_data.pool(device=device), study_data.exact(study_data.model().to(device))
        masks = {name: torch.ones_like(value) for name, value in model.named_parameters()}
        masks["stem.0.weight"][0] = 0
        recipe = study_data.recipe(batch_size=16)
        retain, forget = pool.without([0]), pool.of_clients([0])
        work = FineTuning(model, pool, retain, forget, recipe, lr=1e-3, subset_weight=1.0, seed=0, masks=masks)
        before = model.stem[0].weight[0].detach().clone()
        work.run_epoch(adversary)
        work.run_epoch(adversary)
        assert torch.equal(model.stem[0].weight[0], before)
        models.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert_close(models[0]["class_head.out.weight"], models[1]["class_head.out.weight"], rtol=0, atol=1e-5)
    assert models[0]["stem.1.num_batches_tracked"] == models[1]["stem.1.num_batches_tracked"]
