"""Which exceptions mean that a request is tried again."""

import pytest

from fedunlearn.errors import NotNowError, UserError, unusable_replies


def test_what_clients_sent_is_tried_again_and_all_else_is_a_bug():
    with pytest.raises(NotNowError, match="negative variances"), unusable_replies():
        raise ValueError("negative variances")
    with pytest.raises(KeyError), unusable_replies():
        raise KeyError("name")


def test_a_matrix_that_is_no_covariance_sets_the_request_aside(federate, monkeypatch, memorised):
    def no_covariance(factors, **ridges):
        raise ValueError("the input covariance of stem.0 has an eigenvalue below zero")

    monkeypatch.setattr("fedunlearn.unlearning.kronecker.projectors", no_covariance)
    with pytest.raises(UserError, match="request r1 is QUARANTINED; all else of the run is done"):
        federate("rounds=2 strategy=subset forget.schedule={1:[3]} forget.attempts=1")
    (request,) = federate.requests()
    assert (request.state, request.detail["reason"]) == (
        "QUARANTINED",
        "the input covariance of stem.0 has an eigenvalue below zero",
    )
