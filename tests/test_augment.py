import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedunlearn.nn.augment import augmented, draws, shifted


def test_shifted_shifts_all_images_alike_with_zeros_behind():
    images = torch.arange(1, 2 * 5 * 5 + 1, dtype=torch.uint8).reshape(2, 5, 5, 1)
    assert torch.equal(shifted(images, 0, 0, 0), images)
    assert torch.equal(shifted(images, 0, 0, 1), images.flip(2))
    down = shifted(images, 2, 0, 0)
    assert torch.equal(down[:, 2:], images[:, :3])
    assert not down[:, :2].any()
    left = shifted(images, 0, -1, 0)
    assert torch.equal(left[:, :, :4], images[:, :, 1:])
    assert not left[:, :, 4].any()


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), padding=st.integers(0, 3), flip=st.booleans())
def test_augmented_images_are_padded_cropped_and_mirrored_one_by_one(seed, padding, flip):
    images = torch.arange(1, 3 * 4 * 5 + 1, dtype=torch.uint8).reshape(3, 4, 5, 1)
    drawn = draws(3, torch.Generator().manual_seed(seed), padding, flip)
    assert drawn[:2].max() <= 2 * padding
    assert flip or not drawn[2].any()
    found = augmented(images, drawn, padding)
    for image, result, (top, left, mirrored) in zip(images.numpy(), found.numpy(), drawn.T.tolist(), strict=True):
        padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
        crop = padded[top : top + 4, left : left + 5]
        assert (result == (crop[:, ::-1] if mirrored else crop)).all()
