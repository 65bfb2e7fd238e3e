"""Membership inference: whether the model's answers tell forgotten from retained examples (paper, Section 5)."""

import numpy as np


def logistic_mia(retain_probs: np.ndarray, forget_probs: np.ndarray, *, folds: int = 5, seed: int = 42) -> float:
    """Accuracy of a logistic regression that tells forget (1) from retain (0) by probabilities, in percent.

    Its classes are weighted to be balanced, and its predictions cross-validated over stratified, shuffled folds (paper,
    Section 5). Good unlearning gives the accuracy that the gold model gives, not the lowest.

    Args:
        retain_probs: softmax outputs of the model on retained examples, [N_r, K], or `evaluate.Predictions.features`.
        forget_probs: on forgotten examples, [N_f, K].

    Raises:
        ValueError: fewer examples than folds on either side.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(retain_probs), len(forget_probs)) < folds:
        raise ValueError(f"{len(retain_probs)} retained and {len(forget_probs)} forgotten examples for {folds} folds")
    features = np.concatenate([retain_probs, forget_probs])
    labels = np.repeat([0, 1], [len(retain_probs), len(forget_probs)])
    attacker = LogisticRegression(class_weight="balanced", max_iter=1000)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return 100 * float(np.mean(cross_val_predict(attacker, features, labels, cv=split) == labels))
