"""Image grids, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch

from hmn.pictures import EASIEST, HARDEST, class_grid, enlarge, pruning_grid, to_pil

WHITE = 255


def flat(*values: float, channels: int = 3, side: int = 2) -> torch.Tensor:
    """One constant image per value."""
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


# The layout of pruning_grid for images of 60 pixels: a gap of 8, and a caption of 14 below each image
SIDE, ACROSS, DOWN, GAP = 60, 68, 82, 8


def before_pruning(order: list[int], keep: int, hardest: int) -> np.ndarray:
    """The grid of one class, in which the image of grey value 2 * i has the AUM order.index(i)."""
    grey = torch.arange(len(order)).float() * 2 / 255
    scores = torch.tensor([[float(order.index(image)) for image in range(len(order))]])
    images = grey.view(1, -1, 1, 1, 1).expand(-1, -1, 1, SIDE, SIDE)
    return np.asarray(pruning_grid(images, scores, keep, hardest))


def greys_and_frames(grid: np.ndarray) -> tuple[list[int], list[tuple[int, ...]]]:
    lefts = range(GAP, grid.shape[1] - GAP, ACROSS)
    return [int(grid[GAP, left, 0]) // 2 for left in lefts], [tuple(grid[GAP + 9, left - 2]) for left in lefts]


def test_images_before_pruning_go_from_hardest_to_easiest_and_dropped_ones_are_framed():
    grid = before_pruning([3, 0, 4, 1, 2], keep=2, hardest=1)
    assert grid.shape == (DOWN + GAP, 5 * ACROSS + GAP, 3)
    none = (WHITE, WHITE, WHITE)
    assert greys_and_frames(grid) == ([3, 0, 4, 1, 2], [HARDEST, none, none, EASIEST, EASIEST])


def test_of_many_images_both_ends_and_the_kept_between_are_shown():
    grid = before_pruning(list(range(30)), keep=20, hardest=4)
    shown, frames = greys_and_frames(grid)
    assert shown == [0, 1, 2, 4, 10, 17, 23, 27, 28, 29]
    assert frames[:3] == [HARDEST] * 3 and frames[-3:] == [EASIEST] * 3 and frames[3] == (WHITE, WHITE, WHITE)


def test_an_end_that_loses_nothing_leaves_its_place_to_what_is_kept():
    shown, frames = greys_and_frames(before_pruning(list(range(30)), keep=29, hardest=0))
    assert shown == [0, 4, 7, 10, 14, 18, 21, 24, 28, 29]
    assert frames[-1] == EASIEST and HARDEST not in frames


def test_the_aum_is_written_in_the_colour_of_the_end():
    grid = before_pruning([0, 1, 2], keep=1, hardest=1)
    caption = grid[GAP + SIDE + 3 : DOWN].astype(int)  # the edges of the text are blended with the white background
    for position, (redder, bluer) in enumerate(((True, False), (False, False), (False, True))):
        words = caption[:, GAP + position * ACROSS : GAP + position * ACROSS + SIDE]
        assert words.min() < 200
        difference = words[..., 0] - words[..., 2]
        assert ((difference > 50).any(), (difference < -50).any()) == (redder, bluer)
