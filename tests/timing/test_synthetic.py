"""Random numbers that stand in for captured tensors look like those of training."""

from __future__ import annotations

from dataclasses import replace

import torch

from fp8tune.timing.synthetic import random_activations, random_weight
from tests.helpers import signature

SHAPE = replace(signature(64, 4096, 128).shape, input_dtype="float32")


def generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def test_activations_have_a_few_outlier_channels() -> None:
    spread = random_activations(SHAPE, generator()).std(0)
    outliers = spread > 10
    assert outliers.sum() == 4
    assert torch.allclose(spread[~outliers], torch.ones(()), atol=0.5)


def test_even_a_narrow_layer_has_one() -> None:
    narrow = random_activations(replace(SHAPE, k=16), generator())
    assert (narrow.std(0) > 10).sum() == 1


def test_weights_are_as_initialised() -> None:
    weight = random_weight(SHAPE, generator())
    linear = torch.nn.Linear(4096, 128).weight
    assert weight.dtype is torch.bfloat16
    assert weight.shape == linear.shape
    assert torch.isclose(weight.float().std(), linear.std(), rtol=0.02)
    assert weight.abs().max() <= 1 / 64
