"""What every container must satisfy as a ``hmn.containers.base.Container``; a new container adds one maker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hmn import artifacts
from hmn.budget import budget_floats
from hmn.compute import Compute
from hmn.config.containers import SCHEMAS
from hmn.config.objectives import GradientMatchingConfig
from hmn.containers import KINDS, rebuild, storage
from hmn.containers.base import Container, PixelShape
from hmn.data.datasets import RealData
from hmn.data.splits import Split
from hmn.errors import ConfigError
from hmn.matching import ClassMatching
from hmn.network_update import training_step
from hmn.networks.convnet import ConvNet
from hmn.objectives.gradient import matching_step
from hmn.realside import LiveSide
from tests.other_device import other_device
from tests.real_images import RandomImages
from tests.tape import record_on_a_cpu

CLASSES, IMAGES, SIDE = 3, 4, 16  # for every container made here
SURVIVORS = [1, 2, 4, 7, 8, 10]  # two images of each class
CONFIGS = {schema.NAME: schema for schema in SCHEMAS}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def maker(name: str, *, channels: int = 3, finish: bool = False, **values: object) -> Callable[[], Container]:
    kind, data = KINDS[name], {"classes": CLASSES, "channels": channels, "image_size": SIDE}

    def make() -> Container:
        config = kind.fill(CONFIGS[name](name=name, **values), images_per_class=10, **data)
        shape = kind.shape.of(config, **data)
        if isinstance(shape, PixelShape) and shape.pixel_space == "normalised":
            shape = kind.shape(**{**vars(shape), "mean": MEAN[:channels], "std": STD[:channels]})
        container = kind.container(shape, IMAGES // shape.images_per_instance)
        container.initialise(torch.Generator().manual_seed(0), config, RandomImages(CLASSES, channels, SIDE))
        if finish:
            container.finish()
        return container

    return make


HMN = dict(
    latent_side=4,
    dataset_channels=3,
    feature_channels=2,
    feature_kernel=3,
    class_channels=2,
    instance_channels=2,
    decoder_width=6,
)
SPEED = dict(tokens=6, token_dim=8, depth=2, heads=2, top_k=5, patch=4, l1=1e-3)
MAKERS = {
    "hmn": maker("hmn", **HMN),
    "hmn, transposed decoder": maker("hmn", **HMN, decoder="transposed"),
    "hmn, normalised decoder": maker("hmn", **HMN, decoder_norm=True),
    "hmn, linear output": maker("hmn", **HMN, output="linear"),
    "hmn without dataset memory": maker("hmn", **HMN | {"feature_channels": 0}),
    "hmn without class memories": maker("hmn", **HMN | {"class_channels": 0}),
    "hmn, instances only, grey": maker("hmn", channels=1, **HMN | {"feature_channels": 0, "class_channels": 0}),
    "image": maker("image"),
    "image, normalised noise, grey": maker("image", channels=1, init="noise", pixel_space="normalised"),
    "multiformation": maker("multiformation"),
    "multiformation, normalised, grey": maker("multiformation", channels=1, pixel_space="normalised"),
    "haba": maker("haba", styles=2, base_channels=3),
    "haba, grey bases": maker("haba", styles=2, base_channels=1),
    "haba, one style": maker("haba", styles=1, base_channels=1),
    "linba": maker("linba", bases=5),
    "linba, unit space, full side": maker("linba", bases=5, downsample=1, pixel_space="unit"),
    "speed": maker("speed", **SPEED),
    "speed, always cut": maker("speed", cut="always", **SPEED),
    "speed, finished": maker("speed", finish=True, **SPEED),
    "fred": maker("fred", coefficients=20),
    "fred, mask counted, not orthonormal": maker("fred", coefficients=20, count_mask=True, orthonormal=False),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def container(request: pytest.FixtureRequest) -> Container:
    return request.param()


@pytest.fixture
def loose(container: Container) -> Container:
    """A container whose images can be dropped one by one."""
    if container.tied is not None:
        pytest.skip(container.tied)
    return container


@torch.no_grad()
def decoded(container: Container, *index: int) -> Tensor:
    return container.decode(torch.tensor(index))


def everything(container: Container) -> range:
    return range(container.classes * container.images_per_class)


def gradients(container: Container, *index: int) -> dict[str, Tensor]:
    """Gradients of a weighted sum of the decoded pixels, by parameter name; zero for parameters without one."""
    container.zero_grad()
    images = container.decode(torch.tensor(index))
    weights = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    (images * weights).sum().backward()
    found = container.named_parameters()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in found}


def test_it_says_how_many_classes_and_images_it_has(container):
    assert (container.classes, container.images_per_class) == (CLASSES, IMAGES)


def test_images_are_float32_of_the_shape_that_it_says_and_those_of_hmn_in_the_unit_range(container):
    images, shape = decoded(container, *everything(container)), container.shape
    assert images.shape == (CLASSES * IMAGES, shape.channels, SIDE, SIDE)
    assert images.dtype == torch.float32 and images.isfinite().all()
    if container.NAME == "hmn" and container.shape.output == "sigmoid":
        assert images.min() >= 0 and images.max() <= 1


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


def test_gradients_reach_every_stored_float(container):
    for name, gradient in gradients(container, *everything(container)).items():
        assert gradient.isfinite().all() and gradient.ne(0).all(), name


def test_all_that_is_kept_is_charged_but_for_an_uncounted_mask(container):
    assert all(parameter.dtype == torch.float32 for parameter in container.parameters())
    container.finish()
    kept = container.state_dict()
    assert {value.dtype for value in kept.values()} <= {torch.float32, torch.int16}
    if container.NAME == "fred" and not container.shape.count_mask:
        del kept["positions"]
    floats = sum(value.numel() * value.element_size() for value in kept.values()) / 4
    assert container.storage_floats() == sum(container.tier_floats().values()) == floats


def test_finishing_changes_neither_the_charge_nor_anything_the_second_time(container):
    before = container.storage_floats()
    container.finish()
    images = decoded(container, *everything(container))
    container.finish()
    assert container.storage_floats() == before
    assert torch.equal(decoded(container, *everything(container)), images)


def test_the_tiers_are_all_parameters_once(container):
    grouped = [id(parameter) for parameters in container.tiers().values() for parameter in parameters]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(parameter) for parameter in container.parameters()}


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


def test_survivors_of_pruning_are_bit_equal_and_stay_in_order(loose):
    container = loose
    # Both decode equal numbers of images: for another number a CPU may choose a convolution that rounds differently.
    expected, alone = decoded(container, *SURVIVORS), decoded(container, SURVIVORS[3])
    container.keep(torch.tensor(SURVIVORS))
    assert (container.classes, container.images_per_class) == (CLASSES, 2)
    assert torch.equal(decoded(container, *everything(container)), expected)
    assert torch.equal(decoded(container, 3), alone)


def test_every_pruned_image_frees_the_same_storage(loose):
    container = loose
    sizes = [container.storage_floats()]
    for kept in (3, 2, 1):
        labels = torch.arange(CLASSES)[:, None] * container.images_per_class
        container.keep((labels + torch.arange(kept)).flatten())
        sizes.append(container.storage_floats())
        assert container.storage_floats() == sum(container.tier_floats().values())
    freed = {before - after for before, after in zip(sizes, sizes[1:], strict=False)}
    assert len(freed) == 1 and freed.pop() > 0


def test_a_pruned_container_can_be_optimised(loose):
    container = loose
    container.keep(torch.tensor(SURVIVORS))
    before = decoded(container, *everything(container))
    optimizer = torch.optim.Adam([p for parameters in container.tiers().values() for p in parameters], lr=0.01)
    assert all(gradient.any() for gradient in gradients(container, *everything(container)).values())
    optimizer.step()
    assert (decoded(container, *everything(container)) - before).abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("index", [[], [0, 4], [0, 1, 4, 5, 8], [0, 4, 5, 8]], ids=["none", "two", "five", "four"])
def test_classes_left_empty_or_unequal_are_refused_and_nothing_changes(loose, index):
    container = loose
    before = decoded(container, *everything(container))
    with pytest.raises(ValueError, match="every class"):
        container.keep(torch.tensor(index, dtype=torch.int64))
    assert container.images_per_class == IMAGES
    assert torch.equal(decoded(container, *everything(container)), before)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_specification_survives_json_and_rebuilds_the_same_container(container, pruned):
    if pruned and container.tied is None:
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


def test_images_that_are_tied_are_refused_with_the_reason_and_stay(container):
    if container.tied is None:
        pytest.skip("it drops single images")
    before = decoded(container, *everything(container))
    with pytest.raises(ValueError, match=r"drop"):
        container.keep(torch.tensor(SURVIVORS))
    assert torch.equal(decoded(container, *everything(container)), before)


@torch.no_grad()
def test_projecting_twice_is_projecting_once(container):
    for parameter in container.parameters():
        parameter.mul_(50)  # far outside the valid range
    container.project()
    once = decoded(container, *everything(container))
    container.project()
    assert torch.equal(decoded(container, *everything(container)), once)


@pytest.mark.parametrize("pruned", [False, True])
def test_the_artifact_decodes_bit_for_bit(container, pruned, tmp_path):
    container.finish()
    if pruned and container.tied is None:
        container.keep(torch.tensor(SURVIVORS))
    artifacts.save(tmp_path, container, {"budget": {"floats": container.storage_floats()}, "data": {}})
    images, labels = artifacts.load_condensed(tmp_path).tensors()
    assert torch.equal(images, decoded(container, *everything(container)))
    assert labels.tolist() == sorted(labels.tolist()) and len(labels.unique()) == CLASSES


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(KINDS)),
    classes=st.integers(2, 12),
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 16, 28, 32]),
    images_per_class=st.integers(1, 12),
    over_budget=st.sampled_from([0.0, 0.1, 0.3]),
)
def test_the_budget_is_never_exceeded_and_one_more_instance_would(
    name, classes, channels, side, images_per_class, over_budget
):
    kind, data = KINDS[name], {"classes": classes, "channels": channels, "image_size": side}
    budget = budget_floats(images_per_class, **data)
    config = CONFIGS[name](name=name)
    try:
        shape = kind.shape.of(kind.fill(config, images_per_class=images_per_class, **data), **data)
        stored = storage(shape, images_per_class, over_budget)
    except ConfigError as error:
        assert "container" in str(error)
        return
    with torch.device("meta"):
        used, more, over = (
            kind.container(shape, count).storage_floats()
            for count in (stored.instances, stored.instances + 1, stored.over_budget_instances)
        )
    assert used == stored.stored_floats(classes) <= budget < more
    assert over <= (1 + over_budget) * budget + 1e-6


def condensation(container: Container, device: torch.device | str = "cpu", **values: object) -> ClassMatching:
    """A condensation on noise, with two networks of two steps each."""
    channels, compute = container.shape.channels, Compute(torch.device(device))
    images = (RandomImages(CLASSES, channels, SIDE, seed=1).draw(8) * 255).to(torch.uint8)
    train = Split(images, torch.arange(CLASSES).repeat_interleave(8))
    data = RealData(
        name="noise",
        class_names=("a", "b", "c"),
        mean=MEAN[:channels],
        std=STD[:channels],
        train=train,
        held_out=train,
        test=train,
        notes=(),
        fingerprint="f" * 64,
    ).to(compute.device)
    steps = {"outer_steps": 2, "inner_steps": 2, "real_batch": 4, "network_samples": 8, "network_batch": 8}
    settings = GradientMatchingConfig(name="gradient_matching", **steps | {"synthetic_batch": 3} | values)

    def build() -> ConvNet:
        return ConvNet(channels, CLASSES, SIDE, width=4, depth=2)

    network = build().to(compute.device)
    train = training_step(network, compute)
    side = LiveSide(data, settings, build=build, train=train, compute=compute, seed=3, flip=True)
    match = matching_step(network, settings.metric, compute)
    shared = {"normalise": side.normalise, "compute": compute, "seed": 3}
    return ClassMatching(container.to(compute.device), side, settings, match=match, **shared)


WAYS = {
    "adam": {},
    "sgd, a class at a time": {"optimizer": "sgd", "memory_lr": 1e-4, "weights_lr": 1e-4, "step_policy": "per_class"},
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_recorded_step_is_the_step(make, monkeypatch):
    launched = condensation(make())
    record_on_a_cpu(monkeypatch)
    recorded = condensation(make())
    assert recorded.replay
    for _ in range(4):
        torch.testing.assert_close(launched.run_step(), recorded.run_step())
    for one, other in zip(launched.container.parameters(), recorded.container.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_step_stays_on_its_device(make, monkeypatch):
    here = condensation(make())
    with other_device(monkeypatch) as device:
        there = condensation(make(), device)
        for _ in range(2):
            torch.testing.assert_close(there.run_step()[0].cpu(), here.run_step()[0], rtol=1e-3, atol=1e-3)
        there.settle(there.container)
        decoded = there.container.decode(torch.arange(CLASSES * IMAGES, device=device))
        assert decoded.device == device


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_a_condensation_that_stops_goes_on_bit_for_bit(make, way, tmp_path):
    whole = condensation(make(), **WAYS[way])
    before = {name: value.clone() for name, value in whole.container.state_dict().items()}
    for _ in range(4):
        whole.run_step()
    first = condensation(make(), **WAYS[way])
    for _ in range(2):
        first.run_step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = condensation(make(), **WAYS[way])
    for parameter in second.container.parameters():  # the state must restore them all
        parameter.data.fill_(7.0)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(2):
        second.run_step()
    after, resumed = whole.container.state_dict(), second.container.state_dict()
    assert all(torch.equal(after[name], resumed[name]) for name in after)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name, _ in whole.container.named_parameters()} == moved


class Counting(KINDS["image"].container):
    projected = 0

    def project(self) -> None:
        self.projected += 1
        super().project()


def test_a_container_is_projected_before_every_fresh_network_and_not_in_between():
    container = MAKERS["image"]()
    container.__class__ = Counting
    run = condensation(container)
    counts = []
    for _ in range(4):
        run.run_step()
        counts.append(container.projected)
    assert counts == [1, 1, 2, 2]


def test_a_penalty_moves_the_container_along_its_own_gradient():
    sgd = {"optimizer": "sgd", "memory_lr": 0.5, "weights_lr": 0.5, "momentum": 0.0, "final_lr_fraction": 1.0}
    made = {l1: maker("speed", **SPEED | {"l1": l1})() for l1 in (0.0, 1e-3)}
    start = made[0.0].instances.detach().clone()
    for container in made.values():
        condensation(container, **sgd).run_step()
    moved = made[1e-3].instances - made[0.0].instances
    torch.testing.assert_close(moved, -0.5 * 1e-3 * start.sign(), rtol=0, atol=1e-6)


def test_a_clipped_gradient_has_the_norm_that_it_is_clipped_to_and_the_report_its_own():
    sgd = {"optimizer": "sgd", "memory_lr": 1.0, "weights_lr": 1.0, "momentum": 0.0, "final_lr_fraction": 1.0}
    container = MAKERS["linba"]()
    start = {name: value.detach().clone() for name, value in container.named_parameters()}
    losses, norms = condensation(container, **sgd, gradient_clip=1e-3).run_step()
    moved = torch.stack([(value - start[name]).norm() for name, value in container.named_parameters()]).norm()
    torch.testing.assert_close(moved, torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert torch.stack(list(norms.values())).norm() > 1e-2
    free = MAKERS["linba"]()
    _, same = condensation(free, **sgd, gradient_clip=1e9).run_step()
    assert same == norms


NOT_CONFIGURED = {"multiformation": {"tiles"}, "speed": {"sparse"}, "coreset": {"pixel_space"}}


@pytest.mark.parametrize("name", KINDS)
def test_a_shape_takes_all_but_the_data_s_own_from_the_configuration(name):
    """Fields are matched by name, so a field with another name in the configuration would stay at its default."""
    shape = {item.name for item in dataclasses.fields(KINDS[name].shape)}
    left = shape - vars(CONFIGS[name](name=name)).keys() - {"classes", "channels", "image_size", "mean", "std"}
    assert left == NOT_CONFIGURED.get(name, set())
