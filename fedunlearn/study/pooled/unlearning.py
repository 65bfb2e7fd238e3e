"""Steps of the unlearning phase: SSD with its search, fine-tuning, and what Table 2 shows."""

from collections.abc import Sequence

import torch

from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.nn.rng import generator_of
from fedunlearn.study.dag.steps import Desk, Step
from fedunlearn.study.pooled.finetuning import adversarial_weight
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.learning import FISHER
from fedunlearn.study.pooled.scores import Answers, Scores, accuracies, column_weights, deviation, score
from fedunlearn.study.pooled.search import best, search
from fedunlearn.study.pooled.settings import Search
from fedunlearn.unlearning import batch_norm, dampening
from fedunlearn.unlearning.pruning import prune_clients

UNPRUNED = "unpruned.safetensors"
TRIALS = "trials.jsonl"


def ssd(
    lab: Laboratory, desk: Desk, *, pipeline: str, head: str, forgotten: Sequence[int], seed: int,
    settings: Search, previous: Step, gold: Step, fisher: Step | None,
) -> dict:  # fmt: skip
    """SSD on the previous stage's model with the best alpha and lambda found, then pruning (Algorithm 1, lines 4-5).

    Without a `fisher`, F_D is of the previous stage's model, over the clients that were there until now.
    """
    client, model = forgotten[-1], lab.load(desk, previous, pipeline)
    before = model_state(model)
    fisher_forget = lab.fisher(model, head, lab.pool.of_clients([client]))
    if fisher:
        fisher_full = desk.tensors(fisher, FISHER, lab.device)
    else:
        fisher_full = lab.fisher(model, head, lab.pool.without(forgotten[:-1]))
    gold_scores = trial_scores(lab, settings, lab.load(desk, gold, pipeline), forgotten, seed)

    def dampen(pruned: Sequence[int], **parameters: float) -> None:
        model.load_state_dict(before)
        dampening.step(model, fisher_full, fisher_forget, pruned, **({"alpha": settings.threshold} | parameters))
        if settings.recalibrate:
            images = (batch[0] for batch in lab.pool.train.batches(shuffled(lab.pool.without(forgotten), seed)))
            batch_norm.recalibrate(model, batch_norm.batch_moments(model, images, precision=lab.precision))

    def objective(**parameters: float) -> tuple[float, dict]:
        dampen([client], **parameters)
        scores = trial_scores(lab, settings, model, forgotten, seed)
        return deviation(scores, gold_scores, column_weights(settings, forgotten)), {"scores": scores}

    ranges = ranges_of(settings)
    trials = search(
        ranges,
        objective,
        trials=settings.trials,
        file=desk.folder / TRIALS,
        seed=seed,
        tick=lambda done: desk.tick(done, settings.trials, "trial"),
    )
    chosen = best(trials)
    dampen([], **{name: chosen[name] for name in ranges})
    files = lab.save(desk, model, UNPRUNED)
    prune_clients(model, [client])
    return {"files": files | lab.save(desk, model), "best": chosen, "scores": [lab.score(model, forgotten, seed)]}


def ranges_of(settings: Search) -> dict[str, tuple[float, float]]:
    """What is searched: the paper's alpha is the selection threshold (Eq. 8) or the exponent of the factor (Eq. 9)."""
    name = "alpha" if settings.reading == "threshold" else "exponent"
    alpha, lambda_ = (settings.alpha_low, settings.alpha_high), (settings.lambda_low, settings.lambda_high)
    return {name: alpha, "lambda_": lambda_}


def trial_scores(
    lab: Laboratory, settings: Search, model: TwoHeadResNet18, forgotten: Sequence[int], seed: int
) -> Scores:
    """The columns that the objective needs, on all examples that left and on `settings.sample` of the others."""
    most = settings.sample or None
    indices = torch.cat([lab.pool.of_clients(forgotten), shuffled(lab.pool.without(forgotten), seed)[:most]])
    train = lab.pool.predict(model, indices, lab.precision)
    if settings.objective == "forgotten":
        return accuracies(train, forgotten)
    test = lab.pool.count_test(model, lab.precision, shuffled(lab.pool.test.all(), seed)[:most])
    return score(Answers(train, test), forgotten, seed=seed)


def finetune(
    lab: Laboratory, desk: Desk, *, pipeline: str, forgotten: Sequence[int], seed: int, unlearned: Step, gold: Step
) -> dict:
    """The grid's checkpoint nearest to gold (Algorithm 1, line 6); the unlearned model itself is a candidate.

    Nearest is the smallest sum of deviations over all accuracies of the paper's tables. a_f is taken before each epoch.
    """
    settings, client = lab.settings.finetuning, forgotten[-1]
    model = lab.load(desk, unlearned, pipeline)
    before = model_state(model)
    gold_scores = desk.result(gold)["scores"][0]
    grid = [(a, s) for a in settings.class_weights for s in (settings.subset_weights if model.client_head else [0.0])]

    def candidate(**about: float) -> dict:
        scores = lab.accuracies(model, forgotten)
        everything = dict.fromkeys(scores, 1.0)
        return {**about, "scores": scores, "deviation": deviation(scores, gold_scores, everything)}

    state, rows = desk.partial() or ({}, [candidate(epochs=0)])
    nearest = {name[8:]: value for name, value in state.items() if name.startswith("nearest.")} or before
    for place in range((len(rows) - 1) // settings.epochs, len(grid)):
        class_weight, subset_weight = grid[place]
        model.load_state_dict(before)
        tuning = lab.fine_tuning(model, forgotten, subset_weight, seed)
        if (len(rows) - 1) % settings.epochs:
            tuning.load_state({name[7:]: value for name, value in state.items() if name.startswith("tuning.")})
        while tuning.epoch < settings.epochs:
            accuracy = lab.forget_accuracy(model, client)
            tuning.run_epoch(adversarial_weight(accuracy, gold_scores[f"client_{client}"], class_weight))
            row = candidate(epochs=tuning.epoch, class_weight=class_weight, subset_weight=subset_weight)
            if row["deviation"] < min(r["deviation"] for r in rows):
                nearest = model_state(model)
            rows.append(row)
            desk.save_partial({"nearest": nearest, "tuning": tuning.state()}, rows)
            desk.tick(len(rows) - 1, len(grid) * settings.epochs, "epoch of the grid")
    model.load_state_dict(nearest)
    chosen = min(rows, key=lambda row: row["deviation"])
    scores = [lab.score(model, forgotten, seed)]
    return {"files": lab.save(desk, model), "chosen": chosen, "candidates": rows, "scores": scores}


def rebound(
    lab: Laboratory, desk: Desk, *, pipeline: str, forgotten: Sequence[int], seed: int, unlearned: Step
) -> dict:
    """Without pruning, after SSD and again after one epoch of fine-tuning on the retain set (Table 2)."""
    model = lab.load(desk, unlearned, pipeline, UNPRUNED)
    after_ssd = lab.accuracies(model, forgotten)
    lab.fine_tuning(model, forgotten, 1.0, seed).run_epoch()
    return {"after_ssd": after_ssd, "after_epoch": lab.accuracies(model, forgotten)}


def model_state(model: TwoHeadResNet18) -> dict[str, torch.Tensor]:
    """A copy."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def shuffled(indices: torch.Tensor, seed: int) -> torch.Tensor:
    """In a random order."""
    return indices[torch.randperm(len(indices), generator=generator_of(seed))]
