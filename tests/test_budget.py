"""Budgets: from images per class to floats and back."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hmn.budget import budget_floats, instances_that_fit
from hmn.errors import ConfigError


@pytest.mark.parametrize(
    ("classes", "channels", "size", "expected"),
    [
        (10, 3, 32, (30_720, 307_200, 1_536_000)),  # CIFAR-10, SVHN
        (100, 3, 32, (307_200, 3_072_000, 15_360_000)),  # CIFAR-100
        (200, 3, 64, (2_457_600, 24_576_000, 122_880_000)),  # Tiny ImageNet
        (10, 3, 224, (1_505_280, 15_052_800, 75_264_000)),  # ImageNet-10
        (10, 3, 128, (491_520, 4_915_200, 24_576_000)),  # Imagenette
        (10, 1, 8, (640, 6_400, 32_000)),  # UCI digits
    ],
)
def test_the_budget_is_what_as_many_real_images_take(classes, channels, size, expected):
    assert tuple(budget_floats(ipc, classes, channels, size) for ipc in (1, 10, 50)) == expected


@settings(max_examples=300, derandomize=True)
@given(
    budget=st.integers(1, 10**9),
    shared=st.integers(0, 10**9),
    instance=st.integers(1, 5000),
    classes=st.integers(2, 1000),
    percent=st.integers(0, 99),
)
def test_as_many_images_fit_as_exact_arithmetic_allows(budget, shared, instance, classes, percent):
    room = Fraction(100 + percent, 100) * budget - shared
    expected = room // (classes * instance)
    assume(expected >= 1)
    assert instances_that_fit(budget, shared, instance, classes, over_budget=percent / 100) == expected


def test_ten_percent_beyond_the_budget_is_not_lost_to_rounding():
    # 1.1 * 30720 is 33792.000000000004 but 1.1 * 30 is 33.0 and 1.15 * 100 is 114.99999999999999
    assert instances_that_fit(100, 0, 1, 5, over_budget=0.15) == 23
    assert instances_that_fit(30_720, 5_675, 32, 10, over_budget=0.1) == 87


def test_a_budget_too_small_is_told_the_smallest_that_fits():
    with pytest.raises(ConfigError) as caught:
        instances_that_fit(5_994, 5_675, 32, 10)
    text = str(caught.value)
    assert "\n" not in text and text.startswith("container:")
    assert "5,994" in text and "memory.images_per_class" in text
    smallest = int(re.search(r"smallest budget that fits is ([\d,]+)", text)[1].replace(",", ""))
    assert smallest == 5_995
    assert instances_that_fit(smallest, 5_675, 32, 10) == 1
    with pytest.raises(ConfigError):
        instances_that_fit(smallest - 1, 5_675, 32, 10)


def test_shared_floats_beyond_the_budget_are_refused_too():
    with pytest.raises(ConfigError, match="shared tiers take 200 floats"):
        instances_that_fit(100, 200, 1, 2)
