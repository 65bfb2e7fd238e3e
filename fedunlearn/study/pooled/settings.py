"""The settings of the paper's study: typed, in ranges, with a preset for every data set and scale."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedunlearn.config import Passes, Precision, Settings
from fedunlearn.errors import UserError
from fedunlearn.study.dag.settings import Pipeline, Scope, StudySettings, check_scope, composed
from fedunlearn.study.pooled.training import Recipe

Head = Literal["class", "client"]
Objective = Literal["forgotten", "weighted"]
Reading = Literal["threshold", "exponent"]
Schedule = Literal["steps", "cosine", "constant"]
Stage = Literal["train", "retrain", "unlearn", "ablation", "report"]

STAGES: tuple[Stage, ...] = ("train", "retrain", "unlearn", "ablation", "report")
OBJECTIVES: tuple[Objective, ...] = ("forgotten", "weighted")
READINGS: tuple[Reading, ...] = ("threshold", "exponent")
WEIGHTS = ("retain_weight", "test_weight", "id_weight", "mia_weight")


class Learning(Settings):
    """Sets the learning phase, also of retrained models (Section 5)."""

    epochs: int = Field(default=200, ge=1, le=10**6, description="T")
    batch_size: int = Field(default=128, ge=2, le=10**6, description="examples a step")
    lr: float = Field(default=0.01, ge=0, le=100, description="SGD learning rate at the start")
    schedule: Schedule = Field(default="steps", description="of the learning rate, for both MTL pipelines")
    no_mtl_schedule: Schedule = Field(default="cosine", description="of the learning rate, without MTL")
    momentum: float = Field(default=0.9, ge=0, le=1, description="of SGD")
    weight_decay: float = Field(default=5e-4, ge=0, le=10, description="of SGD")
    crop_padding: int = Field(default=4, ge=0, le=64, description="random crops after zero-padding by so many pixels")
    flip: bool = Field(default=True, description="random horizontal flips")
    precision: Passes = Field(
        default="auto",
        description="of forward and backward passes, evaluation included; auto: bf16 where the hardware has it",
    )
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads a process")
    compile: bool = Field(
        default=False, description="torch.compile the model for training (needs a C++ compiler, or Triton on a GPU)"
    )


class Fisher(Settings):
    """Sets the Fisher diagonals that SSD compares."""

    loss_head: Head = Field(default="class", description="whose loss, of MTL models (Section 4.4)")
    full: Literal["base", "each_stage"] = Field(
        default="base", description="F_D: once on the base model, or anew each stage on those still there"
    )
    estimator: Literal["per_example", "batch"] = Field(
        default="per_example", description="per_example, or batch as in SSD's published code"
    )
    batch_size: int = Field(
        default=128, ge=1, le=10**6, description="examples a pass; changes the result of estimator=batch alone"
    )
    precision: Precision = Field(default="fp32", description="of forward and backward passes")


class Search(Settings):
    """Sets the search over alpha and lambda by Optuna's TPE, once a stage (Section 5.1)."""

    trials: int = Field(default=100, ge=1, le=10**6, description="a stage")
    reading: Reading = Field(
        default="threshold", description="alpha is Eq. 8's threshold, or the power of Eq. 9's factor"
    )
    threshold: float = Field(default=1.0, ge=0, description="Eq. 8's threshold under reading=exponent")
    alpha_low: float = Field(default=0.1, ge=1e-9, le=1e9, description="of alpha's log-uniform range")
    alpha_high: float = Field(default=100.0, ge=1e-9, le=1e9, description="of alpha's log-uniform range")
    lambda_low: float = Field(default=0.01, ge=1e-9, le=1e9, description="of lambda's log-uniform range")
    lambda_high: float = Field(default=10.0, ge=1e-9, le=1e9, description="of lambda's log-uniform range")
    objective: Objective = Field(
        default="forgotten",
        description="deviation from the retrained model: of the forgotten clients' class accuracies, or of all columns",
    )
    sample: int = Field(
        default=5000, ge=0, le=10**9, description="of the retain clients' and of the test images, in a trial; 0: all"
    )
    retain_weight: float = Field(
        default=1.0, ge=0, description="of the retain clients' class accuracy under objective=weighted"
    )
    test_weight: float = Field(default=1.0, ge=0, description="of the test accuracy")
    id_weight: float = Field(default=1.0, ge=0, description="of the retain clients' client-ID accuracy")
    mia_weight: float = Field(default=1.0, ge=0, description="of the MIA accuracy (as a fraction, not in percent)")
    recalibrate: bool = Field(
        default=False, description="estimate BatchNorm statistics again on the retain clients after dampening"
    )


class FineTuning(Settings):
    """Sets the optional fine-tuning (Algorithm 1, line 6; Algorithm 2, line 4), also that after pruning."""

    epochs: int = Field(default=3, ge=1, le=1000, description="at most; every epoch's model is a candidate")
    class_weights: list[float] = Field(default=[0.0, 0.05, 0.1, 0.3, 0.5], description="lambda_class to try")
    subset_weights: list[float] = Field(default=[0.2, 1.0, 2.0], description="lambda_subset to try (MTL)")
    lr: float = Field(default=1e-4, ge=0, le=1, description="of Adam")


class Ablation(Settings):
    """Sets what is pruned instead of dampened (Table 18)."""

    pipeline: Literal["ce", "ce_dl"] = Field(default="ce_dl", description="of the base model")
    fractions: list[float] = Field(
        default=[0.1, 0.2, 0.4], description="of the backbone's weights that are forget-sensitive"
    )
    retain_fractions: list[float] = Field(
        default=[0.1, 0.2, 0.2], description="that are retain-sensitive, one for each of `fractions`"
    )
    epochs: int = Field(default=60, ge=1, le=1000, description="of fine-tuning")


class PaperScope(Scope):
    """Says which part of the study is done, and where."""

    stages: list[Stage] = Field(default=list(STAGES), description="what to do")
    order: list[int] = Field(default=[0, 1, 2], description="clients in the order of their requests, one a stage")
    clip: str = Field(default="", description="path of a TorchScript CLIP model, for Figure 2 by CLIP's embeddings")


class PaperSettings(StudySettings):
    """Holds everything that the paper's study depends on."""

    learning: Learning = Learning()
    fisher: Fisher = Fisher()
    search: Search = Search()
    finetuning: FineTuning = FineTuning()
    ablation: Ablation = Ablation()
    study: PaperScope = PaperScope()

    def depends_on(self, part: Literal["search", "fisher"]) -> dict[str, Any]:
        """Give the settings of `search` or `fisher` that change its results."""
        if part == "search":
            values = self.search.model_dump()
            values |= {"threshold": None} if self.search.reading == "threshold" else {}
            values |= dict.fromkeys(WEIGHTS) if self.search.objective == "forgotten" else {}
            return values
        values = self.fisher.model_dump()
        values |= {"batch_size": None} if self.fisher.estimator == "per_example" else {}
        return values | {"loss_head": None, "full": None}  # those tasks that depend on them say so

    def recipe(self, pipeline: Pipeline) -> Recipe:
        """Say how models of a pipeline are trained."""
        learning, loss = self.learning, self.loss.model_dump()
        warmup = loss.pop("warmup")
        if pipeline == "ce":
            loss["disentangle_weight"] = 0.0
        return Recipe(
            epochs=learning.epochs,
            batch_size=learning.batch_size,
            lr=learning.lr,
            schedule=learning.no_mtl_schedule if pipeline == "no_mtl" else learning.schedule,
            momentum=learning.momentum,
            weight_decay=learning.weight_decay,
            crop_padding=learning.crop_padding,
            flip=learning.flip,
            precision=learning.precision,
            warmup=warmup,
            loss=loss,
        )


def load(words: Iterable[str]) -> PaperSettings:
    """Give the preset of a data set and scale, with settings such as `search.trials=20` on top.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.
    """
    return check(composed(PaperSettings, "fedunlearn.study.pooled", words))


def check(chosen: PaperSettings) -> PaperSettings:
    """Give the settings themselves, where their values agree with each other.

    Raises:
        UserError: naming the first that does not.
    """
    check_scope(chosen)
    if not chosen.model.client_head:
        raise UserError("model.client_head=false: study.pipelines says which heads models have (no_mtl has one)")
    for name in ("alpha", "lambda"):
        low, high = (getattr(chosen.search, f"{name}_{end}") for end in ("low", "high"))
        if low >= high:
            raise UserError(f"search.{name}_low={low} is not below search.{name}_high={high}")
    if chosen.study.clip and not Path(chosen.study.clip).is_file():
        raise UserError(f"study.clip={chosen.study.clip} is no file")
    fractions, retain_fractions = chosen.ablation.fractions, chosen.ablation.retain_fractions
    if len(fractions) != len(retain_fractions):
        raise UserError("ablation.fractions and ablation.retain_fractions have different lengths")
    if not all(0 < fraction < 1 for fraction in fractions + retain_fractions):
        raise UserError("ablation.fractions and ablation.retain_fractions are not in 0..1")
    return chosen
