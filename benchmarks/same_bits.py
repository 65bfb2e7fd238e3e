"""Whether a change of the code changes a result: `python -m benchmarks.same_bits bits.json`, before it and after it.

Short runs on digits, in this process, on one thread and in fp32: every strategy with a request after the third of six
rounds and one for two clients after the fifth, a run that is stopped and resumed, and the smallest tasks of both
studies. What is compared is the SHA-256 of every tensor of the final checkpoints, and every figure of the metrics but
times and memory. Where the file does not exist it is written: do that with the earlier commit, on the same machine,
since values depend on the kind of processor.
"""

import argparse
import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from fedunlearn.apps import client_app
from fedunlearn.apps.server_app import server_app
from fedunlearn.errors import UserError
from fedunlearn.federation.local_grid import LocalGrid
from fedunlearn.study.dag.command import run_study
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.pooled.study import PaperStudy

STRATEGIES = ("subset", "relabel", "gradients", "ssd", "leave", "ascent", "pga", "federaser", "negate", "retrain")
RUN = (
    "clients=8 rounds=6 data.limit=160 data.test_limit=100 partition.kind=iid train.epochs=10 train.batch_size=20 "
    "train.lr=0.05 train.server_momentum=0.3 train.crop_padding=0 train.precision=fp32 train.client_head_steps=20 "
    "forget.schedule={3:[2],5:[1,4]} forget.gate=false reply_band=0"
)  # so that clients 1 and 4 are memorised when they leave
POOLED = [
    "dataset=digits", "scale=laptop", "study.workers=1", "study.seeds=[0]", "study.order=[0]", "data.limit=300",
    "data.test_limit=100", "learning.epochs=2", "search.trials=2", "learning.precision=fp32", "finetuning.epochs=1",
    "finetuning.class_weights=[0.5]", "study.stages=[train,retrain,unlearn]", "study.pipelines=[ce_dl]",
]  # fmt: skip
FEDERATED = [
    "dataset=digits", "scale=laptop", "clients=4", "data.limit=160", "data.test_limit=60",
    "rounds=4", "train.epochs=4", "train.client_head_steps=10", "study.after=[0,1]", "study.apart=1",
    "study.order=[0,1]", "study.seeds=[0]", "study.workers=1", "study.stages=[train,retrain,forget]",
    "study.scenarios=[sequential]",
    "study.strategies=[subset,ssd,federaser,negate]",
]  # fmt: skip
UNLIKE = re.compile(
    r"(seconds|work|busiest|mebibytes|machine|settings|sha256|files|created|due_at)$"
)  # times, memory, names

APP = Path(__file__).parent.parent / "simulations" / "digits" / "conf"


def main() -> int:
    """Compare with the file, or write it; returns 1 where something differs."""
    p = argparse.ArgumentParser("python -m benchmarks.same_bits", description=__doc__)
    p.add_argument("file", type=Path)
    p.add_argument("--only", default="", help="cases whose names begin so")
    options = p.parse_args()
    wanted = [name for name in cases() if name.startswith(options.only)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        found = dict(zip(wanted, pool.map(values_of, wanted, chunksize=1), strict=True))
    if not options.file.exists():
        text = json.dumps({"machine": machine(), "cases": found}, indent=0, sort_keys=True)
        options.file.write_text(text + "\n")
        print(f"{sum(map(len, found.values()))} values of {len(found)} cases written to {options.file}")
        return 0
    return compare(json.loads(options.file.read_text()), found)


def compare(stored: dict[str, Any], found: dict[str, dict[str, Any]]) -> int:
    """Print what differs; 1 if anything does."""
    if stored["machine"] != machine():
        print(f"the values are of another kind of machine ({stored['machine']}, here {machine()}): make them anew")
    different, compared = 0, 0
    for case, values in found.items():
        expected = stored["cases"][case]
        for name in sorted(expected.keys() | values.keys()):
            compared += 1
            if expected.get(name) != values.get(name):
                different += 1
                print(f"{case}: {name}: {expected.get(name, 'absent')} before, {values.get(name, 'absent')} now")
    print(f"{compared} values of {len(found)} cases: {f'{different} different' if different else 'identical'}")
    return int(different > 0)


def values_of(case: str) -> dict[str, Any]:
    """What a case leaves, on one thread."""
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    return cases()[case]()


def cases() -> dict[str, Callable[[], dict[str, Any]]]:
    """What is run, by name."""
    runs = {name: lambda name=name: run(f"strategy={name}") for name in STRATEGIES}
    return {
        **runs,
        "fixed": lambda: run(
            "strategy=ssd unlearn.tune=fixed unlearn.alpha=1.5 train.client_head_by=local message_dtype=bf16"
        ),
        "resumed": lambda: run("strategy=subset", stop_after=4),
        "study-pooled": lambda: of_study(PaperStudy, POOLED),
        "study-federated": lambda: of_study(FederatedStudy, FEDERATED),
    }


def run(words: str, *, stop_after: int = 0) -> dict[str, Any]:
    """The final checkpoint and the metrics of a run, stopped once where it is said to be."""
    with home() as folder:
        if stop_after:
            with contextlib.suppress(UserError):
                federate(f"{RUN} {words}", Stopping(4, stop_after))
        federate(f"{RUN} {words}", LocalGrid(4, client_app.app))
        (checkpoint,) = (folder / "runs" / "test" / "checkpoints").iterdir()
        rows = [json.loads(line) for line in (folder / "runs" / "test" / "metrics.jsonl").read_text().splitlines()]
        by_key = {f"{row['kind']}/{row['round']}/{row.get('request', '')}": row for row in rows}
        return {**tensors(checkpoint, "checkpoint"), **figures(by_key, "metrics")}


class Stopping(LocalGrid):
    """A grid that fails for good once a round is reached."""

    def __init__(self, nodes: int, round_: int) -> None:
        super().__init__(nodes, client_app.app)
        self.round = round_

    def push_messages(self, messages: Any) -> list[str]:
        """Fail where a message is of that round's training or later."""
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train" and int(message.metadata.group_id) >= self.round:
                raise UserError("stopped here")
        return super().push_messages(messages)


def federate(words: str, grid: LocalGrid) -> None:
    """The whole server app, without a word."""
    context = Context(1, 1, {}, RecordDict(), {"overrides": f"{words} run=test"})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        server_app(APP)(grid, context)


def of_study(kind: Callable[[list[str]], Any], words: list[str]) -> dict[str, Any]:
    """Every task's result and tensors."""
    with home() as folder:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run_study(kind(words))
        if status:
            sys.exit(output.getvalue())
        found: dict[str, Any] = {}
        for file in folder.glob("studies/*/tasks/*/result.json"):
            content = json.loads(file.read_text())
            task = content.pop("task")
            for row in content.get("history", []):
                row.pop()  # seconds
            found |= figures(content, task)
            for kept in file.parent.glob("*.safetensors"):
                found |= tensors(kept, f"{task}/{kept.stem}")
        return found


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """An empty state folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDUNLEARN_HOME"] = folder
        yield Path(folder)


def tensors(file: Path, prefix: str) -> dict[str, str]:
    """The first half of the SHA-256 of every tensor, with its type and shape."""
    return {
        f"{prefix}/{name}": hashlib.sha256(
            f"{value.dtype} {list(value.shape)} ".encode() + value.contiguous().numpy().tobytes()
        ).hexdigest()[:32]
        for name, value in load_file(file).items()
    }


def figures(content: Any, prefix: str) -> dict[str, Any]:
    """Every number and word in nested lists and mappings."""
    if UNLIKE.search(prefix.rpartition("/")[2]):
        return {}
    if isinstance(content, dict):
        return {k: v for name, value in content.items() for k, v in figures(value, f"{prefix}/{name}").items()}
    if isinstance(content, list):
        return {k: v for place, value in enumerate(content) for k, v in figures(value, f"{prefix}/{place}").items()}
    return {prefix: content}


def machine() -> str:
    """The kind of processor, as far as it changes bits."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


if __name__ == "__main__":
    sys.exit(main())
