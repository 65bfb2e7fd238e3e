"""The task of the pruning ablation (paper, Section 6 and Table 18)."""

from collections.abc import Sequence
from typing import Any

from fedunlearn.study.dag.settings import Pipeline
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.pooled.learning import FISHER
from fedunlearn.study.pooled.sparsity import most_sensitive, prune_weights
from fedunlearn.study.pooled.workspace import PaperWorkspace
from fedunlearn.unlearning.pruning import prune_clients


def prune(
    workspace: PaperWorkspace,
    context: TaskContext,
    *,
    pipeline: Pipeline,
    method: str,
    fraction: float,
    retain_fraction: float,
    heads: bool,
    forgotten: Sequence[int],
    seed: int,
    base: Task,
    fisher_forget: Task,
    fisher_retain: Task,
) -> dict[str, Any]:
    """Prune the base model's weights and fine-tune the rest; gives the score columns by epoch.

    MIA accuracy is among them after the unlearning phase's usual number of epochs, and at the end.
    """
    settings, usual = workspace.settings.ablation, workspace.settings.finetuning.epochs
    model = workspace.load(context, base, pipeline)
    initial = dict(workspace.new_model(pipeline, seed).named_parameters())
    of_forget = context.tensors(fisher_forget, FISHER, workspace.device)
    of_retain = context.tensors(fisher_retain, FISHER, workspace.device)
    pruned, masks = prune_weights(
        method,
        dict(model.named_parameters()),
        initial,
        most_sensitive(of_forget, of_retain, fraction),
        most_sensitive(of_retain, of_forget, retain_fraction),
        heads=heads,
    )
    model.load_state_dict(pruned, strict=False)
    prune_clients(model, forgotten)
    tuning = workspace.fine_tuning(model, forgotten, 1.0, seed, masks)
    state, curve = context.partial() or ({}, [workspace.score(model, forgotten, seed)])
    if state:
        tuning.load_state(state)
    while tuning.epoch < settings.epochs:
        tuning.run_epoch()
        attacked = tuning.epoch in (usual, settings.epochs)
        curve.append(workspace.score(model, forgotten, seed) if attacked else workspace.accuracies(model, forgotten))
        context.save_partial(tuning.state(), curve)
        context.tick(tuning.epoch, settings.epochs, "epoch")
    return {"curve": curve}
