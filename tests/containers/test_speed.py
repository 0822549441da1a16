"""SPEED against a patch-by-patch decoder; the exact published counts, and its sparse form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from hmn import artifacts
from hmn.budget import budget_floats
from hmn.config.containers import SpeedConfig
from hmn.containers import KINDS, rebuild, storage
from hmn.containers.speed import PRESETS, FReeNet, Preset, SparseCodes, SpeedShape, fill, patch_side
from hmn.errors import ConfigError

SMALL = SpeedShape(
    classes=2, channels=3, image_size=8, tokens=5, token_dim=6, depth=2, heads=3, top_k=7, patch=4, l1=0.5
)
DATA = {
    "cifar10": dict(classes=10, channels=3, image_size=32),
    "cifar100": dict(classes=100, channels=3, image_size=32),
    "tiny": dict(classes=200, channels=3, image_size=64),
    "imagenet": dict(classes=10, channels=3, image_size=128),
    "imagenet10": dict(classes=10, channels=3, image_size=224),
    "digits": dict(classes=10, channels=1, image_size=8),
}


def configured(**changes: object) -> SpeedConfig:
    return SpeedConfig(**{"name": "speed", **changes})


def started(shape: SpeedShape = SMALL, instances: int = 3, seed: int = 0) -> SparseCodes:
    container = SparseCodes(shape, instances)
    container.initialise(torch.Generator().manual_seed(seed), configured(), None)
    return container


def planned(data: dict[str, int], images_per_class: int = 1, **changes: object) -> SpeedShape:
    kind = KINDS["speed"]
    return kind.shape.of(kind.fill(configured(**changes), **data, images_per_class=images_per_class), **data)


def everything(container: SparseCodes) -> Tensor:
    return torch.arange(container.classes * container.images_per_class)


# Decoding


def written_out(container: SparseCodes, code: Tensor) -> Tensor:
    """The image (channels, H, W) of one dense code (heads, P, K)."""
    shape, decoder = container.shape, container.decoder
    width, across = shape.token_dim // shape.heads, shape.image_size // shape.patch
    image = torch.zeros(shape.channels, shape.image_size, shape.image_size)
    for patch in range(shape.patches):
        x = torch.zeros(shape.token_dim)
        for block in decoder.blocks:
            mixed = torch.zeros(shape.token_dim)
            for head in range(shape.heads):
                part = slice(head * width, (head + 1) * width)
                for token in range(shape.tokens):
                    mixed[part] += code[head, patch, token] * container.tokens[token, part]
            x = x + block.project.weight @ mixed + block.project.bias
            x = F.layer_norm(x, (shape.token_dim,), block.norm_mixed.weight, block.norm_mixed.bias, eps=1e-6)
            first, _, second = block.mlp
            x = x + second.weight @ F.gelu(first.weight @ x + first.bias) + second.bias
            x = F.layer_norm(x, (shape.token_dim,), block.norm_mlp.weight, block.norm_mlp.bias, eps=1e-6)
        pixels = (decoder.head.weight @ x + decoder.head.bias).view(shape.patch, shape.patch, shape.channels)
        top, left = patch // across * shape.patch, patch % across * shape.patch
        image[:, top : top + shape.patch, left : left + shape.patch] = pixels.permute(2, 0, 1)
    return image


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"channels": 1, "patch": 2, "heads": 1, "depth": 1}])
def test_every_patch_mixes_the_tokens_head_by_head_through_all_blocks(changes):
    container = started(replace(SMALL, **changes))
    for name, parameter in container.named_parameters():
        if "bias" in name or "norm" in name:  # at their initial 0 and 1, leaving them out would change nothing
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 5)
    for index in (0, 4):
        expected = written_out(container, container.instances[index // 3, index % 3])
        torch.testing.assert_close(container.decode(torch.tensor([index]))[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pixels_are_in_the_datas_normalisation():
    statistics = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    container, plain = started(replace(SMALL, pixel_space="normalised", **statistics)), started()
    mean, std = (torch.tensor(statistics[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = plain.decode(everything(plain)) * std + mean
    torch.testing.assert_close(container.decode(everything(container)), expected)


def test_memories_start_normal_and_layers_xavier_uniform():
    shape = replace(SMALL, tokens=60, token_dim=30, depth=1)
    container = started(shape, instances=20)
    for memory in (container.tokens, container.instances):
        assert memory.std().item() == pytest.approx(0.2, rel=0.1)
        assert abs(memory.mean().item()) < 0.02
    block = container.decoder.blocks[0]
    for layer in (block.project, block.mlp[0], block.mlp[2], container.decoder.head):
        outputs, inputs = layer.weight.shape
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.97 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()
    for norm in (block.norm_mixed, block.norm_mlp):
        assert (norm.weight == 1).all() and not norm.bias.any()


def test_the_start_depends_on_the_generator_alone():
    first, again, other = (started(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(first[name], other[name]) for name in ("tokens", "instances", "decoder.head.weight"))


def test_codes_and_tokens_are_memories_and_the_decoder_is_not():
    container = started()
    tiers = container.tiers()
    assert list(tiers) == ["instances", "tokens", "decoder"]
    assert container.memory_tiers() == {"instances", "tokens"}
    assert tiers["decoder"] == list(container.decoder.parameters())


def test_the_penalty_is_the_codes_weighted_absolute_sum_while_they_are_dense():
    container = started()
    container.penalty().backward()
    assert container.penalty().item() == pytest.approx(0.5 * container.instances.abs().sum().item())
    torch.testing.assert_close(container.instances.grad, 0.5 * container.instances.detach().sign())
    assert container.tokens.grad is None
    assert started(replace(SMALL, l1=0.0)).penalty() is None
    container.finish()
    assert container.penalty() is None


# The sparse form


@torch.no_grad()
def test_finishing_keeps_each_heads_largest_entries_and_decodes_to_exactly_them():
    container, masked = started(), started()
    codes = container.instances.clone().flatten(3)
    for row in codes.flatten(0, 2):
        row[row.abs().argsort()[:-7]] = 0
    masked.instances.copy_(codes.view_as(masked.instances))
    container.finish()
    assert container.instances.shape == container.positions.shape == (2, 3, 3, 7)
    assert container.shape == replace(SMALL, sparse=True)
    expected = masked.decode(everything(masked))
    assert torch.equal(container.decode(everything(container)), expected)
    assert not torch.equal(started().decode(everything(masked)), expected)


@torch.no_grad()
def test_cut_from_the_start_decodes_to_the_finished_images_of_the_same_codes():
    always, end = started(replace(SMALL, cut="always")), started()
    end.finish()
    expected = end.decode(everything(end))
    assert torch.equal(always.decode(everything(always)), expected)
    always.finish()
    assert torch.equal(always.decode(everything(always)), expected)


def test_entries_that_are_cut_are_given_the_derivative_they_would_have_if_they_were_not():
    container = started(replace(SMALL, cut="always")).double()
    weights = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (container.decode(everything(container)) * weights).sum().backward()
    codes = container.instances.detach().flatten(0, 1).clone()
    for row in codes.flatten(2).flatten(0, 1):
        row[row.abs().argsort()[:-7]] = 0
    codes.requires_grad_()
    images = container.space.to_images(container.decoder(container.tokens, codes))
    (expected,) = torch.autograd.grad((images * weights).sum(), codes)
    assert torch.allclose(container.instances.grad.flatten(0, 1), expected, rtol=1e-12, atol=0)
    assert (expected[codes.detach() == 0] != 0).all()


def test_finishing_again_changes_nothing():
    container = started()
    container.finish()
    before = {name: value.clone() for name, value in container.state_dict().items()}
    container.finish()
    assert all(torch.equal(value, before[name]) for name, value in container.state_dict().items())


@pytest.mark.parametrize("finished", [False, True])
def test_the_charge_is_that_of_the_finished_form(finished):
    container = started()
    if finished:
        container.finish()
    # 30 tokens; two blocks of 3 x (36 + 6) + 2 x 12; head 6 x 48 + 48; 3 x 7 x 1.5 = 31.5 for each of 6 images
    assert container.storage_floats() == 30 + 2 * 150 + 336 + 6 * 32


def test_what_is_stored_is_what_is_charged():
    shape = replace(SMALL, top_k=8)
    container = started(shape)
    container.finish()
    stored = container.state_dict()
    assert stored["positions"].dtype == torch.int16
    assert sum(value.numel() * value.element_size() for value in stored.values()) == 4 * container.storage_floats()


@torch.no_grad()
def test_positions_in_the_upper_half_of_16_bits_are_found():
    shape = replace(SMALL, tokens=4096, image_size=16, heads=1, top_k=1)
    assert shape.code_size == 65_536
    container = started(shape, instances=1)
    container.instances[0, 0, 0, 15, 4095] = 9.0
    container.instances[1, 0, 0, 8, 0] = -9.0
    container.finish()
    assert container.positions.flatten().tolist() == [-1, -32_768]
    dense = container._codes(torch.tensor([0, 1]))
    assert dense[0, 0, 15, 4095] == 9 and dense[1, 0, 8, 0] == -9 and dense.count_nonzero() == 2


@pytest.mark.parametrize("finished_first", [False, True])
def test_pruning_and_finishing_go_in_any_order(finished_first):
    container, whole = started(), started()
    steps = [container.finish, lambda: container.keep(torch.tensor([4, 1, 2, 5]))]
    for step in steps if finished_first else reversed(steps):
        step()
    whole.finish()
    kept = torch.tensor([1, 2, 4, 5])
    assert container.images_per_class == 2
    assert torch.equal(container.positions.flatten(0, 1), whole.positions.flatten(0, 1)[kept])
    with torch.no_grad():
        assert torch.equal(container.decode(torch.arange(4)), whole.decode(kept))


def test_refused_pruning_leaves_codes_and_positions():
    container = started()
    container.finish()
    with pytest.raises(ValueError, match="every class"):
        container.keep(torch.tensor([0, 1, 3]))
    assert container.instances.shape == container.positions.shape == (2, 3, 3, 7)


def test_positions_take_as_many_bytes_whatever_the_numbers_are(tmp_path):
    container = started()
    container.finish()
    card = artifacts.save(tmp_path, container, {}, "float16")
    on_disk = sum(tensor.nbytes for tensor in load_file(tmp_path / artifacts.TENSORS).values())
    spare = artifacts.stored_bytes(card) - on_disk  # half a float for an image with an odd number of positions
    assert 0 <= spare <= 2 * container.instances.shape[1] * container.classes
    assert on_disk > 2 * container.storage_floats()


@pytest.mark.parametrize("finished", [False, True])
def test_both_forms_are_rebuilt_from_their_specification(finished):
    container = started()
    if finished:
        container.finish()
    again = rebuild(container.specification())
    again.load_state_dict(container.state_dict())
    with torch.no_grad():
        assert torch.equal(again.decode(everything(again)), container.decode(everything(container)))


# Storage

PUBLISHED = {  # images per class, decoder, all floats, budget
    "cifar10_ipc1": (17, 4_880, 29_872, 30_720),
    "cifar10_ipc10": (124, 32_976, 306_960, 307_200),
    "cifar10_ipc50": (272, 345_072, 1_532_400, 1_536_000),
    "cifar100_ipc1": (11, 61_296, 305_040, 307_200),
    "cifar100_ipc10": (62, 345_072, 3_035_760, 3_072_000),
    "cifar100_ipc50": (100, 345_072, 15_297_360, 15_360_000),
    "tiny_ipc1": (17, 446_144, 2_437_312, 2_457_600),
    "tiny_ipc10": (78, 446_144, 24_440_512, 24_576_000),
    "imagenet_ipc1": (15, 260_928, 482_880, 491_520),
    "imagenet_ipc10": (111, 964_032, 4_898_496, 4_915_200),
}


@pytest.mark.parametrize(("name", "row"), PUBLISHED.items(), ids=PUBLISHED.keys())
def test_published_settings_leave_the_published_numbers_of_images(name, row):
    images, decoder, floats, budget = row
    data, made_for = DATA[name.split("_")[0]], PRESETS[name]
    shape = planned(data, made_for.images_per_class)
    assert shape == planned(data, preset=name)
    assert {key: getattr(shape, key) for key in vars(made_for) if key != "images_per_class"} == {
        key: value for key, value in vars(made_for).items() if key != "images_per_class"
    }
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in FReeNet(shape).parameters()) == decoder
        stored = storage(shape, made_for.images_per_class, 0.0)
        assert (stored.instances, stored.stored_floats(data["classes"]), stored.budget_floats) == (
            images,
            floats,
            budget,
        )
        container = SparseCodes(replace(shape, sparse=True), images)
        assert container.storage_floats() == floats
        decoded = container.decode(torch.arange(2, device="meta"))
    assert decoded.shape == (2, 3, data["image_size"], data["image_size"])


@settings(max_examples=50)
@given(
    classes=st.integers(1, 12),
    channels=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 4]),
    heads=st.integers(1, 4),
    width=st.integers(1, 4),
    tokens=st.integers(1, 9),
    depth=st.integers(1, 3),
    top_k=st.integers(1, 4),
    instances=st.integers(1, 4),
)
def test_every_shape_is_charged_its_parameters_and_half_a_float_for_each_position(
    classes, channels, patch, heads, width, tokens, depth, top_k, instances
):
    data = dict(classes=classes, channels=channels, image_size=8)
    own = dict(patch=patch, heads=heads, token_dim=heads * width, tokens=tokens, depth=depth, top_k=top_k)
    shape = SpeedShape(**data, **own, l1=0.0, sparse=True)
    with torch.device("meta"):
        container = SparseCodes(shape, instances)
    parameters = sum(parameter.numel() for parameter in container.parameters())
    halves = -(-heads * top_k // 2)  # rounded up for each image
    assert container.storage_floats() == parameters + classes * instances * halves
    assert shape.shared_floats + classes * instances * shape.instance_floats == container.storage_floats()


# Settings left open


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        ("cifar10", {1: "cifar10_ipc1", 10: "cifar10_ipc10", 50: "cifar10_ipc50"}),
        ("cifar100", {1: "cifar100_ipc1", 10: "cifar100_ipc10", 50: "cifar100_ipc50"}),
        ("tiny", {1: "tiny_ipc1", 10: "tiny_ipc10", 50: "tiny_ipc10"}),
        ("imagenet", {1: "imagenet_ipc1", 10: "imagenet_ipc10", 50: "imagenet_ipc10"}),
        ("imagenet10", {1: "imagenet_ipc1", 10: "imagenet_ipc10", 50: "imagenet_ipc10"}),
        ("digits", {1: "digits_ipc1", 10: "digits_ipc10", 50: "digits_ipc50"}),
    ],
)
def test_auto_takes_the_nearest_row_and_fills_the_budget_with_it(data, rows):
    data = DATA[data]
    for ipc, name in rows.items():
        filled = fill(configured(), **data, images_per_class=ipc)
        assert filled.preset == name
        stored = storage(planned(data, ipc), ipc, 0.1)
        budget = budget_floats(ipc, **data)
        assert budget - data["classes"] * stored.instance_floats < stored.stored_floats(data["classes"]) <= budget


@pytest.mark.parametrize("name", PRESETS)
def test_auto_leaves_a_row_as_it_is_for_the_data_that_it_was_made_for(name):
    row = PRESETS[name]
    data = own_data(row) | {"images_per_class": row.images_per_class}
    for asked in ({}, {"depth": 2}, {"heads": 1}):
        assert fill(configured(**asked), **data) == fill(configured(preset=name, **asked), **data)


@pytest.mark.parametrize(
    ("classes", "channels", "side", "memory", "row", "token_dim", "top_k", "images"),
    [
        (10, 1, 28, 1, "cifar10_ipc1", 16, 24, 8),  # MNIST: the row as it is would hold two images
        (10, 1, 28, 10, "cifar10_ipc10", 48, 12, 124),
        (10, 1, 28, 50, "cifar10_ipc50", 96, 12, 277),  # as it is, nine
        (2, 3, 32, 1, "cifar10_ipc1", 16, 48, 14),
        (2, 3, 32, 50, "cifar10_ipc50", 96, 24, 489),  # the budget does not pay for the row as it is
        (5, 3, 32, 1, "cifar10_ipc1", 32, 48, 13),
        (10, 3, 64, 1, "tiny_ipc1", 64, 48, 13),
    ],
)
def test_auto_makes_a_row_smaller_for_a_budget_that_is(classes, channels, side, memory, row, token_dim, top_k, images):
    data = {"classes": classes, "channels": channels, "image_size": side}
    filled = fill(configured(), **data, images_per_class=memory)
    assert (filled.preset, filled.token_dim, filled.top_k) == (row, token_dim, top_k)
    assert storage(planned(data, memory), memory, 0.0).images_per_class == images


def test_auto_makes_smaller_only_what_is_left_open():
    data = {"classes": 10, "channels": 1, "image_size": 28, "images_per_class": 1}
    for asked in ({"token_dim": 32}, {"top_k": 48}, {"token_dim": 24, "top_k": 40}):
        filled = fill(configured(**asked), **data)
        assert {key: getattr(filled, key) for key in asked} == asked
    named = fill(configured(preset="cifar10_ipc1"), **data)
    assert (named.token_dim, named.top_k) == (32, 48)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 200),
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 28, 32, 48, 64, 128, 224]),
    memory=st.integers(1, 50),
    heads=st.sampled_from([None, 1, 16]),
)
@example(classes=2, channels=3, side=32, memory=5, heads=16)  # half of 48 is no multiple of 16
def test_auto_shares_no_more_and_holds_as_many_images_as_where_the_row_was_made_for(
    classes, channels, side, memory, heads
):
    data = {"classes": classes, "channels": channels, "image_size": side}
    try:
        filled = fill(configured(heads=heads), images_per_class=memory, **data)
    except ConfigError as refused:
        assert "heads=16" in str(refused)
        assert side == 8  # that the row of one image per class, with tokens of 4, cannot have
        return
    row, shape = PRESETS[filled.preset], SpeedShape.of(filled, **data)
    made_for = own_data(row)
    share, images = room(shape, memory)
    as_it_is = fill(configured(preset=filled.preset, heads=heads), **made_for, images_per_class=row.images_per_class)
    own = SpeedShape.of(as_it_is, **made_for)
    own_share, own_images = room(own, row.images_per_class)
    dims = [row.token_dim // 2**halvings for halvings in range(8)]
    allowed = [dim for dim in dims if dim >= 4 and dim % filled.heads == 0]
    assert filled.token_dim in allowed
    assert share <= max(0.4, own_share) or filled.token_dim == allowed[-1]
    assert images / memory >= min(8, own_images / row.images_per_class) or filled.top_k < 8
    if filled.token_dim < row.token_dim:  # no more than it has to be
        wider = replace(shape, token_dim=2 * shape.token_dim)
        assert room(wider, memory)[0] > max(0.4, own_share)
    if filled.top_k < row.top_k:
        longer = replace(shape, top_k=2 * shape.top_k)
        assert room(longer, memory)[1] / memory < min(8, own_images / row.images_per_class)


def own_data(row: Preset) -> dict[str, int]:
    return {"classes": row.classes, "channels": row.channels, "image_size": row.image_size}


def room(shape: SpeedShape, memory: int) -> tuple[float, int]:
    """The share of the budget that the shared part takes, and the images per class that the rest pays for."""
    budget = budget_floats(memory, shape.classes, shape.channels, shape.image_size)
    left = budget - shape.shared_floats
    return shape.shared_floats / budget, left // (shape.classes * shape.instance_floats)


def test_auto_passes_over_rows_that_the_budget_does_not_pay_for():
    few = dict(classes=2, channels=3, image_size=32)
    assert fill(configured(), **few, images_per_class=50).preset == "cifar10_ipc50"
    wide = fill(configured(token_dim=192), **few, images_per_class=50)  # which cannot be made smaller
    assert (wide.preset, wide.depth) == ("cifar10_ipc10", 1)
    with pytest.raises(ConfigError, match="over the budget of 307,200"):
        storage(planned(few, 50, preset="cifar10_ipc50"), 50, 0.0)


@pytest.mark.parametrize(
    ("preset", "size", "tokens", "patch"),
    [
        ("cifar10_ipc1", 32, 16, 4),
        ("cifar10_ipc1", 16, 16, 2),
        ("cifar10_ipc1", 28, 16, 4),
        ("cifar10_ipc1", 30, 16, 3),
        ("imagenet_ipc1", 224, 256, 14),
        ("imagenet_ipc1", 128, 257, 16),  # 256 patches of 257 tokens have too many positions
        ("cifar10_ipc1", 31, 16, 1),
        ("digits_ipc1", 8, 8, 2),
    ],
)
def test_patches_divide_the_side_into_about_as_many_as_in_the_preset(preset, size, tokens, patch):
    assert patch_side(PRESETS[preset], size, tokens) == patch


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", 9),
        ("token_dim", 64),
        ("depth", 4),
        ("heads", 4),
        ("top_k", 5),
        ("patch", 8),
        ("l1", 0.0),
        ("cut", "always"),
    ],
)
def test_each_field_can_be_given_and_the_preset_fills_the_others(key, value):
    plain, changed = (planned(DATA["cifar10"], **given) for given in ({}, {key: value}))
    assert getattr(plain, key) != value
    assert changed == replace(plain, **{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "p1"}, f"container.preset=p1: must be auto or one of {', '.join(PRESETS)}"),
        ({"cut": "start"}, "container.cut=start: must be one of end, always"),
        ({"patch": 5}, "container.patch=5: must be a divisor of dataset.image_size=32"),
        ({"heads": 3}, "container.heads=3: must be a divisor of container.token_dim=32"),
        (
            {"tokens": 1025, "patch": 4},
            "container.tokens=1025: must be at most 1024: a position among 64 patches times tokens must fit in 16 bits",
        ),
        (
            {"top_k": 1025},
            "container.top_k=1025: must be at most the 1024 entries of a code, 64 patches times 16 tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        planned(DATA["cifar10"], **changes)
    assert str(caught.value) == message
