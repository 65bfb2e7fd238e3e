"""The strategies by the names that `strategy=` takes."""

from strategies.fed_eraser import FedEraser
from strategies.forgetting import Forgetting
from strategies.gradient_ascent import GradientAscent
from strategies.leave import LeaveAndContinue
from strategies.projected_ascent import ProjectedAscent
from strategies.retraining import Retraining
from strategies.ssd import SelectiveDampening
from strategies.subset_unlearning import SubsetUnlearning
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
