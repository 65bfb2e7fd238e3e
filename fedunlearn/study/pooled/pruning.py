"""The step of the pruning ablation (paper, Section 6 and Table 18)."""

from collections.abc import Sequence

from fedunlearn.study.dag.steps import Desk, Step
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.learning import FISHER
from fedunlearn.study.pooled.sparsity import most_sensitive, prune_weights
from fedunlearn.unlearning.pruning import prune_clients


def prune(
    lab: Laboratory, desk: Desk, *, pipeline: str, method: str, share: float, retain_share: float, heads: bool,
    forgotten: Sequence[int], seed: int, base: Step, fisher_forget: Step, fisher_retain: Step,
) -> dict:  # fmt: skip
    """Prune and fine-tune; columns after the unlearning phase's usual number of epochs and at the end, by epoch."""
    settings, usual = lab.settings.ablation, lab.settings.finetuning.epochs
    model = lab.load(desk, base, pipeline)
    initial = dict(lab.new_model(pipeline, seed).named_parameters())
    of_forget, of_retain = (desk.tensors(step, FISHER, lab.device) for step in (fisher_forget, fisher_retain))
    pruned, masks = prune_weights(
        method,
        dict(model.named_parameters()),
        initial,
        most_sensitive(of_forget, of_retain, share),
        most_sensitive(of_retain, of_forget, retain_share),
        heads=heads,
    )
    model.load_state_dict(pruned, strict=False)
    prune_clients(model, forgotten)
    tuning = lab.fine_tuning(model, forgotten, 1.0, seed, masks)
    state, curve = desk.partial() or ({}, [lab.score(model, forgotten, seed)])
    if state:
        tuning.load_state(state)
    while tuning.epoch < settings.epochs:
        tuning.run_epoch()
        at_rest = tuning.epoch in (usual, settings.epochs)
        curve.append(lab.score(model, forgotten, seed) if at_rest else lab.accuracies(model, forgotten))
        desk.save_partial(tuning.state(), curve)
        desk.tick(tuning.epoch, settings.epochs, "epoch")
    return {"curve": curve}
