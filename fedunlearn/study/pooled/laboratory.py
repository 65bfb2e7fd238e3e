"""What all steps of a study work with: one process's data, models and device."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedunlearn.build import model_of, open_dataset, slices_of
from fedunlearn.config import Config
from fedunlearn.data.datasets import Dataset
from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.runs import checkpoint
from fedunlearn.study.dag.steps import Desk, Step, cure
from fedunlearn.study.pooled.finetuning import FineTuning
from fedunlearn.study.pooled.pool import Pool
from fedunlearn.study.pooled.scores import Answers, Scores, accuracies, score
from fedunlearn.study.pooled.settings import Settings
from fedunlearn.unlearning.fisher import diagonal_fisher

FOLDS = 5
MODEL = "model.safetensors"


class Laboratory:
    """One process's data, models and device."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = settings.learning.precision

    @cached_property
    def dataset(self) -> Dataset:
        """The images, as they lie on disk."""
        return open_dataset(self._config())

    @cached_property
    def pool(self) -> Pool:
        """The images, on the device."""
        return Pool.of(self.dataset, self.slices, self.device)

    @cached_property
    def slices(self) -> list[np.ndarray]:
        """Every client's indices into the training images."""
        return slices_of(self._config(), self.dataset)

    def check(self) -> None:
        """Raise UserError where the data are too few for the study: before hours of training, not after."""
        for client in self.settings.targets:
            if len(self.slices[client]) < FOLDS:
                raise UserError(
                    f"client {client} has {len(self.slices[client])} images, too few for the attack's {FOLDS} folds: "
                    "take more images (data.limit) or another partition"
                )
        staying = sum(len(s) for client, s in enumerate(self.slices) if client not in self.settings.study.order)
        if staying < FOLDS:
            raise UserError(f"{staying} images stay, too few for the attack's {FOLDS} folds: take more (data.limit)")
        for client, owned in enumerate(self.slices):
            if not len(owned):
                raise UserError(f"client {client} has no image: take more images (data.limit) or another partition")

    def new_model(self, pipeline: str, seed: int) -> TwoHeadResNet18:
        """An untrained model of a pipeline: the one that a federation of this seed starts with."""
        config = self._config(seed, client_head=pipeline != "no_mtl")
        return model_of(config, self.dataset).to(self.device, memory_format=torch.channels_last)

    def load(self, desk: Desk, step: Step, pipeline: str, file: str = MODEL) -> TwoHeadResNet18:
        """The model that an earlier step has left.

        Raises:
            UserError: its file was damaged.
        """
        model = self.new_model(pipeline, 0)
        path, sha256 = desk.file(step, file), desk.result(step)["files"][file]
        checkpoint.load(path, model, sha256=sha256, cure=cure(path))
        return model

    def save(self, desk: Desk, model: TwoHeadResNet18, file: str = MODEL) -> dict[str, str]:
        """Write a model to the step's folder; returns the entry of the result's `files`."""
        return {file: checkpoint.save(desk.folder / file, model.state_dict())}

    def fisher(self, model: TwoHeadResNet18, head: str, indices: Tensor) -> dict[str, Tensor]:
        """Diagonal Fisher of the training examples at `indices`, as the settings want it."""
        wanted = self.settings.fisher
        batches = self.pool.train.batches(indices, wanted.batch_size)
        return diagonal_fisher(model, batches, head=head, estimator=wanted.estimator, precision=wanted.precision)

    def answers(self, model: TwoHeadResNet18) -> Answers:
        """What the model says of everything."""
        return Answers.of(model, self.pool, self.precision)

    def score(self, model: TwoHeadResNet18, forgotten: Sequence[int], seed: int) -> Scores:
        """Every column of the paper's tables."""
        return score(self.answers(model), forgotten, seed=seed)

    def accuracies(self, model: TwoHeadResNet18, forgotten: Sequence[int]) -> Scores:
        """Every column but the attack's."""
        answers = self.answers(model)
        return accuracies(answers.train, forgotten) | {"test": answers.test.class_accuracy}

    def forget_accuracy(self, model: TwoHeadResNet18, client: int) -> float:
        """Class accuracy on the client's examples."""
        predictions = self.pool.predict(model, self.pool.of_clients([client]), self.precision)
        return predictions.counts()[client].class_accuracy

    def fine_tuning(
        self,
        model: TwoHeadResNet18,
        forgotten: Sequence[int],
        subset_weight: float,
        seed: int,
        masks: dict[str, Tensor] | None = None,
    ) -> FineTuning:
        """Fine-tuning on the retain set, with the last client that left as D_f."""
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

    def _config(self, seed: int = 0, *, client_head: bool = True) -> Config:
        """The federation's settings of the same data, clients and model."""
        s = self.settings
        model = replace(s.model, client_head=client_head)
        return Config(home=s.study.home, seed=seed, clients=s.clients, data=s.data, partition=s.partition, model=model)
