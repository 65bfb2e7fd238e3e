"""Every setting of a run: its type, its range and what it means. `composing` makes them of files and words.

Nothing here imports torch, so that a command that only reads a run answers at once.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_serializer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from fedunlearn.errors import UserError
from fedunlearn.owners import ON_NODES
from fedunlearn.schema import in_one_line, is_mapping

Passes = Literal["auto", "bf16", "fp32"]
Precision = Literal["bf16", "fp32"]
Scale = Literal["auto", "full", "laptop"]
OWN_DATA = ("folder", "medmnist", "npz", "hf", "table")
"""Data sets that are not public, or made of what is not."""
OURS = ("resnet18", "small_cnn")
"""Networks with `model.width` and `model.norm`."""
OPTIONAL = ("file", "names", "classes", "keys")
"""Settings of a partition that earlier versions did not have."""
RUN_NAME = r"\w[\w.-]*"
LONGEST_NAME = 200


class Settings(BaseModel):
    """Settings that are checked when made and never changed: `settings.model_copy(update={...})` gives others."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation in (int, float):
            raise PydanticCustomError("int_type", "true and false are no numbers")
        return value


class Data(Settings):
    """Which images."""

    name: Literal["digits", "cifar10", "cifar100", "folder", "random", "medmnist", "npz", "hf", "table"] = Field(
        default="digits",
        description="data set; folder, medmnist, npz, hf, table: of your own (data.root); random: ten noisy patterns, "
        "to measure speed where no images are at hand",
    )
    root: str = Field(
        default="",
        description="absolute path of your own images: a folder or an archive of one; a file for medmnist and npz; "
        "either for hf and table",
    )
    limit: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="training images to keep, the first of each class (and of each client, where folders or a file say "
        "whose they are); 0 keeps all",
    )
    test_limit: int = Field(default=0, ge=0, le=10**9, description="test images to keep; 0 keeps all")
    image_size: int = Field(default=32, ge=8, le=1024, description="for folder, hf and random: pixels a side")
    mirror: bool = Field(
        default=True, description="whether an image that is mirrored is still one of its class (digits: no)"
    )
    fit: Literal["stretch", "crop", "pad"] = Field(
        default="stretch",
        description="how image files become squares: stretched, the middle of the longer side, or with black borders",
    )
    exif: bool = Field(default=False, description="whether image files are turned as their EXIF data say")
    window: list[float] = Field(
        default=[],
        description="[low,high]: values that become black and white in images of more than 8 bits; empty takes the "
        "range of the file's type, of DICOM its own window",
    )
    skip_bad: bool = Field(default=False, description="whether to go on without files and rows that cannot be read")
    label: str = Field(default="", description="for hf and table: the column of the class")
    client: str = Field(default="", description="for hf and table: the column of the client, if there is one")
    columns: list[str] = Field(default=[], description="for table: the columns to learn from; empty takes all others")

    @property
    def is_table(self) -> bool:
        """Whether an example is a row of numbers, and no picture."""
        return self.name == "table"


class Partition(Settings):
    """Who owns which image."""

    kind: Literal["dirichlet", "iid", "class", "folders", "file", "column", "nodes"] = Field(
        default="dirichlet",
        description="dirichlet a class, iid, or one class a client; or whoever owns them: folders (root/client/class/"
        "image), file (partition.file), column (what an .npz or a table calls clients), nodes (real machines: each has "
        "its own, and the server's data.root has held-out images alone)",
    )
    file: str = Field(
        default="",
        description="CSV table of path, client, and perhaps class, split, patient; a path is relative to data.root, or "
        "absolute",
    )
    names: list[str] = Field(
        default=[],
        description="of the owners that take part, by number; empty takes all, and a run keeps them",
    )
    classes: list[str] = Field(
        default=[], description="for nodes: names of all classes; empty takes those of the server's held-out images"
    )
    keys: dict[int, str] = Field(
        default_factory=dict,
        description="for nodes: client, as in readmit -> id of its SuperNode's key (`fedunlearn keys id`); then a "
        "node is who its key says, and nobody else is asked",
    )
    dirichlet_alpha: float = Field(
        default=0.6, ge=1e-6, le=1e6, description="concentration of the Dirichlet split; lower is less even"
    )
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="of the split")

    @model_serializer(mode="wrap")
    def _without_empty_names(self, write: Any) -> dict[str, Any]:
        """Write what earlier versions knew, where nobody owns an image: what depends on settings stays as it was."""
        return {name: value for name, value in write(self).items() if value or name not in OPTIONAL}

    @property
    def is_on_nodes(self) -> bool:
        """Whether every machine has its own clients' images, and nobody has them all."""
        return self.kind == ON_NODES


class Model(Settings):
    """The network."""

    name: str = Field(
        default="resnet18",
        min_length=1,
        description="resnet18, small_cnn, a classifier of torchvision or timm, or module:factory; short: model=NAME",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further keyword arguments of a library's model or a factory, as {depth:4}"
    )
    width: int = Field(default=64, ge=8, le=512, description="channels of the first stage (the paper: 64), of ours")
    head_size: Literal["large", "medium", "small"] = Field(default="medium", description="size of projection and heads")
    norm: Literal["batch", "group", "none"] = Field(
        default="batch", description="BatchNorm, GroupNorm or nothing, of ours"
    )
    client_head: bool = Field(default=True, description="false: the single-head baseline")

    @property
    def title(self) -> str:
        """What reports call the network."""
        name = "ResNet-18" if self.name == "resnet18" else self.name
        return f"{name} of width {self.width}" if self.name in OURS else name


class Train(Settings):
    """Local training."""

    epochs: int = Field(default=1, ge=1, le=1000, description="local epochs a round")
    batch_size: int = Field(default=128, ge=2, le=10**6, description="examples a step")
    lr: float = Field(default=0.05, ge=0, le=100, description="SGD learning rate at the start")
    schedule: Literal["steps", "cosine", "constant"] = Field(
        default="steps", description="of the learning rate over the rounds"
    )
    schedule_rounds: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="rounds over which the learning rate falls; 0: all (a run given more keeps its own)",
    )
    lr_end: float = Field(
        default=0.0, ge=0, le=1, description="fraction of lr that schedule=cosine ends with and keeps in further rounds"
    )
    momentum: float = Field(default=0.9, ge=0, le=1, description="of SGD, within one client and round")
    loss: str = Field(
        default="", description="module:function in place of the paper's loss, with the arguments of multi_task_loss"
    )
    server_momentum: float = Field(default=0.0, ge=0, le=0.99, description="of the server, over rounds")
    weight_decay: float = Field(default=5e-4, ge=0, le=10, description="of SGD")
    crop_padding: int = Field(default=4, ge=0, le=64, description="random crops after zero-padding by so many pixels")
    flip: bool = Field(default=True, description="random horizontal flips")
    client_head_by: Literal["server", "local"] = Field(
        default="server", description="who trains the client head; server: from statistics of the clients' embeddings"
    )
    embedding_fraction: float = Field(
        default=0.5,
        ge=1e-6,
        le=1,
        description="of a client's images, at random, that embedding statistics are taken of",
    )
    client_head_steps: int = Field(
        default=300, ge=1, le=10**6, description="of the server on the client head, after every round"
    )
    precision: Passes = Field(
        default="auto",
        description="of forward and backward passes; auto: bf16 where the hardware has it (weights stay fp32)",
    )
    threads: int = Field(
        default=1, ge=1, le=1024, description="CPU threads a worker; more change the last bits of the results"
    )


class Loss(Settings):
    """Eq. 4-7 of the paper."""

    class_weight: float = Field(default=1.0, ge=0, description="lambda_1")
    client_weight: float = Field(default=1.0, ge=0, description="lambda_2")
    disentangle_weight: float = Field(default=0.1, ge=0, description="lambda_dis")
    pull: float = Field(default=1.0, ge=0, description="lambda_pull")
    push: float = Field(default=1.0, ge=0, description="lambda_push")
    margin: float = Field(default=1.0, ge=0, description="m")
    within_class: bool = Field(default=False, description="take the disentanglement loss within each class")
    warmup: float = Field(default=0.1, ge=0, le=1, description="fraction of training with the class loss alone")


class Forget(Settings):
    """Forget requests: those known in advance, and what holds for all of them."""

    schedule: dict[int, list[int]] = Field(
        default_factory=dict,
        description="round -> clients forgotten after it, as {6:[3]} or {6:[hospital_b]}; those of round 0 never take "
        "part",
    )
    attempts: int = Field(default=3, ge=1, le=100, description="times a request is tried before it is set aside")
    gate: bool = Field(
        default=True,
        description="whether a new model must pass the gate; false takes whatever a strategy makes, as in comparisons",
    )
    budget: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="of accuracy that a request may cost, on the retain clients' and on held-out images",
    )
    purge: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="whether forgotten clients' images and files are removed when the run ends, and no new run trains "
        "them; auto does that with images of your own (data.root)",
    )
    purge_metrics: bool = Field(
        default=False, description="whether their accuracies by round and class counts are removed then too"
    )
    signed: bool = Field(default=False, description="whether only a request counts that its clients' key has signed")
    keys: dict[int, str] = Field(
        default_factory=dict,
        description="client, as in readmit -> id of its key, as `fedunlearn keys new` says; of other clients "
        "partition.keys counts",
    )
    due_months: int = Field(
        default=1, ge=0, le=120, description="months in which a request has to be applied (GDPR, Art. 12(3))"
    )
    rounds_until_completed: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="rounds of training on the retain clients, if the run has any, until COMPLETED",
    )


class Config(Settings):
    """Everything that one run depends on."""

    run: str = Field(default="", description="name of the run; the same name again resumes it; empty takes a new one")
    fork: str = Field(
        default="", description="name of a run to go on from, with its settings but for those that are named"
    )
    home: str = Field(default="", description="state folder; empty takes $FEDUNLEARN_HOME or ~/.fedunlearn")
    strategy: str = Field(
        default="subset", description="how a client is forgotten: the name of an installed strategy, or module:Class"
    )
    seed: int = Field(
        default=0, ge=0, le=2**32 - 1, description="of weights, shuffling, augmentation and client sampling"
    )
    scale: Scale = Field(
        default="auto",
        description="size of the study, where the app has several; auto is laptop without a GPU, else full",
    )
    clients: int = Field(default=10, ge=2, le=10**6, description="clients")
    rounds: int = Field(default=200, ge=1, le=10**6, description="rounds of training")
    fraction: float = Field(default=1.0, ge=0, le=1, description="of the clients that train in a round (at least one)")
    evaluate_every: int = Field(
        default=1, ge=1, le=10**6, description="rounds between evaluations (always after the last and around a request)"
    )
    batch_norm_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="of a client's images that BatchNorm statistics are estimated from, after every round and request "
        "(of a table, all its rows); 0 keeps the averages of the clients' running statistics",
    )
    message_dtype: Precision = Field(
        default="fp32",
        description="of the tensors in messages, where a client task has no `dtype` of its own; sums and the server's "
        "model stay fp32",
    )
    window: int = Field(default=8, ge=1, le=10**6, description="messages in flight at once")
    timeout: float = Field(
        default=3600.0, ge=0.1, le=10**6, description="seconds without any reply after which silent nodes are left out"
    )
    reply_band: float = Field(
        default=300.0,
        ge=0,
        le=10**6,
        description="times the usual size that what a node sends may have (by the root of its examples); 0 for any",
    )
    robust: Literal["none", "clip", "median", "trimmed_mean"] = Field(
        default="none",
        description="how updates are averaged; all but none withstand a few dishonest clients, take a message and the "
        "memory of an update for every client, and ask clients for their class counts",
    )
    round_band: float = Field(
        default=1.3,
        ge=0,
        le=10**6,
        description="times the held-out loss before, or that of guessing, that a round may leave; 0 for any",
    )
    statistics_band: float = Field(
        default=3.0,
        ge=0,
        le=10**6,
        description="times the variance of held-out images' BatchNorm statistics that a client's may have or lack, and "
        "standard deviations that its means may be away, over a layer; also 1 / the cosine of the means; 0 for any",
    )
    client_share: float = Field(
        default=0.9,
        ge=0,
        le=1,
        description="of all examples that one client may say it has, of three clients or more, where the server cannot "
        "count them; a run may go on with another",
    )
    track: Literal["none", "tensorboard", "mlflow", "wandb"] = Field(
        default="none",
        description="the experiment tracker that rounds and requests are sent to as well (each an extra to install)",
    )
    readmit: list[int] = Field(
        default=[],
        description="clients, by name, or by number where no name is one, that train in a new run though another run "
        "of the state folder forgot them for good",
    )
    data: Data = Data()
    partition: Partition = Partition()
    model: Model = Model()
    train: Train = Train()
    loss: Loss = Loss()
    unlearn: dict[str, Any] = Field(
        default_factory=dict, description="settings of the strategy: `fedunlearn config STRATEGY` lists them"
    )
    forget: Forget = Forget()

    @property
    def batch_norm_part(self) -> float:
        """The part of a client's examples that BatchNorm statistics are estimated from; 0 where nobody estimates them.

        Of a table it is all rows: a forward pass of them costs nothing, and few rows lack rare categories.
        """
        return 1.0 if self.data.is_table and self.batch_norm_fraction else self.batch_norm_fraction

    @property
    def owner_keys(self) -> dict[int, str]:
        """The id of the key that signs for each client: of `forget.keys`, else of `partition.keys`."""
        return self.partition.keys | self.forget.keys

    @property
    def is_for_good(self) -> bool:
        """Whether what is left of forgotten clients is removed, and no new run of the state folder trains them."""
        return self.forget.purge == "always" or (self.forget.purge == "auto" and self.data.name in OWN_DATA)


def check_clients(clients: Sequence[int], num_clients: int) -> None:
    """Raise UserError for the first client that is not in 0..C-1, and for an empty request."""
    if not clients:
        raise UserError(f"no client is named: name one in 0..{num_clients - 1}")
    for client in clients:
        if not 0 <= client < num_clients:
            raise UserError(f"client {client} is not in 0..{num_clients - 1}")


def settings(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Every setting below `config`, as (dotted name, field, value)."""
    for name, declared in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", declared, value


def values_of(config: BaseModel) -> dict[str, Any]:
    """Every value by its dotted name, those below a free mapping too."""
    found: dict[str, Any] = {}
    for name, declared, value in settings(config):
        below = {f"{name}.{key}": entry for key, entry in value.items()} if name in ("unlearn", "model.options") else {}
        found |= below if is_mapping(declared) and below else {name: value}
    return found


def to_json(config: Config) -> str:
    """One line of JSON, the same for equal settings."""
    return json.dumps(config.model_dump(), sort_keys=True)


def from_json(text: str) -> Config:
    """The settings that `to_json` wrote; settings that did not exist then have their defaults.

    Raises:
        UserError: it has a setting that no longer exists.
    """
    return stored(json.loads(text))


def stored(values: Mapping[str, Any]) -> Config:
    """The settings of a mapping that was written by this version or an earlier one.

    Raises:
        UserError: it has a setting that no longer exists.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            reason = f"{name} is no setting of this version: start a new run, or go on with the version before"
        else:
            reason = in_one_line(error, Config)
        raise UserError(reason) from None


def state_home(home: str = "") -> Path:
    """The state folder: `home`, else $FEDUNLEARN_HOME, else ~/.fedunlearn."""
    return Path(home or os.environ.get("FEDUNLEARN_HOME") or "~/.fedunlearn").expanduser().absolute()


def writable_home(home: str = "") -> Path:
    """Give the state folder, made where it is missing.

    Raises:
        UserError: it cannot be made or written.
    """
    folder = state_home(home)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        raise UserError(f"state folder {folder} cannot be used ({reason}): FEDUNLEARN_HOME or home=... names another")
    return folder
