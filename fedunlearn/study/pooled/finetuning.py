"""Fine-tuning after unlearning (paper, Algorithm 1, line 6; Algorithm 2, line 4), of all weights or of chosen ones."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedunlearn.data.batches import scale
from fedunlearn.nn.descent import Adam
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Batch
from fedunlearn.nn.precision import at_least_fp32, autocast
from fedunlearn.nn.rng import drawing_from, generator_of
from fedunlearn.study.pooled.pool import Pool
from fedunlearn.study.pooled.training import Epochs, Recipe


def adversarial_weight(accuracy: float, base: float, class_weight: float) -> float:
    """Compute lambda_class max(0, a_f - a_f^base): 0 once the forget set is no better than under the retrained model.

    Args:
        accuracy: a_f, on the forget set, 0..1.
        base: a_f^base, the retrained model's.
    """
    return class_weight * max(0.0, accuracy - base)


class FineTuning:
    """Tunes a model by Adam on CE(y_r) + lambda_subset CE(s_r) - adversary CE(y_f), an epoch over D_r at a time.

    With an adversary every step takes a batch of D_f too, in turn and as it is; without one D_f is not looked at.

    Args:
        retain, forget: indices of D_r and D_f into the pool's training examples.
        subset_weight: lambda_subset; a model without a client head has no such term.
        masks: which weights may move, by parameter name, 0 or 1; None: all.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: Pool,
        retain: Tensor,
        forget: Tensor,
        recipe: Recipe,
        *,
        lr: float,
        subset_weight: float,
        seed: int,
        masks: dict[str, Tensor] | None = None,
    ) -> None:
        self.model, self.examples, self.retain, self.recipe, self.seed = model, pool.train, retain, recipe, seed
        self.subset_weight, self.masks, self.epoch = subset_weight, masks, 0
        device = retain.device
        self.optimiser = Adam(model.parameters(), lr=lr, fused=True, capturable=device.type == "cuda")
        self.adversary = torch.zeros((), device=device)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.forget, self.offsets = forget.clone(), torch.arange(min(recipe.batch_size, len(forget)), device=device)
        self.epochs_of: dict[bool, Epochs] = {}

    def run_epoch(self, adversary: float = 0.0) -> None:
        """Tune for one epoch over D_r; `adversary` is what `adversarial_weight` gave."""
        generator = generator_of(self.seed, self.epoch)
        self.adversary.fill_(adversary)
        self.position.zero_()
        self.forget.copy_(self.forget.sort().values[torch.randperm(len(self.forget), generator=generator)])
        self.model.train()
        with drawing_from(generator):
            self._epochs(adversary > 0).run(generator)
        self.epoch += 1

    def state(self) -> dict[str, Tensor]:
        """Give everything that the next epochs depend on."""
        model = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        return model | self._adam_state() | {"epoch": torch.tensor(self.epoch)}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state` was taken."""
        self.model.load_state_dict({name[6:]: value for name, value in state.items() if name.startswith("model.")})
        for name, value in self._adam_state().items():
            value.copy_(state[name])
        self.epoch = int(state["epoch"])

    def _adam_state(self) -> dict[str, Tensor]:
        return {
            f"adam.{name}.{kind}": value
            for (name, _), state in zip(self.model.named_parameters(), self.optimiser.state, strict=True)
            for kind, value in state.items()
        }

    def _epochs(self, adversarial: bool) -> Epochs:
        if adversarial not in self.epochs_of:
            self.epochs_of[adversarial] = Epochs(
                self.examples,
                self.retain,
                self._adversarial_step if adversarial else self._step,
                [*self.model.state_dict().values(), *self._adam_state().values(), self.position],
                batch_size=self.recipe.batch_size,
                crop_padding=self.recipe.crop_padding,
                flip=self.recipe.flip,
            )
        return self.epochs_of[adversarial]

    def _step(self, batch: Batch) -> None:
        self._descend(self._retain_loss(batch))

    def _adversarial_step(self, batch: Batch) -> None:
        retain_loss = self._retain_loss(batch)
        chosen = self.forget[(self.position + self.offsets) % len(self.forget)]
        self.position += len(self.offsets)
        with autocast(chosen.device, self.recipe.precision):
            class_logits, _, _ = self.model(scale(self.examples.images[chosen]))
        forget_loss = cross_entropy(at_least_fp32(class_logits), self.examples.labels[chosen])
        self._descend(retain_loss - self.adversary * forget_loss)

    def _retain_loss(self, batch: Batch) -> Tensor:
        images, class_labels, client_ids = batch
        with autocast(images.device, self.recipe.precision):
            class_logits, client_logits, embedding = self.model(images)
        return multi_task_loss(
            class_logits,
            client_logits,
            embedding,
            class_labels,
            client_ids,
            client_weight=self.subset_weight,
            disentangle_weight=0.0,
        )

    def _descend(self, loss: Tensor) -> None:
        self.model.zero_grad()
        loss.backward()
        if self.masks is not None:
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.masks[name])
        self.optimiser.step()
