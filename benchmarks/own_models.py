"""Do other networks than ResNet-18 forget? `python -m benchmarks.own_models --root IMAGES [WORDS]`, which goes on.

For each network there is a federated study: a base of all clients, the retrained model without client 0, and what
`subset` and `leave` make of the base. Printed are class accuracies, right after the request and some rounds later. A
study keeps what it has done, so that the same command goes on where it was stopped; `study.minutes=30` stops it.

The images are few and the steps many, so that the networks memorise them: else there is nothing to forget. The
transformer needs a lower rate for that, and twice the rounds.
"""

import argparse
import logging
import sys
from collections.abc import Iterator

from benchmarks import timing
from fedunlearn.log import set_up
from fedunlearn.study.dag.command import run_study, study_folder
from fedunlearn.study.federated.study import FederatedStudy
from fedunlearn.study.federated.tables import RETRAINED, Results, label

NETWORKS = {
    "small_cnn": ["model=small_cnn", "model.width=32"],
    "mobilenet_v3_small": ["model=mobilenet_v3_small", "train.precision=fp32", "train.batch_size=32"],
    "vit_tiny": [
        "model=timm:vit_tiny_patch16_224", "model.options.patch_size=8", "model.options.depth=4",
        "model.options.embed_dim=96", "train.precision=fp32", "train.lr=0.01", "train.weight_decay=0", "rounds=60",
    ],
}  # fmt: skip
WORDS = [
    "dataset=cifar10", "data.name=folder", "scale=laptop", "data.limit=1500", "clients=5", "rounds=30",
    "train.epochs=5", "train.batch_size=16", "train.lr=0.05", "train.crop_padding=0", "train.flip=false",
    "study.strategies=[subset,leave]", "study.order=[0]", "study.after=[0,10]", "study.seeds=[0]",
    "study.retrained_seeds=[1]",
]  # fmt: skip
MEASURES = {"forget": "forgotten", "retain": "others", "test": "test", "gap": "memorisation gap"}


def main() -> int:
    """Do what is missing and print the table; returns 3 where time ran out."""
    p = argparse.ArgumentParser("python -m benchmarks.own_models", description=__doc__)
    p.add_argument("--root", required=True, help="folder or archive of images, as of data.root")
    p.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    p.add_argument("--words", nargs="*", default=[], help="further settings, as study.minutes=30 rounds=20")
    options = p.parse_args()
    set_up()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    status, table = 0, []
    for name in options.networks:
        words = [*WORDS, f"data.root={options.root}", f"study.name=own-{name}", *NETWORKS[name], *options.words]
        study = FederatedStudy(words)
        status = max(status, run_study(study))
        table += [[name, *row] for row in rows(study)]
    timing.table("means over seeds", ("network", "rounds later", "model", *MEASURES.values()), table)
    return status


def rows(study: FederatedStudy) -> Iterator[list[str]]:
    """Give the rows of a study that are there: rounds after the request, whose model, and its accuracies."""
    results = Results(study.plan, study_folder(study))
    for case in study.plan.cases():
        found = results.rows(case, study.settings.study.pipelines[0])
        for row in sorted(found, key=lambda row: (row.after, row.strategy != RETRAINED)):
            named = [label(row.strategy)] if row.strategy != RETRAINED else ["retrained", "another retrained"]
            values = [[row.mean(measure)] if len(named) == 1 else row.models[measure] for measure in MEASURES]
            for name, *scores in zip(named, *values, strict=False):
                yield [str(row.after), name, *(f"{score:.3f}" for score in scores)]


if __name__ == "__main__":
    sys.exit(main())
