"""What checks of client tasks refuse."""

import pytest
import torch

from fedunlearn.federation.tasks import Sent, of_some_images


@pytest.mark.parametrize("counts", [[-1, 0], [3, 0], [2, 1], [2**62, 2**62], [2**63 - 1, 1]])
def test_counts_of_more_images_than_there_are_are_refused_where_their_sum_wraps_around_too(counts):
    with pytest.raises(ValueError, match="counts of more images than client 0 has"):
        of_some_images(Sent({}, {0: torch.tensor(counts)}, {0: 2}, 64))


def test_counts_of_some_images_pass():
    assert of_some_images(Sent({}, {0: torch.tensor([1, 1])}, {0: 2}, 64)) is None
