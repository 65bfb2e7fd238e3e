import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.data.batches import batches, cuts, scale
from fedunlearn.data.decoded import Split
from fedunlearn.nn.rng import generator_of

CPU = torch.device("cpu")


def data(n=20, size=6):
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, 3)).astype(np.uint8)
    return Split(images, np.arange(n))


def all_batches(indices, **settings):
    return list(batches(data(), np.asarray(indices), 4, device=CPU, **({"batch_size": 4} | settings)))


def test_without_a_generator_examples_come_in_order_and_as_they_are():
    (images, labels, clients), *_ = all_batches([5, 3, 8, 1, 0, 2, 7, 4])
    assert labels.tolist() == [5, 3, 8, 1]
    assert clients.tolist() == [4] * 4
    assert torch.equal(images, scale(torch.from_numpy(data().images[[5, 3, 8, 1]])))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_scaling():
    assert scale(torch.tensor([[[[0]], [[255]]]], dtype=torch.uint8)).flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("count", "sizes"), [(8, [4, 4]), (9, [4, 5]), (10, [4, 6]), (12, [4, 4, 4]), (5, [5]), (1, [1]), (3, [3])]
)
def test_no_last_batch_is_small_unless_the_client_has_few_examples(count, sizes):
    assert [len(labels) for _, labels, _ in all_batches(range(count))] == sizes


def test_a_generator_shuffles_and_the_same_one_shuffles_the_same():
    orders = [
        torch.cat([labels for _, labels, _ in all_batches(range(20), generator=generator_of(0, r))]).tolist()
        for r in (1, 1, 2)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(20))


def test_augmented_images_are_shifted_and_mirrored_originals():
    padding, found = 2, set()
    for images, labels, _ in all_batches(range(20), generator=generator_of(0), crop_padding=padding, flip=True):
        for image, label in zip(images, labels, strict=True):
            original = np.pad(data().images[int(label)], ((2, 2), (2, 2), (0, 0)))
            candidates = {
                (top, left, mirrored): scale(torch.from_numpy(original[top : top + 6, left : left + 6][None]))[0]
                for top in range(5)
                for left in range(5)
                for mirrored in (False, True)
            }
            matches = [k for k, c in candidates.items() if torch.equal(c.flip(2) if k[2] else c, image)]
            assert len(matches) == 1
            found.add(matches[0])
    assert len({top for top, _, _ in found}) > 2
    assert {mirrored for _, _, mirrored in found} == {False, True}


@settings(deadline=None)
@given(count=st.integers(0, 500), batch_size=st.integers(2, 40))
def test_cuts_make_no_small_last_batch_and_lose_no_example(count, batch_size):
    sizes = [len(part) for part in np.split(np.arange(count), cuts(count, batch_size))]
    assert sum(sizes) == count
    assert min(sizes) >= min(5, batch_size, count)
    assert max(sizes) <= batch_size + 4
    assert all(size == batch_size for size in sizes[:-1])
