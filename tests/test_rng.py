import torch

from fedunlearn.nn.rng import generator_of


def test_generators_differ_by_place_and_repeat():
    draws = [
        torch.rand(3, generator=generator_of(*place)).tolist() for place in ((0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 2))
    ]
    assert draws[0] == draws[3]
    assert len({tuple(draw) for draw in draws}) == 3
