"""The tasks of the paper's study, from its settings: which models, from which, scored against which."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from fedunlearn.runs.files import sha256_of
from fedunlearn.study.dag.settings import PIPELINES, Pipeline, defaults_of
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.pooled.embeddings import clip_tsne, tsne
from fedunlearn.study.pooled.learning import fisher, train
from fedunlearn.study.pooled.pruning import prune
from fedunlearn.study.pooled.settings import OBJECTIVES, READINGS, STAGES, Head, PaperSettings, Search
from fedunlearn.study.pooled.sparsity import METHODS
from fedunlearn.study.pooled.unlearning import finetune, rebound, ssd
from fedunlearn.study.pooled.workspace import PaperWorkspace

# images trained on that an image evaluated, a Fisher's image and a dampening are worth: for estimates alone
EVALUATION, FISHER, DAMPENING, PICTURE = 0.2, 2.2, 30, 5000

History = Literal["plain", "tuned"]
Who = Literal["all", "forget", "retain"]


class Plan:
    """The tasks of the paper's study; each method gives the task that makes what it is named after."""

    def __init__(self, settings: PaperSettings, workspace: PaperWorkspace) -> None:
        self.settings, self.workspace = settings, workspace
        self.order = settings.study.order
        self.images, self.test_images = len(workspace.dataset.train.labels), len(workspace.dataset.test.labels)

    def tasks(self, stages: Sequence[str] = STAGES) -> list[Task]:
        """Give all tasks of the stages; needs come before what needs them."""
        parts = {
            "train": self.training,
            "retrain": self.retraining,
            "unlearn": self.unlearning,
            "ablation": self.ablation,
        }
        tasks = [task for stage, made in parts.items() if stage in stages for task in made()]
        return list({task.key: task for task in tasks}.values())

    def training(self) -> list[Task]:
        """Give the tasks of the learning phase (Tables 3 and 4)."""
        return [self.base(pipeline, seed) for pipeline, seed in self._each()]

    def retraining(self) -> list[Task]:
        """Give the tasks of every retrained model."""
        return [self.retrained(pipeline, stage, seed) for pipeline, seed in self._each() for stage in self._stages()]

    def unlearning(self) -> list[Task]:
        """Give the tasks of the unlearning phase.

        They are stages with and without fine-tuning (Tables 5-16), other objectives and heads (Section 4.4), Table 2.
        """
        tasks = []
        for pipeline, seed in self._each():
            tasks.append(self.fisher(pipeline, "class", "all", seed))
            for stage in self._stages():
                tasks += [self.ssd(pipeline, stage, seed, history) for history in get_args(History)]
                tasks.append(self.finetune(pipeline, stage, seed))
            tasks += [self.ssd(pipeline, 1, seed, search=search) for search in self.searches()]
            if pipeline != "no_mtl":
                other: Head = "client" if self.settings.fisher.loss_head == "class" else "class"
                tasks += [self.fisher(pipeline, "client", "all", seed), self.ssd(pipeline, 1, seed, loss_head=other)]
                tasks.append(self.rebound(pipeline, seed))
        return tasks + self.pictures()

    def ablation(self) -> list[Task]:
        """Give the tasks of pruning instead of dampening (Table 18)."""
        settings, pipeline = self.settings.ablation, self.settings.ablation.pipeline
        if pipeline not in self.settings.study.pipelines:
            return []
        pairs = list(zip(settings.fractions, settings.retain_fractions, strict=True))
        tasks = []
        for seed in self.settings.study.seeds:
            tasks += [self.fisher(pipeline, "class", who, seed) for who in ("forget", "retain")]
            for method, fractions, heads in product(METHODS, pairs, (True, False)):
                tasks.append(self.pruned(method, *fractions, heads, seed))
        return tasks

    def pictures(self) -> list[Task]:
        """Give t-SNE of one model before and after each stage (Figure 2), and of CLIP where a model is given."""
        study = self.settings.study
        pipeline, seed = study.pipelines[-1], study.seeds[0]
        models = [self.base(pipeline, seed), *(self.ssd(pipeline, stage, seed) for stage in self._stages())]
        work = partial(tsne, pipeline=pipeline, seed=seed, models=models)
        tasks = [self._task(f"tsne/{pipeline}/seed{seed}", {}, models, work, PICTURE * len(models))]
        if study.clip:
            digest = sha256_of(Path(study.clip))
            settings = {"clip": digest, "data": self.workspace.dataset.fingerprint}
            work = partial(clip_tsne, path=study.clip, seed=seed)
            tasks.insert(0, self._task(f"tsne/clip/seed{seed}", settings, [], work, 4 * PICTURE))
        return tasks

    def searches(self) -> list[Search]:
        """Give the settings' own search, and those with the other objective and with the other reading of alpha."""
        own = self.settings.search
        changed = [own.model_copy(update={"objective": objective}) for objective in OBJECTIVES]
        changed += [own.model_copy(update={"reading": reading}) for reading in READINGS]
        return [own, *(search for search in changed if search != own)]

    def base(self, pipeline: Pipeline, seed: int) -> Task:
        """Give the task of the model that is trained on all clients."""
        return self._trained(f"train/{pipeline}/seed{seed}", pipeline, seed, 0)

    def retrained(self, pipeline: Pipeline, stage: int, seed: int) -> Task:
        """Give the task of the model that is trained without the clients forgotten by that stage."""
        forgotten = "-".join(map(str, self.order[:stage]))
        return self._trained(f"retrained/{pipeline}/{forgotten}/seed{seed}", pipeline, seed, stage)

    def fisher(self, pipeline: Pipeline, loss_head: Head, who: Who, seed: int) -> Task:
        """Give the task of the base model's Fisher, of all clients or of stage 1's forget or retain clients."""
        clients = range(self.settings.clients)
        forget = self.order[:1]
        chosen = {"all": list(clients), "forget": forget, "retain": [c for c in clients if c not in forget]}[who]
        base = self.base(pipeline, seed)
        work = partial(fisher, pipeline=pipeline, loss_head=loss_head, clients=chosen, base=base)
        settings = {"fisher": self.settings.depends_on("fisher"), "loss_head": loss_head, "clients": chosen}
        name = f"fisher/{pipeline}/{loss_head}/{who}/seed{seed}"
        return self._task(name, settings, [base], work, FISHER * self.images)

    def ssd(
        self,
        pipeline: Pipeline,
        stage: int,
        seed: int,
        history: History = "plain",
        *,
        loss_head: Head | None = None,
        search: Search | None = None,
    ) -> Task:
        """Give the task of a stage's unlearned model.

        Args:
            history: whether earlier stages' models are as unlearned (plain) or as fine-tuned (tuned).
            loss_head, search: in place of the study's settings.
        """
        head: Head = "class" if pipeline == "no_mtl" else loss_head or self.settings.fisher.loss_head
        forgotten, retrained = self.order[:stage], self.retrained(pipeline, stage, seed)
        if stage == 1:
            history, previous = "plain", self.base(pipeline, seed)
        elif history == "tuned":
            previous = self.finetune(pipeline, stage - 1, seed)
        else:
            previous = self.ssd(pipeline, stage - 1, seed, history, loss_head=head, search=search)
        changed, full = self.settings.model_copy(update={"search": search or self.settings.search}), None
        if stage == 1 or self.settings.fisher.full == "base":
            full = self.fisher(pipeline, head, "all", seed)
        work = partial(
            ssd, pipeline=pipeline, loss_head=head, forgotten=forgotten, seed=seed, settings=changed.search,
            previous=previous, retrained=retrained, fisher=full,
        )  # fmt: skip
        settings = {"fisher": changed.depends_on("fisher"), "search": changed.depends_on("search")}
        settings |= {"loss_head": head, "forgotten": forgotten}
        needs = [previous, retrained, *([full] if full else [])]
        kind = f"{head}-{changed.search.objective}-{changed.search.reading}"
        name = f"ssd/{pipeline}/{history}/{kind}/stage{stage}/seed{seed}"
        return self._task(name, settings, needs, work, self._cost_of_ssd(forgotten, full))

    def finetune(self, pipeline: Pipeline, stage: int, seed: int) -> Task:
        """Give the task that finds the model nearest to the retrained one: a stage's, or a fine-tuned version."""
        forgotten, retrained = self.order[:stage], self.retrained(pipeline, stage, seed)
        unlearned = self.ssd(pipeline, stage, seed, "tuned")
        work = partial(
            finetune, pipeline=pipeline, forgotten=forgotten, seed=seed, unlearned=unlearned, retrained=retrained
        )
        tuning = self.settings.finetuning
        settings = {"finetuning": tuning.model_dump(), "recipe": self._recipe(pipeline), "forgotten": forgotten}
        grid = len(tuning.class_weights) * (1 if pipeline == "no_mtl" else len(tuning.subset_weights))
        cost = grid * tuning.epochs * (self.images + EVALUATION * self._seen())
        return self._task(f"finetune/{pipeline}/stage{stage}/seed{seed}", settings, [unlearned, retrained], work, cost)

    def rebound(self, pipeline: Pipeline, seed: int) -> Task:
        """Give the task that shows what happens without pruning (Table 2)."""
        unlearned = self.ssd(pipeline, 1, seed, loss_head="class")
        work = partial(rebound, pipeline=pipeline, forgotten=self.order[:1], seed=seed, unlearned=unlearned)
        settings = {"lr": self.settings.finetuning.lr, "recipe": self._recipe(pipeline)}
        return self._task(f"rebound/{pipeline}/seed{seed}", settings, [unlearned], work, self.images + 2 * self._seen())

    def pruned(self, method: str, fraction: float, retain_fraction: float, heads: bool, seed: int) -> Task:
        """Give the task of one row of Table 18."""
        pipeline, tuning = self.settings.ablation.pipeline, self.settings.finetuning
        base = self.base(pipeline, seed)
        forget, retain = (self.fisher(pipeline, "class", who, seed) for who in ("forget", "retain"))
        if method == "DeepClean":
            retain_fraction = 0.0  # it does not look at them
        about = {"method": method, "fraction": fraction, "retain_fraction": retain_fraction, "heads": heads}
        work = partial(
            prune, pipeline=pipeline, **about, forgotten=self.order[:1], seed=seed,
            base=base, fisher_forget=forget, fisher_retain=retain,
        )  # fmt: skip
        epochs = self.settings.ablation.epochs
        settings = {**about, "epochs": epochs, "usual": tuning.epochs, "lr": tuning.lr, "recipe": self._recipe("ce")}
        tuned = "all" if heads else "backbone"
        name = f"prune/{method.replace(' ', '-')}/{fraction:g}-{retain_fraction:g}/{tuned}/seed{seed}"
        cost = epochs * (self.images + EVALUATION * self._seen())
        return self._task(name, settings, [base, forget, retain], work, cost)

    def owned(self, clients: Sequence[int]) -> int:
        """Count the clients' training images."""
        return sum(len(self.workspace.slices[client]) for client in clients)

    def _trained(self, name: str, pipeline: Pipeline, seed: int, stage: int) -> Task:
        forgotten, stages = self.order[:stage], [self.order[:t] for t in self._stages()]
        stages = stages if stage == 0 else [forgotten]
        work = partial(train, pipeline=pipeline, seed=seed, forgotten=forgotten, stages=stages)
        s = self.settings
        settings = {
            "data": self.workspace.dataset.fingerprint,
            "clients": s.clients,
            "partition": s.partition.model_dump(),
            "model": s.model.model_dump(),
            "recipe": self._recipe(pipeline),
            "stages": stages,
            "forgotten": forgotten,
        }
        kept = self.images - self.owned(forgotten)
        return self._task(name, settings, [], work, s.learning.epochs * kept + EVALUATION * self._seen())

    def _task(
        self, name: str, settings: dict[str, Any], needs: list[Task], work: Callable[..., dict[str, Any]], cost: float
    ) -> Task:
        def of_context(context: TaskContext) -> dict[str, Any]:
            return work(self.workspace, context)

        if needs:  # an earlier version's result counts by its settings alone, so that these say what its needs are of
            shared = self.settings.model_dump(include={"clients", "partition", "model", "learning", "loss"})
            settings = {"made_of": {"data": self.workspace.dataset.fingerprint, **shared}, **settings}
        return Task(name, settings, tuple(needs), of_context, cost, defaults_of(type(self.settings)))

    def _cost_of_ssd(self, forgotten: Sequence[int], full: Task | None) -> float:
        search = self.settings.search
        looked_at = 2 * (search.sample or self.images) + self.owned(forgotten)
        cost = search.trials * (DAMPENING + EVALUATION * looked_at) + FISHER * self.owned(forgotten[-1:])
        return cost + (0 if full else FISHER * self.images)

    def _each(self) -> list[tuple[Pipeline, int]]:
        chosen: list[Pipeline] = [pipeline for pipeline in PIPELINES if pipeline in self.settings.study.pipelines]
        return [(pipeline, seed) for seed in self.settings.study.seeds for pipeline in chosen]

    def _stages(self) -> range:
        return range(1, len(self.order) + 1)

    def _seen(self) -> int:
        return self.images + self.test_images

    def _recipe(self, pipeline: Pipeline) -> dict[str, Any]:
        return asdict(self.settings.recipe(pipeline))
