"""The strategies by the names that `strategy=` takes."""

import pkgutil

from fedunlearn.errors import UserError
from fedunlearn.federation.requests import Forgetting
from strategies.fed_eraser import FedEraser
from strategies.gradient_ascent import GradientAscent
from strategies.leave import LeaveAndContinue
from strategies.projected_ascent import ProjectedAscent
from strategies.retrain import Retraining
from strategies.ssd import SelectiveDampening
from strategies.subset import SubsetUnlearning
from strategies.weight_negation import WeightNegation

STRATEGIES: dict[str, type[Forgetting]] = {
    "subset": SubsetUnlearning,
    "ssd": SelectiveDampening,
    "leave": LeaveAndContinue,
    "ascent": GradientAscent,
    "pga": ProjectedAscent,
    "federaser": FedEraser,
    "negate": WeightNegation,
    "retrain": Retraining,
}


def strategy_of(name: str) -> type[Forgetting]:
    """The strategy of that name, or one of somebody's own, named as `module:Class`.

    Raises:
        UserError: it cannot be imported, or is no `Forgetting`.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"strategy {name}: {error} (is its folder in PYTHONPATH?)") from None
    if not (isinstance(found, type) and issubclass(found, Forgetting)):
        raise UserError(f"strategy {name} is no subclass of strategies.forgetting.Forgetting")
    return found
