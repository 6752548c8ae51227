"""What a policy reads of a run's observations."""

from __future__ import annotations

import math

import pytest
import torch

from jel import FEATURES, OBSERVATIONS, JelError
from jel.features import feature_vector, observations_of
from tests.jel_parts import INF, NAN

ALL = tuple(FEATURES)


def test_every_feature_is_made_of_an_observation_there_is():
    assert observations_of(ALL) <= OBSERVATIONS
    assert observations_of(("progress", "log_grad_norm")) == {"progress", "grad_norm"}
    assert observations_of(()) == frozenset()


@pytest.mark.parametrize("unknown", [["loss"], ["progress", "loss"], "progress", [None], [[]], [{}], ["a\nb"]])
def test_unknown_features_are_named_in_one_line(unknown):
    with pytest.raises(JelError, match="unknown features .*; there are progress, log_probe_loss") as e:
        observations_of(unknown)
    assert "\n" not in str(e.value)


def test_one_runs_features_are_a_vector():
    observation = {"progress": 0.25, "probe_loss": 4.0, "train_loss": 5.0, "grad_norm": 0.5}
    found = feature_vector(ALL, observation)
    torch.testing.assert_close(found, torch.tensor([0.25, math.log(4), math.log(5), math.log(0.5)]))
    assert found.dtype == torch.float32
    assert feature_vector(("log_grad_norm", "progress"), observation).tolist() == [found[3], found[0]]


def test_what_was_not_observed_reads_as_0():
    for nothing in (NAN, torch.tensor(NAN), torch.tensor([NAN, 1.0])):
        found = feature_vector(("progress", "log_train_loss"), {"progress": 0.5, "train_loss": nothing})
        assert found[..., 1].flatten().tolist() == [0.0] * found[..., 1].numel() and (found[..., 0] == 0.5).all()
    assert feature_vector(("progress",), {"progress": NAN}).tolist() == [0.0]


def test_no_reading_makes_a_feature_that_is_not_finite():
    for value in (0.0, -1.0, 1e-300, INF, -INF, NAN, 1e300):
        assert feature_vector(("log_probe_loss",), {"probe_loss": value}).isfinite().all(), value


def test_floats_are_broadcast_to_the_episodes():
    losses = torch.tensor([1.0, 2.0, NAN], dtype=torch.float64)
    found = feature_vector(("progress", "log_probe_loss"), {"progress": 0.5, "probe_loss": losses})
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0], [0.5, math.log(2)], [0.5, 0.0]]))
    assert found.dtype == torch.float32
    for i, loss in enumerate(losses.tolist()):  # an episode's features do not depend on the others
        assert torch.equal(
            feature_vector(("progress", "log_probe_loss"), {"progress": 0.5, "probe_loss": loss}), found[i]
        )
