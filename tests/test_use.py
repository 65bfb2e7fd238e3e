"""A run's model in Python: loaded and asked, also when the images are gone."""

import shutil

import numpy as np
import pytest
import torch

from fedunlearn import UserError, open_run
from fedunlearn.build import open_dataset


@pytest.fixture
def finished(federate):
    federate.shared("rounds=2", name="test")
    return federate


def test_predictions_are_those_of_the_model_in_any_number(finished):
    run = open_run("test")
    images = np.array(open_dataset(run.config).test.images[:33])
    model = run.model()
    assert not model.training
    with torch.no_grad():
        scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = model(scaled).class_logits.softmax(1)
    found = run.predict(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(run.predict(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    assert run.class_names() == [str(k) for k in range(10)]


def test_the_model_outlives_the_images(finished):
    images = np.array(open_dataset(open_run("test").config).test.images[:2])
    before = open_run("test").predict(images)
    shutil.rmtree(finished.home / "data")
    assert torch.equal(open_run("test").predict(images), before)
    assert not (finished.home / "data").exists()


@pytest.mark.parametrize("wrong", [np.zeros((2, 9, 9, 1), np.uint8), np.zeros((2, 8, 8, 1), np.float32)])
def test_images_of_another_form_are_refused_with_what_is_taken(finished, wrong):
    with pytest.raises(UserError, match=r"run test takes uint8 \[N, 8, 8, 1\]"):
        open_run("test").predict(wrong)
