"""Storage budget: from images per class to float32 numbers, and from those to the instances that a container holds."""

from __future__ import annotations

from hmn.errors import ConfigError


def budget_floats(images_per_class: int, classes: int, channels: int, image_size: int) -> int:
    """B = IPC * C * channels * H * W: the float32 numbers that ``images_per_class`` real images per class take."""
    return images_per_class * classes * channels * image_size**2


def instances_that_fit(
    budget: int, shared_floats: int, instance_floats: int, classes: int, *, over_budget: float = 0.0
) -> int:
    """floor(((1 + p) B - F) / (C |m_I|)): instances per class that fit B enlarged by the fraction p, ``over_budget``.

    Raises ``ConfigError`` when not even one instance per class fits, naming the smallest budget that would.
    """
    # The small term guards (1 + p) * B against a product just below a whole number, as 1.1 * 30720 may be.
    room = int((1 + over_budget) * budget + 1e-6) - shared_floats
    count = room // (classes * instance_floats)
    if count < 1:
        raise ConfigError(
            f"container: its shared tiers take {shared_floats:,} floats and one instance per class "
            f"{classes * instance_floats:,} more, over the budget of {budget:,}; the smallest budget that fits is "
            f"{shared_floats + classes * instance_floats:,}: raise memory.images_per_class or shrink the container"
        )
    return count
