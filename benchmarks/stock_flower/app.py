"""The same federation as Flower's PyTorch quickstart has it: model rebuilt and data loaded in every message, FedAvg.

Model, loss, partition, batch size and augmentation are fedunlearn's, so that both do the same work, in fp32.
"""

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from fedunlearn.data.partition import partition
from fedunlearn.nn.losses import multi_task_loss
from fedunlearn.nn.model import Outputs, TwoHeadResNet18

client_app = ClientApp()
server_app = ServerApp()


class Images(Dataset):
    """A client's images, transformed one by one."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.ToPILImage(),
                transforms.RandomCrop(images.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def load_data(client: int, config: dict[str, Any]) -> DataLoader:
    """Load the client's part of the images."""
    images, labels = (np.load(f"{config['store']}/train_{part}.npy", mmap_mode="r") for part in ("images", "labels"))
    own = partition(config["partition"], np.asarray(labels), config["clients"])[client]
    return DataLoader(Images(images[own], labels[own]), batch_size=config["batch"], shuffle=True)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train for one local epoch."""
    config: dict[str, Any] = dict(context.run_config)
    client = int(context.node_config["partition-id"])
    model = TwoHeadResNet18(10, config["clients"], width=config["width"])
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    model.to(device)
    loader = load_data(client, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    running_loss, examples = 0.0, 0
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        outputs: Outputs = model(images)
        loss = multi_task_loss(*outputs, labels, torch.full_like(labels, client))
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
        examples += len(labels)
    metrics = MetricRecord({"train_loss": running_loss / len(loader), "num-examples": examples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


class Timed(FedAvg):
    """FedAvg that writes down when each round began and ended."""

    def __init__(self, result: str, **options) -> None:
        super().__init__(**options)
        self.result, self.seconds = Path(result), []

    def configure_train(self, *args, **kwargs):
        """Note that a round begins."""
        self.began = time.monotonic()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, *args, **kwargs):
        """Note that a round ends."""
        aggregated = super().aggregate_train(*args, **kwargs)
        self.seconds.append(time.monotonic() - self.began)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.result.write_text(json.dumps({"seconds": self.seconds, "mebibytes": peak}))
        return aggregated


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Train all clients in every round, and evaluate nothing."""
    config: dict[str, Any] = dict(context.run_config)
    model = TwoHeadResNet18(10, config["clients"], width=config["width"])
    strategy = Timed(
        config["result"],
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=config["clients"],
        min_available_nodes=config["clients"],
    )
    strategy.start(grid=grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=config["rounds"])
