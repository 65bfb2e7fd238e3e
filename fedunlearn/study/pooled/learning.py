"""Tasks of the learning phase: base models, retrained models, and their Fishers."""

from collections.abc import Sequence
from typing import Any

from fedunlearn.data.batches import scale
from fedunlearn.runs import checkpoint
from fedunlearn.study.dag.settings import Pipeline
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.pooled.roofline import matrix_rate, training_operations
from fedunlearn.study.pooled.scores import accuracies, score
from fedunlearn.study.pooled.settings import Head
from fedunlearn.study.pooled.training import Training
from fedunlearn.study.pooled.workspace import PaperWorkspace
from fedunlearn.unlearning.pruning import prune_clients

FISHER = "fisher.safetensors"


def train(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    seed: int,
    forgotten: Sequence[int],
    stages: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Train on all clients but those in `forgotten`, whose neurons are pruned.

    Args:
        stages: the forgotten clients of every stage that the model is scored as a model of.
    """
    recipe = workspace.settings.recipe(pipeline)
    model = workspace.new_model(pipeline, seed)
    prune_clients(model, forgotten)
    indices = workspace.pool.without(forgotten)
    compiled = workspace.settings.learning.compile
    training = Training(model, workspace.pool.train, indices, recipe, seed, compiled=compiled)
    if partial := context.partial():
        training.load_state(*partial)
    image = scale(workspace.pool.train.images[:1])[0]
    operations = training_operations(workspace.new_model(pipeline, seed), image)
    while training.epoch < recipe.epochs:
        training.run_epoch()
        context.save_partial(training.state(), training.history)
        speed = len(indices) / training.history[-1][-1]
        fraction = speed * operations / matrix_rate(workspace.device, recipe.precision)
        rate = f", {speed:,.0f} images/s ({fraction:.0%} of the matrix rate)"
        context.tick(training.epoch, recipe.epochs, "epoch", rate)
    predictions = workspace.predictions(model)
    return {
        "files": workspace.save(context, model),
        "history": training.history,
        "learning": accuracies(predictions.train, forgotten) | {"test": predictions.test.class_accuracy},
        "scores": [score(predictions, of_stage, seed=seed) for of_stage in stages],
    }


def fisher(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    loss_head: Head,
    clients: Sequence[int],
    base: Task,
) -> dict[str, Any]:
    """Compute the Fisher of a base model, of the clients' examples."""
    model = workspace.load(context, base, pipeline)
    values = workspace.fisher(model, loss_head, workspace.pool.of_clients(clients))
    return {"files": {FISHER: checkpoint.save(context.folder / FISHER, values)}}
