"""Image grids, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch

from hmn.pictures import class_grid, enlarge, to_pil

WHITE = 255


def flat(*values: float, channels: int = 3, side: int = 2) -> torch.Tensor:
    """One image of a single value each."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, channels, side, side)


def test_each_class_has_a_row_and_a_white_gap_between():
    images = flat(0.0, 0.2, 0.4, 0.6)
    grid = np.asarray(class_grid(images, torch.tensor([0, 0, 1, 1]), pixels=2))
    assert grid.shape == (5, 5, 3)
    row = [[0, 0, WHITE, 51, 51], [WHITE] * 5, [102, 102, WHITE, 153, 153]]
    expected = np.array([row[0], row[0], row[1], row[2], row[2]])
    assert (grid == expected[:, :, None]).all()


def test_rows_are_classes_whatever_the_order_of_the_images():
    images, labels = flat(0.6, 0.0, 0.4, 0.2), torch.tensor([7, 3, 7, 3])
    grid = np.asarray(class_grid(images, labels, pixels=2))
    assert grid[0, :, 0].tolist() == [0, 0, WHITE, 51, 51]
    assert grid[3, :, 0].tolist() == [153, 153, WHITE, 102, 102]


def test_the_first_columns_and_rows_are_shown_and_a_shorter_row_ends_white():
    images, labels = flat(0.0, 0.2, 0.4, 0.6, 0.8), torch.tensor([0, 0, 0, 1, 2])
    grid = np.asarray(class_grid(images, labels, columns=2, rows=2, pixels=2))
    assert grid.shape == (5, 5, 3)
    assert grid[0, :, 0].tolist() == [0, 0, WHITE, 51, 51]
    assert grid[3, :, 0].tolist() == [153, 153, WHITE, WHITE, WHITE]


def test_pixels_are_repeated_not_blended():
    image = torch.tensor([[0.0, 1.0], [0.4, 0.6]]).expand(1, 3, 2, 2)
    grid = np.asarray(class_grid(image, torch.zeros(1), pixels=6))
    assert grid.shape == (6, 6, 3)
    expected = np.array([[0, 255], [102, 153]]).repeat(3, 0).repeat(3, 1)
    assert (grid == expected[:, :, None]).all()


def test_large_images_keep_their_size_and_get_a_wider_gap():
    grid = np.asarray(class_grid(flat(0.0, 0.0, side=128), torch.tensor([0, 1]), pixels=64))
    assert grid.shape == (2 * 128 + 8, 128, 3)
    assert (grid[128:136] == WHITE).all()
    assert (grid[:128] == 0).all()


def test_channels_keep_their_place():
    image = torch.tensor([1.0, 0.2, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert np.asarray(class_grid(image, torch.zeros(1), pixels=2))[0, 0].tolist() == [255, 51, 0]


def test_grey_images_become_grey_pictures():
    grid = class_grid(flat(0.2, 0.4, channels=1), torch.tensor([0, 1]), pixels=2)
    assert grid.mode == "RGB"
    assert np.asarray(grid)[:, 0].tolist() == [[51] * 3, [51] * 3, [255] * 3, [102] * 3, [102] * 3]


def test_values_are_rounded_and_clamped():
    image = torch.tensor([[-0.5, 0.4999 / 255], [0.5001 / 255, 1.5]]).expand(3, 2, 2)
    assert np.asarray(to_pil(image))[:, :, 0].tolist() == [[0, 0], [1, 255]]


def test_enlarging_by_one_changes_nothing():
    picture = to_pil(flat(0.2)[0])
    assert (np.asarray(enlarge(picture, 1)) == np.asarray(picture)).all()
