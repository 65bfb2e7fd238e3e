"""Steps of the learning phase: base models, gold models, and their Fishers."""

from collections.abc import Sequence

from fedunlearn.data.batches import scale
from fedunlearn.runs import checkpoint
from fedunlearn.study.dag.steps import Desk, Step
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.roofline import matrix_rate, training_operations
from fedunlearn.study.pooled.scores import accuracies, score
from fedunlearn.study.pooled.training import Training
from fedunlearn.unlearning.pruning import prune_clients

FISHER = "fisher.safetensors"


def train(
    lab: Laboratory, desk: Desk, *, pipeline: str, seed: int, left: Sequence[int], stages: Sequence[Sequence[int]]
) -> dict:
    """Train on all clients but those in `left`, whose neurons are pruned; score the model as one of every stage."""
    recipe = lab.settings.recipe(pipeline)
    model = lab.new_model(pipeline, seed)
    prune_clients(model, left)
    indices = lab.pool.without(left)
    training = Training(model, lab.pool.train, indices, recipe, seed, compiled=lab.settings.learning.compile)
    if partial := desk.partial():
        training.load_state(*partial)
    operations = training_operations(lab.new_model(pipeline, seed), scale(lab.pool.train.images[:1])[0])
    while training.epoch < recipe.epochs:
        training.run_epoch()
        desk.save_partial(training.state(), training.history)
        speed = len(indices) / training.history[-1][-1]
        share = speed * operations / matrix_rate(lab.device, recipe.precision)
        rate = f", {speed:,.0f} images/s ({share:.0%} of the matrix rate)"
        desk.tick(training.epoch, recipe.epochs, "epoch", rate)
    answers = lab.answers(model)
    return {
        "files": lab.save(desk, model),
        "history": training.history,
        "learning": accuracies(answers.train, left) | {"test": answers.test.class_accuracy},
        "scores": [score(answers, forgotten, seed=seed) for forgotten in stages],
    }


def fisher(lab: Laboratory, desk: Desk, *, pipeline: str, head: str, clients: Sequence[int], base: Step) -> dict:
    """The Fisher of a base model, of the clients' examples."""
    values = lab.fisher(lab.load(desk, base, pipeline), head, lab.pool.of_clients(clients))
    return {"files": {FISHER: checkpoint.save(desk.folder / FISHER, values)}}
