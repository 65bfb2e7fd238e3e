"""Tell forget from retain examples by a model's predictions: membership inference (paper, Section 5)."""

import numpy as np


def logistic_mia(retain_probs: np.ndarray, forget_probs: np.ndarray, *, folds: int = 5, seed: int = 42) -> float:
    """Compute the membership inference (MIA) accuracy of a logistic regression, in percent.

    The regression tells forget (1) from retain (0) examples by the model's probabilities. Its classes are weighted to
    be balanced. Its predictions are cross-validated over stratified, shuffled folds (paper, Section 5). Good unlearning
    gives the accuracy that the retrained model gives, not the lowest.

    Args:
        retain_probs: softmax outputs of the model on retain examples, [N_r, K], or `evaluate.Predictions.features`.
        forget_probs: on forget examples, [N_f, K].
        folds: of the cross-validation.
        seed: of the shuffle.

    Returns:
        0..100.

    Raises:
        ValueError: fewer examples than folds on either side.

    Example:
        >>> retain, forget = np.array([[1.0, 0.0]] * 5), np.array([[0.0, 1.0]] * 4 + [[1.0, 0.0]])
        >>> logistic_mia(retain, forget)  # one forget example in five looks like a retain example
        90.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    if min(len(retain_probs), len(forget_probs)) < folds:
        raise ValueError(f"{len(retain_probs)} retain and {len(forget_probs)} forget examples for {folds} folds")
    features = np.concatenate([retain_probs, forget_probs])
    labels = np.repeat([0, 1], [len(retain_probs), len(forget_probs)])
    attacker = LogisticRegression(class_weight="balanced", max_iter=1000)
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return 100 * float(np.mean(cross_val_predict(attacker, features, labels, cv=split) == labels))
