"""Slow and obvious versions of the formulas, to hold the fast ones against."""

import itertools

import torch
from torch.nn.functional import cross_entropy


def disentanglement_loss(z, client_ids, *, margin=1.0, pull=1.0, push=1.0, class_ids=None):
    if class_ids is not None:
        classes = sorted(set(class_ids.tolist()))
        losses = [
            disentanglement_loss(z[class_ids == k], client_ids[class_ids == k], margin=margin, pull=pull, push=push)
            for k in classes
        ]
        return sum(losses) / len(classes)
    members = {s: z[client_ids == s] for s in sorted(set(client_ids.tolist()))}
    centroids = {s: m.mean(0) for s, m in members.items()}
    pulls = [sum(((row - centroids[s]) ** 2).sum() for row in m) / len(m) for s, m in members.items()]
    pairs = list(itertools.permutations(centroids, 2))
    pushes = [max(0.0, margin - (centroids[a] - centroids[b]).norm()) ** 2 for a, b in pairs]
    return pull * sum(pulls) / len(pulls) + push * (sum(pushes) / len(pairs) if pairs else 0.0)


def fisher(model, batches, *, head="class", estimator="per_example"):
    """One backward pass an example (or a batch), squared and averaged."""
    names, params = zip(*model.named_parameters(), strict=True)
    total, count = {name: torch.zeros_like(p) for name, p in zip(names, params, strict=True)}, 0
    model.eval()
    for images, class_labels, client_ids in batches:
        size = 1 if estimator == "per_example" else len(images)
        for i in range(0, len(images), size):
            out = model(images[i : i + size])
            logits, labels = (out[0], class_labels) if head == "class" else (out[1], client_ids)
            loss = cross_entropy(logits, labels[i : i + size])
            grads = torch.autograd.grad(loss, params, allow_unused=True)
            for name, grad in zip(names, grads, strict=True):
                total[name] += 0 if grad is None else grad**2
            count += 1
    return {name: t / count for name, t in total.items()}


def dampen(params, fisher_full, fisher_forget, *, alpha, lambda_, exponent=1.0):
    """Eq. 8-9, weight by weight."""
    result = {}
    for name, theta in params.items():
        flat = theta.flatten().tolist()
        rows = zip(flat, fisher_full[name].flatten().tolist(), fisher_forget[name].flatten().tolist(), strict=True)
        new = [t * min((lambda_ * d / f) ** exponent, 1) if f > alpha * d else t for t, d, f in rows]
        result[name] = torch.tensor(new, dtype=theta.dtype).reshape(theta.shape)
    return result
