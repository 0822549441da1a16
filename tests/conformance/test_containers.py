"""What every data container must keep of ``hmn.containers.base.Container``; another container is one more maker."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hmn.config import HmnConfig
from hmn.containers import rebuild
from hmn.containers.base import tier_floats
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape

CLASSES, IMAGES = 3, 4  # of every container made here
SURVIVORS = [1, 2, 4, 7, 8, 10]  # two images of each class


def hmn(**changes: object) -> Callable[[], nn.Module]:
    values = dict(
        classes=CLASSES,
        channels=3,
        image_size=16,
        latent_side=4,
        dataset_channels=3,
        feature_channels=2,
        feature_kernel=3,
        class_channels=2,
        instance_channels=2,
        decoder_width=6,
    )

    def make() -> nn.Module:
        container = HierarchicalMemory(HmnShape(**values | changes), IMAGES)
        container.initialise(torch.Generator().manual_seed(0), HmnConfig(name="hmn"), None)
        return container

    return make


MAKERS = {
    "hmn": hmn(),
    "hmn, transposed decoder": hmn(decoder="transposed"),
    "hmn, normalised decoder": hmn(decoder_norm=True),
    "hmn without dataset memory": hmn(feature_channels=0),
    "hmn without class memories": hmn(class_channels=0),
    "hmn, instances only, grey": hmn(feature_channels=0, class_channels=0, channels=1),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def container(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@torch.no_grad()
def decoded(container: nn.Module, *index: int) -> Tensor:
    return container.decode(torch.tensor(index))


def everything(container: nn.Module) -> range:
    return range(container.classes * container.images_per_class)


def gradients(container: nn.Module, *index: int) -> dict[str, Tensor]:
    """Of a weighted sum of the decoded pixels, by parameter; zero where there is none."""
    container.zero_grad()
    images = container.decode(torch.tensor(index))
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    (images * weights).sum().backward()
    found = container.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in found}


def test_it_says_how_many_classes_and_images_it_has(container):
    assert (container.classes, container.images_per_class) == (CLASSES, IMAGES)


def test_images_are_float32_in_the_unit_range(container):
    images = decoded(container, *everything(container))
    assert images.ndim == 4 and len(images) == CLASSES * IMAGES and images.shape[2] == images.shape[3]
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1


def test_all_images_differ(container):
    images = decoded(container, *everything(container)).flatten(1)
    assert len(images.unique(dim=0)) == CLASSES * IMAGES


def test_decoding_twice_gives_the_same_and_training_mode_changes_nothing(container):
    expected = decoded(container.train(), *everything(container))
    assert torch.equal(decoded(container, *everything(container)), expected)
    assert torch.equal(decoded(container.eval(), *everything(container)), expected)


def test_rows_follow_the_index_in_any_order_and_may_repeat(container):
    images, order = decoded(container, *everything(container)), [9, 0, 3, 3, 11]
    torch.testing.assert_close(decoded(container, *order), images[order], rtol=0, atol=1e-5)


def test_an_image_does_not_depend_on_what_is_decoded_beside_it(container):
    expected = decoded(container, 5, 5, 5)[0]
    assert torch.equal(decoded(container, 5, 0, 11)[0], expected)
    assert torch.equal(decoded(container, 5, 6, 2)[0], expected)


def test_every_parameter_is_used_and_gets_a_finite_gradient(container):
    for name, gradient in gradients(container, *everything(container)).items():
        assert gradient.isfinite().all() and gradient.any(), name


def test_all_that_is_stored_is_float32_parameters(container):
    assert list(container.buffers()) == []
    assert all(parameter.dtype == torch.float32 for parameter in container.parameters())
    assert container.storage_floats() == sum(value.numel() for value in container.state_dict().values())


def test_the_tiers_are_all_parameters_once(container):
    grouped = [id(parameter) for parameters in container.tiers().values() for parameter in parameters]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(parameter) for parameter in container.parameters()}
    assert sum(tier_floats(container).values()) == container.storage_floats()


def test_some_tier_is_a_memory_and_all_tiers_have_names_of_their_own(container):
    assert container.memory_tiers() & container.tiers().keys()
    assert all(isinstance(name, str) and parameters for name, parameters in container.tiers().items())


def test_class_parameters_belong_to_the_image_index_divided_by_images_per_class(container):
    names = {id(parameter): name for name, parameter in container.named_parameters()}
    owned = [names[id(parameter)] for parameter in container.class_parameters()]
    assert owned and len(set(owned)) == len(owned)
    for index in (0, IMAGES - 1, IMAGES, CLASSES * IMAGES - 1):
        found = gradients(container, index)
        for name in owned:
            assert len(found[name]) == CLASSES
            moved = found[name].flatten(1).any(dim=1).tolist()
            assert moved == [label == index // IMAGES for label in range(CLASSES)], (name, index)


def test_parameters_that_are_not_of_a_class_serve_all_classes(container):
    owned = {id(parameter) for parameter in container.class_parameters()}
    shared = [name for name, parameter in container.named_parameters() if id(parameter) not in owned]
    for label in range(CLASSES):
        found = gradients(container, label * IMAGES)
        for name in shared:
            rows = found[name].flatten(1) if found[name].ndim > 1 else found[name][:, None]
            moved = rows.any(dim=1).tolist()
            one_row_per_class = moved == [row == label for row in range(CLASSES)]
            assert any(moved) and not one_row_per_class, (name, label)


def test_survivors_of_pruning_are_bit_equal_and_stay_in_order(container):
    # Equal numbers of images are compared: a CPU may take another convolution, and rounding, for another number.
    expected, alone = decoded(container, *SURVIVORS), decoded(container, SURVIVORS[3])
    container.keep(torch.tensor(SURVIVORS))
    assert (container.classes, container.images_per_class) == (CLASSES, 2)
    assert torch.equal(decoded(container, *everything(container)), expected)
    assert torch.equal(decoded(container, 3), alone)


def test_every_pruned_image_frees_the_same_storage(container):
    sizes = [container.storage_floats()]
    for kept in (3, 2, 1):
        labels = torch.arange(CLASSES)[:, None] * container.images_per_class
        container.keep((labels + torch.arange(kept)).flatten())
        sizes.append(container.storage_floats())
        assert container.storage_floats() == sum(tier_floats(container).values())
    freed = {before - after for before, after in zip(sizes, sizes[1:], strict=False)}
    assert len(freed) == 1 and freed.pop() > 0


def test_a_pruned_container_can_be_optimised(container):
    container.keep(torch.tensor(SURVIVORS))
    before = decoded(container, *everything(container))
    optimizer = torch.optim.Adam([p for parameters in container.tiers().values() for p in parameters], lr=0.01)
    assert all(gradient.any() for gradient in gradients(container, *everything(container)).values())
    optimizer.step()
    assert (decoded(container, *everything(container)) - before).abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("index", [[], [0, 4], [0, 1, 4, 5, 8], [0, 4, 5, 8]], ids=["none", "two", "five", "four"])
def test_classes_left_empty_or_unequal_are_refused_and_nothing_changes(container, index):
    before = decoded(container, *everything(container))
    with pytest.raises(ValueError, match="every class"):
        container.keep(torch.tensor(index, dtype=torch.int64))
    assert container.images_per_class == IMAGES
    assert torch.equal(decoded(container, *everything(container)), before)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_specification_survives_json_and_rebuilds_the_same_container(container, pruned):
    if pruned:
        container.keep(torch.tensor(SURVIVORS))
    written = json.loads(json.dumps(container.specification()))
    again = rebuild(written)
    assert again.specification() == container.specification() == written
    assert {name: value.shape for name, value in again.state_dict().items()} == {
        name: value.shape for name, value in container.state_dict().items()
    }
    again.load_state_dict(container.state_dict())
    assert torch.equal(decoded(again, *everything(again)), decoded(container, *everything(container)))


def test_rebuilding_leaves_the_specification_as_it_was_and_refuses_another_name(container):
    specification = container.specification()
    kept = dict(specification)
    rebuild(specification)
    assert specification == kept
    with pytest.raises(KeyError):
        rebuild(specification | {"name": "no container"})
