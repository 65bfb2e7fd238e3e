"""The steps of a study, from its settings: which models, from which, scored against which."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from pathlib import Path

from fedunlearn.study.dag.steps import Step
from fedunlearn.study.pooled.embeddings import clip_tsne, tsne
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.learning import fisher, train
from fedunlearn.study.pooled.pruning import prune
from fedunlearn.study.pooled.settings import OBJECTIVES, PIPELINES, READINGS, STAGES, Settings
from fedunlearn.study.pooled.sparsity import METHODS
from fedunlearn.study.pooled.unlearning import finetune, rebound, ssd

# images trained on that an image evaluated, a Fisher's image and a dampening are worth: for estimates alone
EVALUATION, FISHER, DAMPENING, PICTURE = 0.2, 2.2, 30, 5000

HISTORIES = ("plain", "tuned")


class Plan:
    """The steps of a study; each method gives the step that makes what it is named after."""

    def __init__(self, settings: Settings, lab: Laboratory) -> None:
        self.settings, self.lab = settings, lab
        self.order = settings.study.order
        self.images, self.test_images = len(lab.dataset.train.labels), len(lab.dataset.test.labels)

    def steps(self) -> list[Step]:
        """All steps of the wanted stages whose names match `study.only`; needs come before what needs them."""
        study = self.settings.study
        return [step for step in self.everything(study.stages) if fnmatchcase(step.name, study.only)]

    def everything(self, stages: Sequence[str] = STAGES) -> list[Step]:
        """All steps of the stages."""
        parts = {"train": self.training, "gold": self.golds, "unlearn": self.unlearning, "ablation": self.ablation}
        steps = [step for stage, made in parts.items() if stage in stages for step in made()]
        return list({step.key: step for step in steps}.values())

    def training(self) -> list[Step]:
        """The learning phase (Tables 3 and 4)."""
        return [self.base(pipeline, seed) for pipeline, seed in self._each()]

    def golds(self) -> list[Step]:
        """Every gold model."""
        return [self.gold(pipeline, stage, seed) for pipeline, seed in self._each() for stage in self._stages()]

    def unlearning(self) -> list[Step]:
        """Stages with and without fine-tuning (Tables 5-16), other objectives and heads (Section 4.4), Table 2."""
        steps = []
        for pipeline, seed in self._each():
            steps.append(self.fisher(pipeline, "class", "all", seed))
            for stage in self._stages():
                steps += [self.ssd(pipeline, stage, seed, history) for history in HISTORIES]
                steps.append(self.finetune(pipeline, stage, seed))
            steps += [self.ssd(pipeline, 1, seed, **search) for search in self.searches()]
            if pipeline != "no_mtl":
                other = "client" if self.settings.fisher.head == "class" else "class"
                steps += [self.fisher(pipeline, "client", "all", seed), self.ssd(pipeline, 1, seed, head=other)]
                steps.append(self.rebound(pipeline, seed))
        return steps + self.pictures()

    def ablation(self) -> list[Step]:
        """Pruning instead of dampening (Table 18)."""
        settings, pipeline = self.settings.ablation, self.settings.ablation.pipeline
        if pipeline not in self.settings.study.pipelines:
            return []
        steps = []
        for seed in self.settings.study.seeds:
            steps += [self.fisher(pipeline, "class", who, seed) for who in ("leaving", "staying")]
            for method, shares, heads in product(
                METHODS, zip(settings.shares, settings.retain_shares, strict=True), (True, False)
            ):
                steps.append(self.pruned(method, *shares, heads, seed))
        return steps

    def pictures(self) -> list[Step]:
        """t-SNE of one model before and after each stage (Figure 2), and of CLIP where a model is given."""
        study = self.settings.study
        pipeline, seed = study.pipelines[-1], study.seeds[0]
        models = [self.base(pipeline, seed), *(self.ssd(pipeline, stage, seed) for stage in self._stages())]
        work = partial(tsne, pipeline=pipeline, seed=seed, models=models)
        steps = [self._step(f"tsne/{pipeline}/seed{seed}", {}, models, work, PICTURE * len(models))]
        if study.clip:
            digest = hashlib.sha256(Path(study.clip).read_bytes()).hexdigest()
            settings = {"clip": digest, "data": self.lab.dataset.fingerprint}
            work = partial(clip_tsne, path=study.clip, seed=seed)
            steps.insert(0, self._step(f"tsne/clip/seed{seed}", settings, [], work, 4 * PICTURE))
        return steps

    def searches(self) -> list[dict[str, str]]:
        """The settings' own search, and those with the other objective and with the other reading of alpha."""
        own = {"objective": self.settings.search.objective, "reading": self.settings.search.reading}
        others = [{**own, "objective": o} for o in OBJECTIVES] + [{**own, "reading": r} for r in READINGS]
        return [own, *(search for search in others if search != own)]

    def base(self, pipeline: str, seed: int) -> Step:
        """The model that all clients have trained."""
        return self._trained(f"train/{pipeline}/seed{seed}", pipeline, seed, 0)

    def gold(self, pipeline: str, stage: int, seed: int) -> Step:
        """The model that nobody who left by that stage has trained."""
        left = "-".join(map(str, self.order[:stage]))
        return self._trained(f"gold/{pipeline}/{left}/seed{seed}", pipeline, seed, stage)

    def fisher(self, pipeline: str, head: str, who: str, seed: int) -> Step:
        """The base model's Fisher: of `all`, of the first one `leaving`, or of those `staying` then."""
        everybody, first = range(self.settings.clients), self.order[:1]
        clients = {"all": list(everybody), "leaving": first, "staying": [c for c in everybody if c not in first]}[who]
        base = self.base(pipeline, seed)
        work = partial(fisher, pipeline=pipeline, head=head, clients=clients, base=base)
        settings = {"fisher": self.settings.depends_on("fisher"), "head": head, "clients": clients}
        return self._step(f"fisher/{pipeline}/{head}/{who}/seed{seed}", settings, [base], work, FISHER * self.images)

    def ssd(
        self, pipeline: str, stage: int, seed: int, history: str = "plain", *, head: str = "", **search: str
    ) -> Step:
        """The unlearned model of a stage; its `history` is of models as unlearned (plain) or as fine-tuned (tuned).

        `head`, and settings of the `search`, replace those of the study.
        """
        head = "class" if pipeline == "no_mtl" else head or self.settings.fisher.head
        forgotten, gold = self.order[:stage], self.gold(pipeline, stage, seed)
        if stage == 1:
            history, previous = "plain", self.base(pipeline, seed)
        elif history == "tuned":
            previous = self.finetune(pipeline, stage - 1, seed)
        else:
            previous = self.ssd(pipeline, stage - 1, seed, history, head=head, **search)
        changed, full = replace(self.settings, search=replace(self.settings.search, **search)), None
        if stage == 1 or self.settings.fisher.full == "base":
            full = self.fisher(pipeline, head, "all", seed)
        work = partial(
            ssd, pipeline=pipeline, head=head, forgotten=forgotten, seed=seed, settings=changed.search,
            previous=previous, gold=gold, fisher=full,
        )  # fmt: skip
        settings = {"fisher": changed.depends_on("fisher"), "search": changed.depends_on("search")}
        settings |= {"head": head, "forgotten": forgotten}
        looked_at = 2 * (changed.search.sample or self.images) + self.owned(forgotten)
        cost = changed.search.trials * (DAMPENING + EVALUATION * looked_at) + FISHER * self.owned(forgotten[-1:])
        cost += 0 if full else FISHER * self.images
        needs = [previous, gold, *([full] if full else [])]
        kind = f"{head}-{changed.search.objective}-{changed.search.reading}"
        return self._step(f"ssd/{pipeline}/{history}/{kind}/stage{stage}/seed{seed}", settings, needs, work, cost)

    def finetune(self, pipeline: str, stage: int, seed: int) -> Step:
        """The nearest to gold of a stage's unlearned model and its fine-tuned versions."""
        forgotten, gold = self.order[:stage], self.gold(pipeline, stage, seed)
        unlearned = self.ssd(pipeline, stage, seed, "tuned")
        work = partial(finetune, pipeline=pipeline, forgotten=forgotten, seed=seed, unlearned=unlearned, gold=gold)
        tuning = self.settings.finetuning
        settings = {"finetuning": asdict(tuning), "recipe": self._recipe(pipeline), "forgotten": forgotten}
        grid = len(tuning.class_weights) * (1 if pipeline == "no_mtl" else len(tuning.subset_weights))
        cost = grid * tuning.epochs * (self.images + EVALUATION * self._seen())
        return self._step(f"finetune/{pipeline}/stage{stage}/seed{seed}", settings, [unlearned, gold], work, cost)

    def rebound(self, pipeline: str, seed: int) -> Step:
        """What happens without pruning (Table 2)."""
        unlearned = self.ssd(pipeline, 1, seed, head="class")
        work = partial(rebound, pipeline=pipeline, forgotten=self.order[:1], seed=seed, unlearned=unlearned)
        settings = {"lr": self.settings.finetuning.lr, "recipe": self._recipe(pipeline)}
        return self._step(f"rebound/{pipeline}/seed{seed}", settings, [unlearned], work, self.images + 2 * self._seen())

    def pruned(self, method: str, share: float, retain_share: float, heads: bool, seed: int) -> Step:
        """One row of Table 18."""
        pipeline, tuning = self.settings.ablation.pipeline, self.settings.finetuning
        base = self.base(pipeline, seed)
        leaving, staying = (self.fisher(pipeline, "class", who, seed) for who in ("leaving", "staying"))
        if method == "DeepClean":
            retain_share = 0.0  # it does not look at them
        about = {"method": method, "share": share, "retain_share": retain_share, "heads": heads}
        work = partial(
            prune, pipeline=pipeline, **about, forgotten=self.order[:1], seed=seed,
            base=base, fisher_forget=leaving, fisher_retain=staying,
        )  # fmt: skip
        epochs = self.settings.ablation.epochs
        settings = {**about, "epochs": epochs, "usual": tuning.epochs, "lr": tuning.lr, "recipe": self._recipe("ce")}
        name = (
            f"prune/{method.replace(' ', '-')}/{share:g}-{retain_share:g}/{'all' if heads else 'backbone'}/seed{seed}"
        )
        cost = epochs * (self.images + EVALUATION * self._seen())
        return self._step(name, settings, [base, leaving, staying], work, cost)

    def _trained(self, name: str, pipeline: str, seed: int, stage: int) -> Step:
        left, stages = self.order[:stage], [self.order[:t] for t in self._stages()]
        stages = stages if stage == 0 else [left]
        work = partial(train, pipeline=pipeline, seed=seed, left=left, stages=stages)
        s = self.settings
        data = {"data": self.lab.dataset.fingerprint, "clients": s.clients, "partition": asdict(s.partition)}
        settings = {**data, "model": asdict(s.model), "recipe": self._recipe(pipeline), "stages": stages, "left": left}
        kept = self.images - self.owned(left)
        return self._step(name, settings, [], work, s.learning.epochs * kept + EVALUATION * self._seen())

    def _step(self, name: str, settings: dict, needs: list[Step], work: Callable, cost: float) -> Step:
        return Step(name, settings, tuple(needs), partial(work, self.lab), cost)

    def _each(self) -> list[tuple[str, int]]:
        chosen = [pipeline for pipeline in PIPELINES if pipeline in self.settings.study.pipelines]
        return [(pipeline, seed) for seed in self.settings.study.seeds for pipeline in chosen]

    def _stages(self) -> range:
        return range(1, len(self.order) + 1)

    def owned(self, clients: Sequence[int]) -> int:
        """Their training images."""
        return sum(len(self.lab.slices[client]) for client in clients)

    def _seen(self) -> int:
        return self.images + self.test_images

    def _recipe(self, pipeline: str) -> dict:
        return asdict(self.settings.recipe(pipeline))
