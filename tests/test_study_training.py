import pytest
import torch
from torch.testing import assert_close

import reference
import study_data
from fedunlearn.data.batches import draws
from fedunlearn.nn.rng import generator_of
from fedunlearn.study.pooled.training import Training


def test_two_steps_are_those_of_the_naive_pipeline():
    pool, naive, ours = study_data.pool(32), study_data.model(), study_data.model()
    training = Training(ours, pool.train, pool.train.all(), study_data.recipe(epochs=1, warmup=0.0), seed=5)
    training.run_epoch()
    generator = generator_of(5, 0)
    order = torch.randperm(32, generator=generator)
    reference.train(
        naive, pool.train.images.numpy(), pool.train.labels, pool.train.clients, order, draws(32, generator, 2, True),
        batch_size=16, lr=0.02, momentum=0.9, weight_decay=5e-4, padding=2,
    )  # fmt: skip
    assert_close(dict(ours.named_parameters()), dict(naive.named_parameters()), rtol=0, atol=1e-5)
    assert_close(dict(ours.named_buffers()), dict(naive.named_buffers()), rtol=0, atol=1e-5)
    moved = (dict(ours.named_parameters())["client_head.out.weight"] - study_data.model().client_head.out.weight).abs()
    assert moved.max() > 1e-4


def test_the_class_loss_alone_at_first():
    pool, model = study_data.pool(), study_data.model()
    before = model.client_head.out.weight.clone()
    training = Training(model, pool.train, pool.train.all(), study_data.recipe(), seed=0)
    training.run_epoch()
    assert torch.equal(model.client_head.out.weight, before)
    training.run_epoch()
    assert not torch.equal(model.client_head.out.weight, before)


def test_learns_and_tells_how_well():
    pool, model = study_data.pool(), study_data.model()
    training = Training(model, pool.train, pool.train.all(), study_data.recipe(epochs=8, crop_padding=0), seed=0)
    while training.epoch < 8:
        training.run_epoch()
    loss, class_accuracy, client_accuracy, seconds = zip(*training.history, strict=True)
    assert loss[7] < loss[2]  # the first two epochs have the class loss alone
    assert class_accuracy[-1] > 0.9 > class_accuracy[0]
    assert 0 <= min(client_accuracy) <= max(client_accuracy) <= 1
    assert min(seconds) > 0


def test_taken_up_again_it_gives_the_same_bits():
    pool, models = study_data.pool(), []
    for stop in (4, 2):
        model = study_data.model()
        training = Training(model, pool.train, pool.train.all(), study_data.recipe(), seed=1)
        for _ in range(stop):
            training.run_epoch()
        state = {name: value.clone() for name, value in training.state().items()}
        again = Training(study_data.model(seed=9), pool.train, pool.train.all(), study_data.recipe(), seed=1)
        again.load_state(state, training.history)
        while again.epoch < 4:
            again.run_epoch()
        models.append(again.model.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_forget_clients_are_not_looked_at():
    pool, models = study_data.pool(), []
    for _ in range(2):
        model = study_data.model()
        Training(model, pool.train, pool.without([1]), study_data.recipe(), seed=0).run_epoch()
        models.append(model.state_dict())
        pool.train.images[pool.of_clients([1])] = 0
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_replayed_graphs_train_as_the_cpu_does(compiled):
    histories, models = [], []
    for device in ("cpu", "cuda"):
        # 3 batches of 16 and one of 12, the class loss alone first and then all of it: four graphs
        pool, model = study_data.pool(device=device), study_data.exact(study_data.model().to(device))
        training = Training(
            model, pool.train, pool.train.all(), study_data.recipe(), seed=0, compiled=compiled and device == "cuda"
        )
        while training.epoch < 4:
            training.run_epoch()
        histories.append(torch.tensor(training.history)[:, 0])
        models.append({name: value.cpu() for name, value in model.state_dict().items()})
    assert_close(histories[0], histories[1], rtol=1e-4, atol=1e-6)
    assert models[1]["stem.1.num_batches_tracked"] == models[0]["stem.1.num_batches_tracked"] == 16
    assert_close(models[0]["stem.0.weight"], models[1]["stem.0.weight"], rtol=0, atol=1e-5)
