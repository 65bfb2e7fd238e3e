"""The task behind Figure 2: t-SNE of embeddings, of the model's own at every stage and of CLIP's."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fedunlearn.errors import UserError
from fedunlearn.nn.model import TwoHeadModel
from fedunlearn.study.dag.settings import Pipeline
from fedunlearn.study.dag.tasks import Task, TaskContext
from fedunlearn.study.pooled.pool import Examples
from fedunlearn.study.pooled.unlearning import shuffled
from fedunlearn.study.pooled.workspace import PaperWorkspace

POINTS = 1500
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tsne(
    workspace: PaperWorkspace, context: TaskContext, *, pipeline: Pipeline, seed: int, models: Sequence[Task]
) -> dict[str, Any]:
    """Give two coordinates of the same random training examples under each model."""
    indices = some(workspace, seed)
    views = []
    for task in models:
        model = workspace.load(context, task, pipeline)
        points = flattened(embeddings(model, workspace.pool.train, indices), seed)
        views.append({"name": task.name, "points": points})
    return {"views": views, **whose(workspace, indices)}


def clip_tsne(workspace: PaperWorkspace, context: TaskContext, *, path: str, seed: int) -> dict[str, Any]:
    """Give the same under CLIP's image encoder, a TorchScript file as OpenAI publishes it."""
    indices = some(workspace, seed)
    points = flattened(clip_embeddings(Path(path), workspace.pool.train, indices), seed)
    return {"views": [{"name": "CLIP", "points": points}], **whose(workspace, indices)}


@torch.no_grad()
def embeddings(model: TwoHeadModel, examples: Examples, indices: Tensor) -> np.ndarray:
    """Compute z of the examples, [N, d]."""
    model.eval()
    return torch.cat([model(images).embedding.float().cpu() for images, _, _ in examples.batches(indices)]).numpy()


@torch.no_grad()
def clip_embeddings(path: Path, examples: Examples, indices: Tensor) -> np.ndarray:
    """Compute CLIP's `encode_image` of the examples at 224 pixels a side, [N, d].

    Raises:
        UserError: no TorchScript file is there, or not one of CLIP.
    """
    mean, std = (torch.tensor(v, device=indices.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    found = []
    try:
        with warnings.catch_warnings():
            # CLIP was published in this format
            warnings.filterwarnings("ignore", ".*torch.jit.load", FutureWarning)
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
    """Map points to two dimensions by t-SNE, [N, 2]."""
    from sklearn.manifold import TSNE

    perplexity = min(30, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(points).round(2).tolist()


def some(workspace: PaperWorkspace, seed: int) -> Tensor:
    """Choose random training examples."""
    return shuffled(workspace.pool.train.all(), seed)[:POINTS]


def whose(workspace: PaperWorkspace, indices: Tensor) -> dict[str, list[int]]:
    """Give the classes and clients of the examples."""
    train = workspace.pool.train
    return {"classes": train.labels[indices].tolist(), "clients": train.clients[indices].tolist()}
