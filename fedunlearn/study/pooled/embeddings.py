"""The step behind Figure 2: t-SNE of embeddings, of the model's own at every stage and of CLIP's."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadResNet18
from fedunlearn.study.dag.steps import Desk, Step
from fedunlearn.study.pooled.laboratory import Laboratory
from fedunlearn.study.pooled.pool import Examples
from fedunlearn.study.pooled.unlearning import shuffled

POINTS = 1500
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tsne(lab: Laboratory, desk: Desk, *, pipeline: str, seed: int, models: Sequence[Step]) -> dict:
    """Two coordinates of the same random training examples under each model."""
    indices = some(lab, seed)
    views = []
    for step in models:
        model = lab.load(desk, step, pipeline)
        views.append({"name": step.name, "points": flattened(embeddings(model, lab.pool.train, indices), seed)})
    return {"views": views, **whose(lab, indices)}


def clip_tsne(lab: Laboratory, desk: Desk, *, path: str, seed: int) -> dict:
    """The same under CLIP's image encoder, a TorchScript file as OpenAI publishes it."""
    indices = some(lab, seed)
    points = flattened(clip_embeddings(Path(path), lab.pool.train, indices), seed)
    return {"views": [{"name": "CLIP", "points": points}], **whose(lab, indices)}


@torch.no_grad()
def embeddings(model: TwoHeadResNet18, examples: Examples, indices: Tensor) -> np.ndarray:
    """z of the examples, [N, d]."""
    model.eval()
    return torch.cat([model(images).embedding.float().cpu() for images, _, _ in examples.batches(indices)]).numpy()


@torch.no_grad()
def clip_embeddings(path: Path, examples: Examples, indices: Tensor) -> np.ndarray:
    """What CLIP's `encode_image` says of the examples at 224 pixels a side, [N, d].

    Raises:
        UserError: no TorchScript file is there, or not one of CLIP.
    """
    mean, std = (torch.tensor(v, device=indices.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    found = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*torch.jit.load", FutureWarning
            )  # the format that CLIP was published in
            clip = torch.jit.load(str(path), map_location=indices.device).eval()
        dtype = next(clip.parameters()).dtype
        for images, _, _ in examples.batches(indices, 50):
            large = interpolate(images / 2 + 0.5, size=224, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
            found.append(clip.encode_image(((large - mean) / std).to(dtype)).float().cpu())
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"study.clip={path} is no TorchScript CLIP model for {indices.device} ({reason})") from None
    return torch.cat(found).numpy()


def flattened(points: np.ndarray, seed: int) -> list[list[float]]:
    """t-SNE to two dimensions, [N, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(points).round(2).tolist()


def some(lab: Laboratory, seed: int) -> Tensor:
    """Random training examples."""
    return shuffled(lab.pool.train.all(), seed)[:POINTS]


def whose(lab: Laboratory, indices: Tensor) -> dict[str, list[int]]:
    """Classes and clients of the examples."""
    return {"classes": lab.pool.train.labels[indices].tolist(), "clients": lab.pool.train.clients[indices].tolist()}
