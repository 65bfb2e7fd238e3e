"""What dampening finds of a memorised client, its classes or its images: `python -m benchmarks.dampening SETTINGS`.

The settings are those of a federated study whose bases are trained. The weights of the largest F_f / F_D are set to
zero, as many as it takes until the first client of `study.order` is known no better than held-out images of its classes
were. F_D is taken of all images, of predictions as they are or softened, or of the retain clients' images in the class
mix of the client. Then BatchNorm statistics are estimated again, and each class is looked at alone.
"""

import argparse
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import timing
from fedunlearn.nn.evaluate import Counts, Predictions, predict
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.runs import checkpoint
from fedunlearn.study.dag.command import study_folder
from fedunlearn.study.federated.runs import file_of
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.pooled.pool import EVALUATION_BATCH, Pool
from fedunlearn.unlearning import batch_norm
from fedunlearn.unlearning.dampening import dampen
from fedunlearn.unlearning.fisher import diagonal_fisher

KINDS = {"all images": (1.0, False), "all images, softened": (4.0, False), "its class mix, softened": (4.0, True)}
HALVINGS = 9
STATISTICS, FISHER = 0.1, 0.3  # of the retain clients' images
FEWEST = 10  # images of a class that the client must have for a row
Fisher = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A base model, the client that it is to forget, and everybody's images."""

    model: TwoHeadModel
    pool: Pool
    client: int
    classes: int

    def by_class(self, indices: Tensor, temperature: float) -> list[tuple[int, Fisher]]:
        """Give the number of images, and their mean diagonal Fisher, of every class."""
        labels, model = self.pool.train.labels[indices], copy.deepcopy(self.model)
        for p in model.class_head.out.parameters():
            p.data /= temperature
        parts = [indices[labels == k] for k in range(self.classes)]
        return [
            (len(part), diagonal_fisher(model, self.pool.train.batches(part, EVALUATION_BATCH)) if len(part) else {})
            for part in parts
        ]

    def predictions(self) -> Predictions:
        """Predict all training images."""
        return self.pool.predict(self.model, self.pool.train.all(), "fp32")


def main() -> None:
    """Print a row for every seed, kind of F_D and class."""
    p = argparse.ArgumentParser("python -m benchmarks.dampening", description=__doc__)
    p.add_argument("settings", nargs="+")
    study = FederatedStudy(p.parse_args().settings)
    settings, workspace, root = study.settings, study.workspace, study_folder(study)  # type: ignore[arg-type]
    torch.set_num_threads(settings.train.threads)
    client, rows, totals = settings.study.order[0], [], []
    for seed in settings.study.seeds:
        model = workspace.new_model("ce_dl", seed)
        file = study.plan.base("ce_dl", seed).folder(root) / file_of(settings.rounds)
        tensors, _ = checkpoint.read_tensors(file, hint="train the study's base first")
        model.load_state_dict({name: tensors[name] for name in model.state_dict()})
        case = Case(model, workspace.pool, client, len(workspace.dataset.class_names))
        start = {name: value.clone() for name, value in model.state_dict().items()}
        before = case.predictions()
        held_out = predict(model, case.pool.test.batches(case.pool.test.all()))
        aim = held_out.expected_accuracy(workspace.class_counts(client))
        for kind, (temperature, matched) in KINDS.items():
            model.load_state_dict(start)
            ratios = ratios_of(case, temperature, matched=matched)
            fraction = zero_until(case, start, ratios, aim)
            after, tested = case.predictions(), case.pool.count_test(model, "fp32").class_accuracy
            both = [accuracies(found, client) for found in (before, after)]
            totals.append([str(seed), kind, f"{fraction:.2%}", *map(shown, summary(both)), shown(tested)])
            for k, count in enumerate(workspace.class_counts(client).tolist()):
                if count >= FEWEST:
                    numbers = [shown(each[k].class_accuracy) for pair in both for each in pair]
                    rows.append([str(seed), kind, workspace.dataset.class_names[k], str(count), *numbers])
    title = f"client {client}, weights zeroed until it is known as held-out images are ({root.name})"
    timing.table(
        title, ("seed", "F_D of", "zeroed", "client before", "after", "retain before", "after", "test"), totals
    )
    columns = ("seed", "F_D of", "class", "images", "client before", "retain before", "client after", "retain after")
    timing.table(title, columns, rows)


def ratios_of(case: Case, temperature: float, *, matched: bool) -> Fisher:
    """Give F_f / F_D of every weight."""
    pool, generator = case.pool, torch.Generator().manual_seed(0)
    retain = pool.without([case.client])
    some = retain[torch.randperm(len(retain), generator=generator)[: round(FISHER * len(retain))]]
    own, others = (case.by_class(indices, temperature) for indices in (pool.of_clients([case.client]), some))
    forget = weighted(own, [n for n, _ in own])
    if matched:
        full = weighted(others, [n for n, _ in own])
    else:
        scale = len(retain) / len(some)
        full = weighted([*own, *others], [*(n for n, _ in own), *(scale * n for n, _ in others)])
    return {name: (value / full[name]).nan_to_num(0.0, posinf=math.inf) for name, value in forget.items()}


def weighted(parts: list[tuple[int, Fisher]], weights: list[float]) -> Fisher:
    """Give the mean of Fishers, those of no images left out."""
    there = [(w, fisher) for w, (n, fisher) in zip(weights, parts, strict=True) if n and fisher and w]
    total = sum(w for w, _ in there)
    return {name: sum(w * fisher[name] for w, fisher in there) / total for name in there[0][1]}  # type: ignore[misc]


def zero_until(case: Case, start: Mapping[str, Tensor], ratios: Fisher, aim: float) -> float:
    """Zero the weights of the largest ratios, the fewest for which the client is known no better than `aim`."""
    ordered = torch.cat([value.flatten() for value in ratios.values()]).sort(descending=True).values
    low, high = 1e-5, 0.3
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        apply(case, start, ratios, float(ordered[round(middle * len(ordered))]))
        found = case.pool.predict(case.model, case.pool.of_clients([case.client]), "fp32").total.class_accuracy
        low, high = (low, middle) if found <= aim else (middle, high)
    apply(case, start, ratios, float(ordered[round(high * len(ordered))]))
    return high


def apply(case: Case, start: Mapping[str, Tensor], ratios: Fisher, alpha: float) -> None:
    """Zero every weight whose ratio is above alpha, and estimate BatchNorm statistics on retain clients' images."""
    case.model.load_state_dict(start)
    params = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    ones = {name: torch.ones_like(value) for name, value in ratios.items()}
    bounded = {name: value.clamp(max=1e30) for name, value in ratios.items()}
    case.model.load_state_dict(dampen(params, ones, bounded, alpha=alpha, lambda_=0.0), strict=False)
    retain = case.pool.without([case.client])
    chosen = retain[torch.randperm(len(retain), generator=torch.Generator().manual_seed(1))]
    batches = case.pool.train.batches(chosen[: round(STATISTICS * len(retain))], 32)
    batch_norm.recalibrate(case.model, batch_norm.batch_statistics(case.model, (images for images, _, _ in batches)))


def accuracies(found: Predictions, client: int) -> tuple[list[Counts], list[Counts]]:
    """Count hits by class, of the client's images and of everybody else's."""
    hits = found.class_probs.argmax(1) == found.class_labels
    both = []
    for mine in (found.client_ids == client, found.client_ids != client):
        classes = [mine & (found.class_labels == k) for k in range(found.class_probs.shape[1])]
        both.append([Counts(int(chosen.sum()), 0.0, int(hits[chosen].sum())) for chosen in classes])
    return both[0], both[1]


def summary(both: list[tuple[list[Counts], list[Counts]]]) -> list[float]:
    """Give the accuracies of the client before and after, and of the others."""
    return [sum(both[when][who], Counts()).class_accuracy for who in (0, 1) for when in (0, 1)]


def shown(value: float) -> str:
    """Write an accuracy."""
    return f"{value:.3f}"


if __name__ == "__main__":
    main()
