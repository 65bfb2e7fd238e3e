"""Tasks of the unlearning phase: SSD with its search, fine-tuning, and what Table 2 shows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.nn.rng import generator_of
from fedunlearn.study.dag.settings import Pipeline
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.pooled.finetuning import FineTuning, adversarial_weight
from fedunlearn.study.pooled.learning import FISHER
from fedunlearn.study.pooled.scores import AllPredictions, Scores, accuracies, column_weights, deviation, score
from fedunlearn.study.pooled.search import best, search
from fedunlearn.study.pooled.settings import Head, Search
from fedunlearn.study.pooled.workspace import PaperWorkspace
from fedunlearn.unlearning import batch_norm, dampening
from fedunlearn.unlearning.pruning import prune_clients

UNPRUNED = "unpruned.safetensors"
TRIALS = "trials.jsonl"


def ssd(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    loss_head: Head,
    forgotten: Sequence[int],
    seed: int,
    settings: Search,
    previous: Task,
    retrained: Task,
    fisher: Task | None,
) -> dict[str, Any]:
    """Dampen the previous stage's model with the best alpha and lambda found, then prune (Algorithm 1, lines 4-5).

    Args:
        forgotten: in order, the clients that are forgotten by the end of this stage.
        fisher: gives F_D; without it F_D is of the previous stage's model, over the clients that it still knows.
    """
    client, model = forgotten[-1], workspace.load(context, previous, pipeline)
    dampen = _dampening(workspace, context, model, loss_head, forgotten, seed, settings, fisher)
    target = trial_scores(workspace, settings, workspace.load(context, retrained, pipeline), forgotten, seed)

    def objective(**parameters: float) -> tuple[float, dict]:
        dampen([client], **parameters)
        scores = trial_scores(workspace, settings, model, forgotten, seed)
        return deviation(scores, target, column_weights(settings, forgotten)), {"scores": scores}

    ranges = ranges_of(settings)
    trials = search(
        ranges,
        objective,
        trials=settings.trials,
        file=context.folder / TRIALS,
        seed=seed,
        tick=lambda done: context.tick(done, settings.trials, "trial"),
    )
    chosen = best(trials)
    dampen([], **{name: chosen[name] for name in ranges})
    files = workspace.save(context, model, UNPRUNED)
    prune_clients(model, [client])
    return {
        "files": files | workspace.save(context, model),
        "best": chosen,
        "scores": [workspace.score(model, forgotten, seed)],
    }


def _dampening(
    workspace: PaperWorkspace,
    context: TaskContext,
    model: TwoHeadModel,
    loss_head: Head,
    forgotten: Sequence[int],
    seed: int,
    settings: Search,
    fisher: Task | None,
) -> Callable[..., None]:
    """Give a function `(pruned clients, **parameters)` that dampens the model as it is now, in place, and prunes it."""
    before, pool = model_state(model), workspace.pool
    fisher_forget = workspace.fisher(model, loss_head, pool.of_clients(forgotten[-1:]))
    if fisher:
        fisher_full = context.tensors(fisher, FISHER, workspace.device)
    else:
        fisher_full = workspace.fisher(model, loss_head, pool.without(forgotten[:-1]))

    def dampen(pruned: Sequence[int], **parameters: float) -> None:
        model.load_state_dict(before)
        dampening.dampen_and_prune(
            model, fisher_full, fisher_forget, pruned, **({"alpha": settings.threshold} | parameters)
        )
        if settings.recalibrate:
            images = (batch[0] for batch in pool.train.batches(shuffled(pool.without(forgotten), seed)))
            statistics = batch_norm.batch_statistics(model, images, precision=workspace.precision)
            batch_norm.recalibrate(model, statistics)

    return dampen


def ranges_of(settings: Search) -> dict[str, tuple[float, float]]:
    """Say what is searched: the paper's alpha is the threshold (Eq. 8) or the exponent of the factor (Eq. 9)."""
    name = "alpha" if settings.reading == "threshold" else "exponent"
    alpha, lambda_ = (settings.alpha_low, settings.alpha_high), (settings.lambda_low, settings.lambda_high)
    return {name: alpha, "lambda_": lambda_}


def trial_scores(
    workspace: PaperWorkspace, settings: Search, model: TwoHeadModel, forgotten: Sequence[int], seed: int
) -> Scores:
    """Give the columns that the objective needs, on all forgotten examples and on `settings.sample` of the rest."""
    pool, most = workspace.pool, settings.sample or None
    indices = torch.cat([pool.of_clients(forgotten), shuffled(pool.without(forgotten), seed)[:most]])
    train = pool.predict(model, indices, workspace.precision)
    if settings.objective == "forgotten":
        return accuracies(train, forgotten)
    test = pool.count_test(model, workspace.precision, shuffled(pool.test.all(), seed)[:most])
    return score(AllPredictions(train, test), forgotten, seed=seed)


def finetune(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    forgotten: Sequence[int],
    seed: int,
    unlearned: Task,
    retrained: Task,
) -> dict[str, Any]:
    """Choose the grid's checkpoint nearest to the retrained model (Algorithm 1, line 6).

    The unlearned model itself is a candidate. Nearest is the smallest sum of deviations over all accuracies of the
    paper's tables. a_f is taken before each epoch.
    """
    settings, client = workspace.settings.finetuning, forgotten[-1]
    model = workspace.load(context, unlearned, pipeline)
    before, target = model_state(model), context.result(retrained)["scores"][0]
    grid = [(a, s) for a in settings.class_weights for s in (settings.subset_weights if model.client_head else [0.0])]

    def candidate(**about: float) -> dict[str, Any]:
        scores = workspace.accuracies(model, forgotten)
        return {**about, "scores": scores, "deviation": deviation(scores, target, dict.fromkeys(scores, 1.0))}

    state, rows = context.partial() or ({}, [candidate(epochs=0)])
    nearest = _part("nearest", state) or before
    for place in range((len(rows) - 1) // settings.epochs, len(grid)):
        class_weight, subset_weight = grid[place]
        model.load_state_dict(before)
        tuning = workspace.fine_tuning(model, forgotten, subset_weight, seed)
        if (len(rows) - 1) % settings.epochs:
            tuning.load_state(_part("tuning", state))
        while tuning.epoch < settings.epochs:
            _tune(workspace, model, tuning, client, target[f"client_{client}"], class_weight)
            row = candidate(epochs=tuning.epoch, class_weight=class_weight, subset_weight=subset_weight)
            if row["deviation"] < min(r["deviation"] for r in rows):
                nearest = model_state(model)
            rows.append(row)
            context.save_partial({"nearest": nearest, "tuning": tuning.state()}, rows)
            context.tick(len(rows) - 1, len(grid) * settings.epochs, "epoch of the grid")
    model.load_state_dict(nearest)
    chosen = min(rows, key=lambda row: row["deviation"])
    scores = [workspace.score(model, forgotten, seed)]
    return {"files": workspace.save(context, model), "chosen": chosen, "candidates": rows, "scores": scores}


def _tune(
    workspace: PaperWorkspace,
    model: TwoHeadModel,
    tuning: FineTuning,
    client: int,
    base: float,
    class_weight: float,
) -> None:
    """Fine-tune for an epoch, against the forget set as far as the model still does better on it than `base`."""
    accuracy = workspace.forget_accuracy(model, client)
    tuning.run_epoch(adversarial_weight(accuracy, base, class_weight))


def rebound(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    forgotten: Sequence[int],
    seed: int,
    unlearned: Task,
) -> dict[str, Any]:
    """Score without pruning, after SSD and again after one epoch of fine-tuning on the retain set (Table 2)."""
    model = workspace.load(context, unlearned, pipeline, UNPRUNED)
    after_ssd = workspace.accuracies(model, forgotten)
    workspace.fine_tuning(model, forgotten, 1.0, seed).run_epoch()
    return {"after_ssd": after_ssd, "after_epoch": workspace.accuracies(model, forgotten)}


def model_state(model: TwoHeadModel) -> dict[str, Tensor]:
    """Copy the model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def shuffled(indices: Tensor, seed: int) -> Tensor:
    """Put indices into a random order."""
    return indices[torch.randperm(len(indices), generator=generator_of(seed))]


def _part(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the tensors whose names begin with `name` and a point, without these."""
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}
