"""The settings of a study: typed, in ranges, with a preset for every data set and scale."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedunlearn.config import (
    INF,
    SCALES,
    Data,
    Loss,
    Model,
    Partition,
    check_clients,
    check_ranges,
    choice,
    is_among,
    number,
    plain,
    settings,
)
from fedunlearn.errors import UserError
from fedunlearn.nn.precision import PASSES, PRECISIONS
from fedunlearn.nn.schedule import SCHEDULES
from fedunlearn.study.pooled.training import Recipe
from fedunlearn.unlearning import fisher

DATASETS = ("digits", "cifar10", "cifar100", "folder")
STAGES = ("train", "gold", "unlearn", "ablation", "report")
PIPELINES = {"no_mtl": "Without MTL (SSD)", "ce": "MTL with CE", "ce_dl": "MTL with CE + DL"}
READINGS = ("threshold", "exponent")
OBJECTIVES = ("forgotten", "weighted")
WEIGHTS = ("others_weight", "test_weight", "id_weight", "mia_weight")
FISHERS_OF_ALL = ("base", "each_stage")


def several(default: list, text: str, options: Iterable[str] = ()) -> Any:
    """A list; of `options`, if any are given."""
    return field(default_factory=lambda: list(default), metadata={"text": text, "each": tuple(options)})


@dataclass
class Learning:
    """The learning phase, also of gold models (Section 5)."""

    epochs: int = number(200, 1, 10**6, "T")
    batch_size: int = number(128, 2, 10**6, "examples a step")
    lr: float = number(0.01, 0, 100, "SGD learning rate at the start")
    schedule: str = choice("steps", SCHEDULES, "of the learning rate, for both MTL pipelines")
    no_mtl_schedule: str = choice("cosine", SCHEDULES, "of the learning rate, without MTL")
    momentum: float = number(0.9, 0, 1, "of SGD")
    weight_decay: float = number(5e-4, 0, 10, "of SGD")
    crop_padding: int = number(4, 0, 64, "random crops after zero-padding by so many pixels")
    flip: bool = plain(True, "random horizontal flips")
    precision: str = choice(
        "auto", PASSES, "of forward and backward passes, evaluation included; auto: bf16 where the hardware has it"
    )
    threads: int = number(1, 1, 1024, "CPU threads a process")
    compile: bool = plain(False, "torch.compile the model for training (needs a C++ compiler, or Triton on a GPU)")


@dataclass
class Fisher:
    """The Fisher diagonals that SSD compares."""

    head: str = choice("class", fisher.HEADS, "whose loss, of MTL models (Section 4.4)")
    full: str = choice("base", FISHERS_OF_ALL, "F_D: once on the base model, or anew each stage on those still there")
    estimator: str = choice("per_example", fisher.ESTIMATORS, "per_example, or batch as in SSD's published code")
    batch_size: int = number(128, 1, 10**6, "examples a pass; changes the result of estimator=batch alone")
    precision: str = choice("fp32", PRECISIONS, "of forward and backward passes")


@dataclass
class Search:
    """Optuna's TPE over alpha and lambda, once a stage (Section 5.1)."""

    trials: int = number(100, 1, 10**6, "a stage")
    reading: str = choice("threshold", READINGS, "alpha is Eq. 8's threshold, or the power of Eq. 9's factor")
    threshold: float = number(1.0, 0, INF, "Eq. 8's threshold under reading=exponent")
    alpha_low: float = number(0.1, 1e-9, 1e9, "of alpha's log-uniform range")
    alpha_high: float = number(100.0, 1e-9, 1e9, "of alpha's log-uniform range")
    lambda_low: float = number(0.01, 1e-9, 1e9, "of lambda's log-uniform range")
    lambda_high: float = number(10.0, 1e-9, 1e9, "of lambda's log-uniform range")
    objective: str = choice(
        "forgotten", OBJECTIVES, "deviation from gold: of the forgotten clients' class accuracies, or of all columns"
    )
    sample: int = number(5000, 0, 10**9, "of the others' and of the test images, in a trial; 0: all")
    others_weight: float = number(1.0, 0, INF, "of the others' class accuracy under objective=weighted")
    test_weight: float = number(1.0, 0, INF, "of the test accuracy")
    id_weight: float = number(1.0, 0, INF, "of the others' client-ID accuracy")
    mia_weight: float = number(1.0, 0, INF, "of the attack's accuracy (as a share, not in percent)")
    recalibrate: bool = plain(False, "estimate BatchNorm statistics again on the retained clients after dampening")


@dataclass
class FineTuning:
    """The optional fine-tuning (Algorithm 1, line 6; Algorithm 2, line 4), and the retraining after pruning."""

    epochs: int = number(3, 1, 1000, "at most; every epoch's model is a candidate")
    class_weights: list[float] = several([0.0, 0.05, 0.1, 0.3, 0.5], "lambda_class to try")
    subset_weights: list[float] = several([0.2, 1.0, 2.0], "lambda_subset to try (MTL)")
    lr: float = number(1e-4, 0, 1, "of Adam")


@dataclass
class Ablation:
    """Pruning instead of dampening (Table 18)."""

    pipeline: str = choice("ce_dl", ("ce", "ce_dl"), "of the base model")
    shares: list[float] = several([0.1, 0.2, 0.4], "of the backbone's weights that are forget-sensitive")
    retain_shares: list[float] = several([0.1, 0.2, 0.2], "that are retain-sensitive, one for each of `shares`")
    epochs: int = number(60, 1, 1000, "of fine-tuning")


@dataclass
class Scope:
    """Which part of the study, and where."""

    name: str = plain("", "of the study's folder; empty: data set and scale")
    home: str = plain("", "state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn")
    stages: list[str] = several(list(STAGES), "what to do", STAGES)
    only: str = plain("*", "pattern of step names, such as gold/ce_dl/*/seed0: do no others")
    pipelines: list[str] = several(list(PIPELINES), "which", PIPELINES)
    order: list[int] = several([0, 1, 2], "clients in the order of their requests, one a stage")
    seeds: list[int] = several([0], "repetitions: of weights, shuffling, augmentation and search")
    workers: int = number(0, 0, 1024, "processes at work; 0: one on a GPU, else one for every `learning.threads` cores")
    minutes: float = number(
        INF, 0, INF, "after which to stop, at the end of an epoch or trial; continue by running again"
    )
    clip: str = plain("", "path of a TorchScript CLIP model, for Figure 2 by CLIP's embeddings")


@dataclass
class Settings:
    """Everything a study depends on."""

    dataset: str = choice("cifar10", DATASETS, "whose preset to take; data.name can differ")
    scale: str = choice("auto", SCALES, "the paper's size, or one for two cores; auto is laptop without a GPU")
    clients: int = number(10, 2, 10**6, "clients")
    data: Data = field(default_factory=Data)
    partition: Partition = field(default_factory=Partition)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    learning: Learning = field(default_factory=Learning)
    fisher: Fisher = field(default_factory=Fisher)
    search: Search = field(default_factory=Search)
    finetuning: FineTuning = field(default_factory=FineTuning)
    ablation: Ablation = field(default_factory=Ablation)
    study: Scope = field(default_factory=Scope)

    @property
    def targets(self) -> list[int]:
        """The clients that are forgotten, and attacked."""
        return self.study.order

    def depends_on(self, part: str) -> dict[str, Any]:
        """The settings of `search` or `fisher` that change its results."""
        values = asdict(getattr(self, part))
        if part == "search":
            values |= {"threshold": None} if self.search.reading == "threshold" else {}
            values |= dict.fromkeys(WEIGHTS) if self.search.objective == "forgotten" else {}
        else:
            values |= {"batch_size": None} if self.fisher.estimator == "per_example" else {}
            values |= {"head": None, "full": None}  # said by those steps that depend on them
        return values

    def recipe(self, pipeline: str) -> Recipe:
        """How models of a pipeline are trained."""
        learning, loss = asdict(self.learning), asdict(self.loss)
        names = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "crop_padding", "flip", "precision")
        schedule = learning["no_mtl_schedule" if pipeline == "no_mtl" else "schedule"]
        warmup = loss.pop("warmup")
        if pipeline == "ce":
            loss["disentangle_weight"] = 0.0
        return Recipe(**{name: learning[name] for name in names}, schedule=schedule, warmup=warmup, loss=loss)


def load(words: Iterable[str]) -> Settings:
    """The preset of a data set and scale, with settings such as `search.trials=20` on top.

    Raises:
        UserError: an unknown name, a value of the wrong type or out of range.
    """
    return check(composed(Settings, "fedunlearn.study.pooled", words))


def composed(schema: type, package: str, words: Iterable[str]) -> Any:
    """A `schema` with the preset of its `dataset` and `scale`, and `words` on top.

    Raises:
        UserError: an unknown name or a value of the wrong type.
    """
    import torch
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = list(words)
    content = OmegaConf.create(files(package).joinpath("presets.yaml").read_text())
    try:
        given = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(words))
        for name in ("dataset", "scale"):
            options = DATASETS if name == "dataset" else SCALES
            if given[name] not in options:
                raise UserError(f"{name}={given[name]} is not one of {', '.join(options)}")
        if given.scale == "auto":
            given.scale = "full" if torch.cuda.is_available() else "laptop"
        preset = content[given.dataset]
        merged = OmegaConf.merge(
            OmegaConf.structured(schema),
            {"data": {"name": given.dataset}},
            preset.get("full") or {},
            (preset.get("laptop") or {}) if given.scale == "laptop" else {},
            OmegaConf.from_dotlist(words),
            {"scale": given.scale},
        )
        return OmegaConf.to_object(merged)
    except YAMLError:
        raise UserError(
            f"{' '.join(words)}: a value cannot be read; one that begins with [ or * and is no list needs quotes: "
            "study.only='\"[bg]*\"'"
        ) from None
    except OmegaConfBaseException as error:
        name = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise UserError(f"{name}{str(error).splitlines()[0]} (settings and their ranges: README.md)") from None


def check(chosen: Settings) -> Settings:
    """The settings themselves, where every value is in its range.

    Raises:
        UserError: naming the first that is not.
    """
    check_ranges(chosen)
    check_lists(chosen)
    if not chosen.model.client_head:
        raise UserError("model.client_head=false: study.pipelines says which heads models have (no_mtl has one)")
    for name in ("alpha", "lambda"):
        low, high = (getattr(chosen.search, f"{name}_{end}") for end in ("low", "high"))
        if low >= high:
            raise UserError(f"search.{name}_low={low} is not below search.{name}_high={high}")
    if chosen.study.clip and not Path(chosen.study.clip).is_file():
        raise UserError(f"study.clip={chosen.study.clip} is no file")
    check_clients(chosen.study.order, chosen.clients)
    if len(set(chosen.study.order)) != len(chosen.study.order):
        raise UserError(f"study.order={chosen.study.order} names a client twice")
    if len(chosen.study.order) >= chosen.clients:
        raise UserError(f"study.order={chosen.study.order} leaves no client: {chosen.clients} in all")
    if len(chosen.ablation.shares) != len(chosen.ablation.retain_shares):
        raise UserError("ablation.shares and ablation.retain_shares have different lengths")
    if not all(0 < share < 1 for share in chosen.ablation.shares + chosen.ablation.retain_shares):
        raise UserError("ablation.shares and ablation.retain_shares are not in 0..1")
    return chosen


def check_lists(chosen: Any) -> None:
    """Raise UserError for a list that is empty or has what is none of its options, and for a seed given twice."""
    for name, declared, value in settings(chosen):
        options = declared.metadata.get("each")
        for word in value if options else ():
            if not is_among(options, word):
                raise UserError(f"{name}: {word} is not one of {', '.join(options)}")
        if isinstance(value, list) and not value:
            raise UserError(f"{name}=[] leaves nothing to do")
    seeds = chosen.study.seeds
    if len(set(seeds)) != len(seeds) or not all(0 <= seed <= 10**6 for seed in seeds):
        raise UserError(f"study.seeds={seeds} are not different numbers in 0..1,000,000")
