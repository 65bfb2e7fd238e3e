"""Slow and obvious versions of the formulas, which the fast ones are compared with."""

import itertools

import numpy as np
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


def fisher(model, batches, *, loss_head="class", estimator="per_example"):
    """One backward pass an example (or a batch), squared and averaged."""
    names, params = zip(*model.named_parameters(), strict=True)
    total, count = {name: torch.zeros_like(p) for name, p in zip(names, params, strict=True)}, 0
    model.eval()
    for images, class_labels, client_ids in batches:
        size = 1 if estimator == "per_example" else len(images)
        for i in range(0, len(images), size):
            out = model(images[i : i + size])
            logits, labels = (out[0], class_labels) if loss_head == "class" else (out[1], client_ids)
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


def train(model, images, labels, clients, order, drawn, *, batch_size, lr, momentum, weight_decay, padding):
    """The paper's pipeline, plainly: crop and flip each image, CE + CE + 0.1 DL, SGD with momentum."""
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay, fused=False, foreach=False
    )
    model.train()
    for start in range(0, len(order), batch_size):
        batch = []
        for place in range(start, min(start + batch_size, len(order))):
            top, left, mirrored = (int(value[place]) for value in drawn)
            image = images[order[place]]
            height, width, _ = image.shape
            padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
            image = padded[top : top + height, left : left + width]
            batch.append(image[:, ::-1] if mirrored else image)
        x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
        y, s = labels[order[start : start + batch_size]], clients[order[start : start + batch_size]]
        class_logits, client_logits, z = model(x)
        loss = cross_entropy(class_logits, y) + cross_entropy(client_logits, s) + 0.1 * disentanglement_loss(z, s)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def logistic_mia(retain, forget, *, folds=5, seed=42):
    """scikit-learn fold by fold: train on four, predict the fifth, count."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    x, y = np.concatenate([retain, forget]), np.array([0] * len(retain) + [1] * len(forget))
    right = 0
    for train_rows, test_rows in StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y):
        attacker = LogisticRegression(class_weight="balanced", max_iter=1000).fit(x[train_rows], y[train_rows])
        right += (attacker.predict(x[test_rows]) == y[test_rows]).sum()
    return 100 * right / len(y)


def input_covariances(model, images):
    """Mean of x x^T over images and positions, one by one, in fp64."""
    seen, covariances = {}, {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)}
    hooks = [m.register_forward_hook(lambda m, i, o, n=n: seen.update({n: i[0].detach()})) for n, m in layers.items()]
    model.eval()
    model(images)
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if name.startswith("client_head"):
            continue
        rows = []
        for x in seen[name].double():
            if isinstance(layer, torch.nn.Linear):
                rows.append(torch.cat([x, torch.ones(1)]))
                continue
            k, pad, step = layer.kernel_size[0], layer.padding[0], layer.stride[0]
            wide = torch.nn.functional.pad(x, (pad, pad, pad, pad))
            distance = step * max(1, x.shape[1] // step // 8)
            corners = range(0, wide.shape[1] - k + 1, distance)
            rows += [wide[:, i : i + k, j : j + k].flatten() for i in corners for j in corners]
        covariances[f"{name}.inputs"] = sum(torch.outer(row, row) for row in rows) / len(rows)
    return covariances


def kronecker_factors(model, images, labels):
    """Input covariances, and the mean of d d^T over images and positions of the gradients by outputs, one by one."""
    factors = input_covariances(model, images)
    layers = {n: m for n, m in model.named_modules() if f"{n}.inputs" in factors}
    gradients = {name: [] for name in layers}
    model.eval()
    for image, label in zip(images, labels, strict=True):
        outputs, hooks = {}, []
        for name, layer in layers.items():
            hooks.append(layer.register_forward_hook(lambda m, i, o, n=name, seen=outputs: seen.update({n: o})))
        loss = torch.nn.functional.cross_entropy(model(image[None]).class_logits, label[None])
        for hook in hooks:
            hook.remove()
        for name, d in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
            d = d[0].double()
            gradients[name] += list(d.flatten(1).T) if d.ndim == 3 else [d]
    found = {f"{name}.outputs": sum(torch.outer(d, d) for d in rows) / len(rows) for name, rows in gradients.items()}
    return factors | found


def projectors(covariances, *, ridge):
    """By eigenvalues: tau / (tau + lambda) along each direction."""
    found = {}
    for name, a in covariances.items():
        values, vectors = map(torch.from_numpy, np.linalg.eigh(a.double().numpy()))
        tau = ridge * a.double().diagonal().mean()
        found[name] = vectors @ torch.diag(tau / (tau + values.clamp(min=0))) @ vectors.T
    return found


def distill(model, images, soft_labels, projectors, *, steps, lr, momentum):
    """Steps down the cross-entropy to soft labels, each layer's step times its projector, written out."""
    layers = {name: layer for name, layer in model.named_modules() if f"{name}.inputs" in projectors}
    speed = dict.fromkeys(layers, 0.0)
    model.eval()
    for chosen in steps:
        model.zero_grad()
        logits = model(images[chosen]).class_logits
        (-(soft_labels[chosen] * logits.log_softmax(1)).sum(1).mean()).backward()
        for name, layer in layers.items():
            gradient = layer.weight.grad.flatten(1)
            if layer.bias is not None:
                gradient = torch.cat([gradient, layer.bias.grad[:, None]], 1)
            speed[name] = momentum * speed[name] + gradient.double() @ projectors[f"{name}.inputs"].double()
            with torch.no_grad():
                size = layer.weight[0].numel()
                layer.weight -= (lr * speed[name][:, :size].reshape(layer.weight.shape)).float()
                if layer.bias is not None:
                    layer.bias -= (lr * speed[name][:, -1]).float()


def ascend(model, batches, *, lr, clip, radius=float("inf")):
    """Clipped steps up the class loss, each projected into the ball, without an early end."""
    start = [p.detach().clone() for p in model.parameters()]
    for images, labels, _ in batches:
        model.train()
        model.zero_grad()
        cross_entropy(model(images).class_logits, labels).backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p += lr * g * min(1, clip / norm)
            distance = torch.cat([(p - s).flatten() for p, s in zip(model.parameters(), start, strict=True)]).norm()
            for p, s in zip(model.parameters(), start, strict=True):
                p.copy_(s + (p - s) * min(1, radius / distance))
