"""What all tasks of a study work with: one process's data, models and device."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedunlearn.build import model_of, on_device, open_dataset, slices_of
from fedunlearn.config import Config
from fedunlearn.data.store import Dataset
from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.runs import checkpoint
from fedunlearn.study.dag.settings import Pipeline, StudySettings
from fedunlearn.study.dag.tasks import Task, TaskContext, hint
from fedunlearn.study.pooled.finetuning import FineTuning
from fedunlearn.study.pooled.pool import Pool
from fedunlearn.study.pooled.scores import AllPredictions, Scores, accuracies, score
from fedunlearn.study.pooled.settings import Head, PaperSettings
from fedunlearn.unlearning.fisher import diagonal_fisher

FOLDS = 5
MODEL = "model.safetensors"


class Workspace:
    """One process's data, models and device, in a study of any kind.

    Args:
        settings: of which images, owned by whom, and of which model.
        precision: of forward and backward passes (`nn.precision`).
        attacked: the clients that are forgotten, and then looked for by membership inference.
    """

    def __init__(self, settings: StudySettings, *, precision: str, attacked: Sequence[int]) -> None:
        self._settings, self._attacked, self.precision = settings, attacked, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dataset(self) -> Dataset:
        """The images, as they lie on disk."""
        return self._dataset

    @cached_property
    def _dataset(self) -> Dataset:
        return open_dataset(self._config())

    @cached_property
    def pool(self) -> Pool:
        """The images, on the device."""
        return Pool.of(self.dataset, self.slices, self.device)

    @cached_property
    def slices(self) -> list[np.ndarray]:
        """Every client's indices into the training images."""
        return slices_of(self._config(), self.dataset)

    def class_counts(self, client: int) -> Tensor:
        """Count the client's training images of each class, int64 [K]."""
        labels = np.asarray(self.dataset.train.labels)[self.slices[client]]
        return torch.from_numpy(np.bincount(labels, minlength=len(self.dataset.class_names)))

    def check(self) -> None:
        """Raise UserError where the data are too few for the study: before hours of training, not after."""
        for client in self._attacked:
            if len(self.slices[client]) < FOLDS:
                raise UserError(
                    f"client {client} has {len(self.slices[client])} images, too few for the attack's {FOLDS} folds: "
                    "take more images (data.limit) or another partition"
                )
        forgotten = self._settings.study.order
        retain = sum(len(owned) for client, owned in enumerate(self.slices) if client not in forgotten)
        if retain < FOLDS:
            raise UserError(
                f"the retain clients have {retain} images, too few for the attack's {FOLDS} folds: "
                "take more (data.limit)"
            )
        for client, owned in enumerate(self.slices):
            if not len(owned):
                raise UserError(f"client {client} has no image: take more images (data.limit) or another partition")

    def new_model(self, pipeline: Pipeline, seed: int) -> TwoHeadModel:
        """Make an untrained model of a pipeline: the one that a federation of this seed starts with."""
        config = self._config(seed, client_head=pipeline != "no_mtl")
        return on_device(model_of(config, self.dataset), self.device)

    def predictions(self, model: TwoHeadModel) -> AllPredictions:
        """Give the model's predictions on everything."""
        return AllPredictions.of(model, self.pool, self.precision)

    def _config(self, seed: int = 0, *, client_head: bool = True) -> Config:
        """Give the federation's settings of the same data, clients and model."""
        s = self._settings
        model = s.model.model_copy(update={"client_head": client_head})
        return Config(home=s.study.home, seed=seed, clients=s.clients, data=s.data, partition=s.partition, model=model)


class PaperWorkspace(Workspace):
    """One process's data, models and device, in the paper's study."""

    def __init__(self, settings: PaperSettings) -> None:
        super().__init__(settings, precision=settings.learning.precision, attacked=settings.study.order)
        self.settings = settings

    def load(self, context: TaskContext, task: Task, pipeline: Pipeline, file: str = MODEL) -> TwoHeadModel:
        """Load the model that an earlier task has left.

        Raises:
            UserError: its file was damaged.
        """
        model = self.new_model(pipeline, 0)
        path, sha256 = context.file(task, file), context.result(task)["files"][file]
        checkpoint.load(path, model, sha256=sha256, hint=hint(path))
        return model

    def save(self, context: TaskContext, model: TwoHeadModel, file: str = MODEL) -> dict[str, str]:
        """Write a model to the task's folder; returns the entry of the result's `files`."""
        return {file: checkpoint.save(context.folder / file, model.state_dict())}

    def fisher(self, model: TwoHeadModel, loss_head: Head, indices: Tensor) -> dict[str, Tensor]:
        """Compute the diagonal Fisher of the training examples at `indices`, as the settings want it.

        Args:
            loss_head: whose loss.
        """
        wanted = self.settings.fisher
        batches = self.pool.train.batches(indices, wanted.batch_size)
        return diagonal_fisher(
            model, batches, loss_head=loss_head, estimator=wanted.estimator, precision=wanted.precision
        )

    def score(self, model: TwoHeadModel, forgotten: Sequence[int], seed: int) -> Scores:
        """Give every column of the paper's tables."""
        return score(self.predictions(model), forgotten, seed=seed)

    def accuracies(self, model: TwoHeadModel, forgotten: Sequence[int]) -> Scores:
        """Give every column but the MIA accuracy."""
        predictions = self.predictions(model)
        return accuracies(predictions.train, forgotten) | {"test": predictions.test.class_accuracy}

    def forget_accuracy(self, model: TwoHeadModel, client: int) -> float:
        """Give the class accuracy on the client's examples, 0..1."""
        predictions = self.pool.predict(model, self.pool.of_clients([client]), self.precision)
        return predictions.counts()[client].class_accuracy

    def fine_tuning(
        self,
        model: TwoHeadModel,
        forgotten: Sequence[int],
        subset_weight: float,
        seed: int,
        masks: dict[str, Tensor] | None = None,
    ) -> FineTuning:
        """Prepare fine-tuning on the retain set, with the last client that was forgotten as D_f."""
        return FineTuning(
            model,
            self.pool,
            self.pool.without(forgotten),
            self.pool.of_clients(forgotten[-1:]),
            self.settings.recipe("ce"),
            lr=self.settings.finetuning.lr,
            subset_weight=subset_weight,
            seed=seed,
            masks=masks,
        )
