"""FreD against SciPy's transform: which coefficients are kept, what they decode to, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.fft import dctn, idctn
from torch import Tensor

from hmn.config.containers import FredConfig
from hmn.containers import KINDS, storage
from hmn.containers.fred import FredShape, FrequencyMemory, dct, dct_matrix, fill, inverse_dct_matrix, most_varying
from hmn.containers.positions import LIMIT, pack, unpack
from hmn.errors import ConfigError
from tests.real_images import RandomImages

CLASSES, IMAGES = 2, 5
SMALL = FredShape(
    classes=CLASSES,
    channels=3,
    image_size=8,
    coefficients=20,
    pixel_space="normalised",
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.3, 0.25),
)
CIFAR10 = dict(classes=10, channels=3, image_size=32)
REAL = RandomImages(CLASSES, 3, 8)
each_scale = pytest.mark.parametrize("orthonormal", [True, False])


def configured(**changes: object) -> FredConfig:
    return FredConfig(**{"name": "fred", **changes})


def started(shape: FredShape = SMALL, instances: int = IMAGES, real: RandomImages = REAL) -> FrequencyMemory:
    container = FrequencyMemory(shape, instances)
    container.initialise(torch.Generator(), configured(), real)
    return container


def planned(data: dict[str, int], **changes: object) -> FredShape:
    kind = KINDS["fred"]
    return kind.shape.of(kind.fill(configured(**changes), **data, images_per_class=1), **data)


def pixels(images: Tensor) -> np.ndarray:
    """Pixels of ``images`` in the container's own space."""
    return ((images - torch.tensor(SMALL.mean).view(3, 1, 1)) / torch.tensor(SMALL.std).view(3, 1, 1)).double().numpy()


# The transform


@each_scale
@pytest.mark.parametrize("side", [1, 2, 7, 8, 32])
def test_the_transform_and_its_inverse_are_scipys(side, orthonormal):
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = "ortho" if orthonormal else None
    found = dct(images, orthonormal)
    np.testing.assert_allclose(found.numpy(), dctn(images.numpy(), axes=(2, 3), norm=norm), rtol=0, atol=1e-9)
    inverse = inverse_dct_matrix(side, orthonormal).double()
    expected = idctn(found.numpy(), axes=(2, 3), norm=norm)
    np.testing.assert_allclose((inverse @ found @ inverse.T).numpy(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(inverse @ found @ inverse.T, images, rtol=0, atol=1e-5)


def test_the_orthonormal_matrix_is_and_the_other_is_twice_a_cosine():
    eye = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(dct_matrix(8, True) @ dct_matrix(8, True).T, eye)
    assert dct_matrix(8, False)[3, 1].item() == pytest.approx(2 * np.cos(np.pi * 3 * 3 / 16))


# What is kept


def test_positions_are_where_the_papers_coefficients_vary_most_within_the_class():
    container = started()
    images = pixels(REAL.draw(IMAGES))
    for label in range(CLASSES):
        of_class = images[label * IMAGES : (label + 1) * IMAGES]
        flat = dctn(of_class, axes=(2, 3)).mean(axis=1).reshape(IMAGES, 64)
        share = np.diag(np.cov(flat.T)) / np.trace(np.cov(flat.T))
        expected = sorted(np.argsort(-share)[: SMALL.coefficients])
        assert unpack(container.positions[label]).tolist() == expected
    assert not torch.equal(container.positions[0], container.positions[1])


def test_the_scale_of_what_is_stored_does_not_change_the_positions():
    scaled = started(replace(SMALL, orthonormal=False))
    assert torch.equal(scaled.positions, started().positions)
    assert not torch.allclose(scaled.instances, started().instances)


def test_of_equal_variances_the_lowest_frequencies_are_kept():
    assert most_varying(torch.zeros(1, 4, 3, 4, 4), 5).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.filterwarnings("error")
def test_one_image_per_class_has_positions_too():
    container = started(instances=1)
    assert unpack(container.positions).tolist() == [list(range(20))] * CLASSES
    assert container.instances.isfinite().all()


@torch.no_grad()
@each_scale
def test_images_start_as_the_real_ones_without_the_other_coefficients(orthonormal):
    container = started(replace(SMALL, orthonormal=orthonormal))
    spectrum = dctn(pixels(REAL.draw(IMAGES)), axes=(2, 3)).reshape(CLASSES, IMAGES, 3, 64)
    mask = np.zeros((CLASSES, 1, 1, 64))
    for label, kept in enumerate(unpack(container.positions).tolist()):
        mask[label, 0, 0, kept] = 1
    low = idctn((spectrum * mask).reshape(-1, 3, 8, 8), axes=(2, 3))
    expected = torch.tensor(low).float() * container.space.std + container.space.mean
    found = container.decode(torch.arange(CLASSES * IMAGES))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, REAL.draw(IMAGES), atol=0.1)


@torch.no_grad()
@each_scale
def test_with_all_coefficients_the_images_are_the_real_ones(orthonormal):
    container = started(replace(SMALL, coefficients=64, orthonormal=orthonormal))
    torch.testing.assert_close(container.decode(torch.arange(10)), REAL.draw(IMAGES), rtol=0, atol=1e-5)


def test_it_starts_from_as_many_random_images_as_it_holds():
    real = RandomImages(CLASSES, 3, 8)
    started(real=real)
    assert real.draws == [(IMAGES, "random")]


@torch.no_grad()
def test_stored_coefficients_have_the_scale_that_was_chosen():
    shape = replace(SMALL, coefficients=64)
    expected = dctn(pixels(REAL.draw(IMAGES)), axes=(2, 3), norm=None).reshape(CLASSES, IMAGES, 3, 64)
    torch.testing.assert_close(started(replace(shape, orthonormal=False)).instances, torch.tensor(expected).float())
    energy = started(shape).instances.square().sum()  # Parseval
    assert energy.item() == pytest.approx(float((pixels(REAL.draw(IMAGES)) ** 2).sum()), rel=1e-5)


def test_positions_take_16_bits_in_the_upper_half_too():
    positions = torch.tensor([0, 1, 32_767, 32_768, 50_000, LIMIT - 1])
    assert pack(positions).dtype == torch.int16
    assert unpack(pack(positions)).tolist() == positions.tolist()
    container = FrequencyMemory(FredShape(classes=1, channels=1, image_size=256, coefficients=1), 1)
    container.positions.copy_(pack(torch.tensor([[LIMIT - 1]])))
    with torch.no_grad():
        container.instances.fill_(1.0)
        spectrum = dct(container.decode(torch.tensor([0])), orthonormal=True)
    assert spectrum.flatten().argmax() == LIMIT - 1


def test_pruning_leaves_the_positions_alone():
    container = started()
    positions = container.positions.clone()
    container.keep(torch.tensor([1, 3, 6, 8]))
    assert torch.equal(container.positions, positions)


def test_another_start_loads_what_was_stored_positions_included():
    container, other = started(), started(real=RandomImages(CLASSES, 3, 8, seed=1))
    assert container.state_dict().keys() == {"instances", "positions"}
    other.load_state_dict(container.state_dict())
    assert torch.equal(other.decode(torch.arange(10)), container.decode(torch.arange(10)))


# Storage


def test_64_coefficients_leave_16_images_for_one_of_cifar10():
    shape = planned(CIFAR10)
    assert (shape.coefficients, shape.orthonormal, shape.count_mask) == (64, True, False)
    stored = storage(shape, 1, 0.0)
    assert (stored.instances, stored.stored_floats(10)) == (16, 30_720)
    assert FrequencyMemory(shape, 16).storage_floats() == 30_720


@pytest.mark.parametrize(
    ("side", "counts"),
    [
        (32, {32: 32, 64: 16, 128: 8, 256: 4}),
        (64, {64: 64, 128: 32, 256: 16, 512: 8}),
        (128, {2048: 8}),
        (224, {1024: 49, 2048: 24, 4096: 12}),
    ],
)
def test_images_for_one_by_number_of_coefficients(side, counts):
    data = dict(classes=10, channels=3, image_size=side)
    found = {count: storage(planned(data, coefficients=count), 1, 0.0).instances for count in counts}
    assert found == counts


@pytest.mark.parametrize(("coefficients", "classes", "mask"), [(64, 10, 320), (5, 3, 8), (4, 3, 6)])
def test_the_positions_are_charged_half_a_float_each_where_they_count(coefficients, classes, mask):
    shapes = [
        FredShape(classes=classes, channels=3, image_size=32, coefficients=coefficients, count_mask=count)
        for count in (False, True)
    ]
    assert [shape.shared_floats for shape in shapes] == [0, mask]
    floats = [FrequencyMemory(shape, 2).storage_floats() for shape in shapes]
    assert floats == [classes * 2 * 3 * coefficients, classes * 2 * 3 * coefficients + mask]


def test_counted_positions_cost_an_image():
    assert storage(planned(CIFAR10, count_mask=True), 1, 0.0).instances == 15


@pytest.mark.parametrize(
    ("side", "coefficients"), [(32, 64), (128, 2048), (64, 256), (224, 4096), (256, 4096), (8, 16), (28, 64), (3, 9)]
)
def test_coefficients_are_those_of_the_nearest_side(side, coefficients):
    assert fill(configured(), image_size=side).coefficients == coefficients
    assert fill(configured(coefficients=5), image_size=side).coefficients == 5


@pytest.mark.parametrize(
    ("side", "changes", "message"),
    [
        (8, {"coefficients": 65}, "container.coefficients=65: must be at most the 64 coefficients of a channel"),
        (257, {}, "dataset.image_size=257: must be at most 256: positions must fit in 16 bits"),
    ],
)
def test_what_cannot_be_is_refused(side, changes, message):
    with pytest.raises(ConfigError) as caught:
        fill(configured(**changes), image_size=side)
    assert str(caught.value) == message
