"""Exact sizes of the presets, the preset that a dataset gets, and the errors for impossible shapes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hmn.budget import budget_floats
from hmn.config import HmnConfig
from hmn.containers import Storage, presets, storage
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape, make_decoder
from hmn.containers.presets import PRESETS, by_distance, fill, latent_side
from hmn.errors import ConfigError


def configured(**changes: object) -> HmnConfig:
    return HmnConfig(**{"name": "hmn", **changes})


def shape_of(preset: str, **changes: object) -> HmnShape:
    """The preset's shape for the data that it was designed for, RGB except for digits."""
    row = PRESETS[preset]
    channels = 1 if preset.startswith("digits") else 3
    data = {"classes": row.classes, "channels": channels, "image_size": row.image_size}
    filled = fill(configured(preset=preset, **changes), images_per_class=row.images_per_class, **data)
    return HmnShape.of(filled, **data)


def on_meta(shape: HmnShape, images_per_class: int) -> HierarchicalMemory:
    with torch.device("meta"):
        return HierarchicalMemory(shape, images_per_class)


def decoder_layers(shape: HmnShape) -> list[int]:
    """Number of floats of each convolution of the decoder, including its bias."""
    with torch.device("meta"):
        decoder = make_decoder(shape)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in decoder]
    return [count for count in counts if count]


# Shapes with which the presets fill their budgets; every number was counted by hand or by torch


@dataclass(frozen=True)
class Row:
    dataset: int  # m_D
    extractor: int  # f_c, one class
    class_memory: int  # m_c, one class
    instance: int  # m_{c,i}, one image
    layers: list[int]  # D
    shared: int  # F
    share: float  # percent of the budget
    images: int  # G
    over: int  # G_o at 10 percent over budget
    used: int


ROWS = {
    "p1": Row(128, 36, 32, 32, [1168, 2320, 1160, 219], 5_675, 18.5, 78, 87, 30_635),
    "p1b": Row(256, 20, 128, 64, [1024, 1160, 219], 4_139, 13.5, 41, 46, 30_379),
    "p1c": Row(128, 36, 32, 64, [1456, 2320, 1160, 219], 5_963, 19.4, 38, 43, 30_283),
    "p2": Row(512, 584, 512, 128, [10432, 18464, 867], 41_235, 13.4, 207, 231, 306_195),
    "p3": Row(1024, 2320, 1024, 192, [40448, 73792, 1731], 150_435, 9.8, 721, 801, 1_534_755),
    "p4": Row(256, 136, 64, 32, [4064, 9248, 4624, 435], 38_627, 12.6, 83, 93, 304_227),
    "p5": Row(1024, 1160, 512, 128, [10432, 18464, 867], 197_987, 6.4, 224, 248, 3_065_187),
    "p6": Row(1024, 2320, 1024, 192, [40448, 73792, 1731], 451_395, 2.9, 776, 856, 15_350_595),
    "p6c": Row(4096, 18464, 4096, 192, [107040, 64860, 1623], 2_433_619, 15.8, 673, 753, 15_355_219),
    "p7": Row(1024, 136, 256, 128, [8128, 36928, 18464, 867], 143_811, 5.9, 90, 99, 2_447_811),
    "p8": Row(2048, 4624, 1024, 256, [31200, 83040, 41520, 1299], 1_288_707, 5.2, 454, 502, 24_533_507),
    "p8b": Row(2048, 4624, 1024, 1024, [55424, 147584, 73792, 1731], 1_410_179, 1.1, 593, 653, 122_856_579),
    "p9": Row(3136, 1160, 1568, 784, [11584, 36928, 36928, 18464, 867], 135_187, 9.0, 174, 193, 1_499_347),
    "p9b": Row(6272, 584, 3136, 1568, [8128, 36928, 18464, 867], 107_859, 7.2, 89, 98, 1_503_379),
    "p10": Row(12544, 1160, 6272, 6272, [20832, 83040, 41520, 1299], 233_555, 1.6, 236, 260, 15_035_475),
    "p11": Row(1024, 1160, 512, 256, [8688, 20784, 20784, 10392, 651], 79_043, 16.1, 161, 180, 491_203),
    "p11b": Row(4096, 1160, 2048, 1024, [11584, 36928, 18464, 867], 104_019, 2.1, 469, 517, 4_906_579),
    "digits_ipc1": Row(8, 6, 4, 4, [148, 74, 19], 349, 54.5, 7, 8, 629),
    "digits_ipc10": Row(64, 10, 16, 16, [148, 37], 509, 8.0, 36, 40, 6_269),
}


def test_every_preset_has_its_counts_here():
    assert ROWS.keys() == PRESETS.keys()


@pytest.mark.parametrize(("name", "row"), ROWS.items(), ids=ROWS.keys())
def test_a_preset_takes_exactly_these_floats_and_leaves_these_images(name, row):
    shape, made_for = shape_of(name), PRESETS[name]
    classes = made_for.classes
    assert decoder_layers(shape) == row.layers
    stored = storage(shape, made_for.images_per_class, 0.1)
    budget = budget_floats(made_for.images_per_class, classes, shape.channels, shape.image_size)
    expected = Storage(
        budget_floats=budget,
        shared_floats=row.shared,
        instance_floats=row.instance,
        images_per_instance=1,
        instances=row.images,
        over_budget_instances=row.over,
    )
    assert stored == expected
    container = on_meta(shape, row.images)
    assert container.tier_floats() == {
        "dataset": row.dataset,
        "extractors": classes * row.extractor,
        "class": classes * row.class_memory,
        "instances": classes * row.images * row.instance,
        "decoder": sum(row.layers),
    }
    assert container.storage_floats() == stored.stored_floats(classes) == row.used
    assert row.used <= budget < row.used + classes * row.instance
    assert round(100 * row.shared / budget, 1) == row.share


def test_p6c_reaches_the_673_images_per_class_that_hmn_reports_for_cifar100():
    assert storage(shape_of("p6c"), 50, 0.1).images_per_class == 673


@pytest.mark.parametrize(
    ("name", "decoder", "images"),
    [
        ("p1", 8_451, 67),
        ("p1b", 4_083, 38),
        ("p2", 52_163, 190),
        ("p3", 204_675, 675),
        ("p4", 32_259, 79),
        ("p5", 52_163, 222),
        ("p6", 204_675, 771),
        ("p6c", 307_083, 666),
        ("p7", 113_667, 88),
        ("p8", 278_019, 452),
    ],
)
def test_the_transposed_decoder_takes_its_own_counts(name, decoder, images):
    shape = shape_of(name, decoder="transposed")
    assert sum(decoder_layers(shape)) == decoder
    assert storage(shape, PRESETS[name].images_per_class, 0.1).images_per_class == images


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("decoder", ["upsample", "transposed"])
def test_a_preset_decodes_to_the_images_it_was_made_for(name, decoder):
    shape = shape_of(name, decoder=decoder)
    images = on_meta(shape, 2).decode(torch.tensor([0, 3], device="meta"))
    assert images.shape == (2, shape.channels, shape.image_size, shape.image_size)


SMALL = dict(size=32, classes=10, ipc=1, s=4, dataset=8, feature=4, kernel=1, own=2)
SMALL_8 = SMALL | dict(s=8, dataset=4)
MEDIUM = dict(size=32, classes=10, ipc=10, s=8, dataset=8, feature=8, kernel=3, own=8)
MEDIUM_4 = MEDIUM | dict(s=4, dataset=16)
LARGE = dict(size=32, classes=10, ipc=50, s=8, dataset=16, feature=16, kernel=3, own=16)
LARGE_4 = LARGE | dict(s=4, dataset=32)
TINY = dict(size=64, classes=200, ipc=1, s=8, dataset=16, feature=8, kernel=1, own=4)
IMAGENET = dict(size=224, classes=10, ipc=1, s=14, dataset=16, feature=8, kernel=3, own=8)
GRID = [
    (SMALL, 8, {1: (177, 196), 2: (88, 98), 4: (44, 48), 8: (21, 24)}),
    (SMALL, 12, {1: (168, 188), 2: (84, 93), 4: (41, 46), 8: (20, 22)}),
    (SMALL, 16, {1: (157, 176), 2: (78, 87), 4: (38, 43), 8: (18, 21)}),
    (SMALL, 24, {1: (126, 145), 2: (62, 72), 4: (30, 35), 8: (14, 17)}),
    (SMALL, 32, {1: (84, 103), 2: (41, 51), 4: (19, 24), 8: (9, 11)}),
    (SMALL | dict(kernel=3), 16, {1: (141, 160), 2: (70, 79), 4: (34, 39), 8: (16, 19)}),
    (SMALL_8, 8, {1: (43, 48), 2: (21, 24), 4: (10, 12)}),
    (SMALL_8, 16, {1: (41, 46), 2: (20, 23), 4: (10, 11)}),
    (SMALL_8, 32, {1: (34, 38), 2: (16, 19), 4: (8, 9)}),
    (MEDIUM, 32, {1: (446, 494), 2: (223, 247), 3: (148, 164), 4: (111, 123), 8: (55, 61)}),
    (MEDIUM, 96, {1: (372, 420), 2: (185, 209), 3: (123, 139), 4: (92, 104), 8: (45, 51)}),
    (MEDIUM_4, 64, {2: (710, 806), 4: (353, 401), 8: (174, 198), 16: (85, 97)}),
    (LARGE, 192, {1: (1993, 2233), 2: (995, 1115), 3: (662, 742), 4: (496, 556), 8: (246, 276)}),
    (LARGE_4, 128, {4: (1909, 2149), 8: (951, 1071), 12: (631, 711), 16: (471, 531)}),
    (SMALL | dict(classes=100), 32, {1: (177, 196), 2: (88, 98), 4: (44, 49), 8: (22, 24)}),
    (MEDIUM | dict(classes=100), 64, {1: (458, 506), 2: (229, 253), 3: (152, 168), 4: (114, 126), 8: (57, 63)}),
    (TINY, 96, {1: (175, 194), 2: (87, 97), 4: (43, 48), 8: (21, 24)}),
    (TINY | dict(ipc=50, dataset=32, feature=16, kernel=3, own=16), 128, {4: (2372, 2612), 32: (296, 326)}),
    (IMAGENET, 32, {1: (737, 814), 2: (368, 407), 4: (184, 203), 8: (92, 101)}),
    (IMAGENET | dict(s=7, dataset=32, feature=16, own=16), 64, {4: (662, 739), 32: (81, 91)}),
    (IMAGENET | dict(ipc=10, dataset=32, feature=16, own=16), 96, {4: (1878, 2070), 8: (939, 1035), 16: (469, 517)}),
]


@pytest.mark.parametrize(("data", "width", "counts"), GRID)
def test_images_per_class_over_instance_sizes(data, width, counts):
    for channels, (images, over) in counts.items():
        shape = HmnShape(
            classes=data["classes"],
            channels=3,
            image_size=data["size"],
            latent_side=data["s"],
            dataset_channels=data["dataset"],
            feature_channels=data["feature"],
            feature_kernel=data["kernel"],
            class_channels=data["own"],
            instance_channels=channels,
            decoder_width=width,
        )
        stored = storage(shape, data["ipc"], 0.1)
        assert (stored.images_per_class, stored.over_budget_images_per_class) == (images, over), channels


def test_without_over_budget_both_counts_are_the_same():
    stored = storage(shape_of("p1"), 1, 0.0)
    assert stored.over_budget_images_per_class == stored.images_per_class == 78


# Which preset


@pytest.mark.parametrize(
    ("size", "classes", "rows"),
    [
        (32, 10, {1: "p1c", 10: "p2", 50: "p3", 2: "p1c", 5: "p2", 100: "p3"}),  # SVHN, CIFAR-10
        (32, 100, {1: "p4", 10: "p5", 50: "p6"}),  # CIFAR-100
        (64, 200, {1: "p7", 10: "p8", 50: "p8b"}),  # Tiny ImageNet
        (224, 10, {1: "p9", 10: "p10", 50: "p10"}),  # ImageNet-10
        (128, 10, {1: "p11", 10: "p11b"}),
        (8, 10, {1: "digits_ipc1", 10: "digits_ipc10", 50: "digits_ipc10"}),
        (32, 2, {1: "p1c"}),
        (32, 50, {1: "p4"}),
        (28, 10, {1: "p1c", 10: "p2"}),
        (20, 10, {1: "p1c"}),
        (48, 100, {1: "p7"}),
        (96, 10, {1: "p11"}),
        (4, 3, {1: "digits_ipc1"}),
    ],
)
def test_auto_takes_the_row_nearest_in_side_then_classes_then_memory(size, classes, rows):
    assert {ipc: by_distance(size, classes, ipc)[0] for ipc in rows} == rows
    for ipc, name in rows.items():
        filled = fill(configured(), classes=classes, channels=3, image_size=size, images_per_class=ipc)
        assert filled.preset == name


@pytest.mark.parametrize("name", [name for name, row in PRESETS.items() if row.by_default])
def test_auto_leaves_a_row_as_it_is_for_the_data_that_it_was_made_for(name):
    row = PRESETS[name]
    data = {"classes": row.classes, "image_size": row.image_size, "images_per_class": row.images_per_class}
    data["channels"] = 1 if row.image_size == 8 else 3
    assert fill(configured(), **data) == fill(configured(preset=name), **data)


@pytest.mark.parametrize(
    ("classes", "channels", "side", "memory", "width", "instance", "images"),
    [
        (10, 1, 28, 1, 8, 1, 10),  # MNIST: p1c as it is would hold one image
        (10, 1, 28, 10, 32, 1, 119),
        (10, 3, 28, 1, 16, 4, 9),  # shared memories of 7 x 7 take a fifth
        (2, 3, 32, 10, 32, 2, 189),
        (2, 3, 32, 1, 8, 4, 32),
        (10, 1, 32, 1, 8, 4, 12),
    ],
)
def test_auto_makes_a_row_smaller_for_a_budget_that_is(classes, channels, side, memory, width, instance, images):
    data = {"classes": classes, "channels": channels, "image_size": side}
    filled = fill(configured(), images_per_class=memory, **data)
    found = storage(HmnShape.of(filled, **data), memory, 0.0)
    assert (filled.decoder_width, filled.instance_channels, found.images_per_class) == (width, instance, images)


def test_auto_makes_smaller_only_what_is_left_open():
    data = {"classes": 10, "channels": 1, "image_size": 28, "images_per_class": 1}
    for asked in ({"decoder_width": 16}, {"instance_channels": 4}, {"decoder_width": 12, "instance_channels": 3}):
        filled = fill(configured(**asked), **data)
        assert {key: getattr(filled, key) for key in asked} == asked
    named = fill(configured(preset="p1c"), **data)
    assert (named.decoder_width, named.instance_channels) == (16, 4)


@settings(max_examples=60, deadline=None)
@given(
    classes=st.integers(2, 200),
    channels=st.sampled_from([1, 3]),
    side=st.sampled_from([8, 28, 32, 48, 64, 128, 224]),
    memory=st.integers(1, 50),
)
def test_auto_shares_two_fifths_at_most_and_holds_many_images_where_its_parts_can_be_smaller(
    classes, channels, side, memory
):
    data = {"classes": classes, "channels": channels, "image_size": side}
    filled = fill(configured(), images_per_class=memory, **data)
    shape, budget = HmnShape.of(filled, **data), budget_floats(memory, classes, channels, side)
    assert filled.decoder_width < 8 or shape.shared_floats <= 0.4 * budget
    images = (budget - shape.shared_floats) // (classes * shape.instance_floats)
    assert filled.instance_channels == 1 or images >= 8 * memory
    if filled.decoder_width < PRESETS[filled.preset].decoder_width:  # no more than it has to be
        wider = replace(filled, decoder_width=2 * filled.decoder_width)
        assert HmnShape.of(wider, **data).shared_floats > 0.4 * budget


def test_a_variant_is_used_by_name_alone_wherever_it_stands_in_the_table(monkeypatch):
    monkeypatch.setattr(presets, "PRESETS", dict(reversed(PRESETS.items())))
    nearest = [by_distance(*data)[0] for data in ((32, 10, 1), (32, 100, 50), (224, 10, 1))]
    assert nearest == ["p1c", "p6", "p9"]


@pytest.mark.parametrize(("size", "classes"), [(64, 5), (64, 2), (48, 5)])
def test_auto_passes_over_rows_that_the_budget_does_not_pay_for(size, classes):
    first, *_ = by_distance(size, classes, 1)
    data = dict(classes=classes, channels=3, image_size=size)
    with pytest.raises(ConfigError, match="over the budget"):
        named = fill(configured(preset=first), images_per_class=1, **data)
        storage(HmnShape.of(named, **data), 1, 0.1)
    filled = fill(configured(), images_per_class=1, **data)
    assert storage(HmnShape.of(filled, **data), 1, 0.1).images_per_class >= 1


@pytest.mark.parametrize(
    ("preset", "size", "side"),
    [
        ("p1", 32, 4),
        ("p1", 16, 2),
        ("p1", 8, 2),  # a third doubling would start from one pixel
        ("p1", 28, 7),
        ("p1", 20, 5),
        ("p1", 40, 5),
        ("p1", 34, 17),
        ("p2", 48, 12),
        ("p7", 48, 6),
        ("p9", 224, 14),
        ("p9b", 224, 28),
        ("p11", 96, 6),
        ("p11", 120, 15),
        ("digits_ipc1", 4, 2),
        ("digits_ipc1", 6, 3),
    ],
)
def test_the_latent_side_keeps_as_many_doublings_as_divide_the_image(preset, size, side):
    assert latent_side(PRESETS[preset], size) == side
    filled = fill(configured(preset=preset), classes=10, channels=3, image_size=size, images_per_class=1)
    assert filled.latent_side == side
    shape = HmnShape.of(filled, classes=10, channels=3, image_size=size)
    assert on_meta(shape, 1).decode(torch.tensor([0], device="meta")).shape == (1, 3, size, size)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent_side", 8),
        ("dataset_channels", 5),
        ("feature_channels", 0),
        ("feature_kernel", 3),
        ("class_channels", 0),
        ("instance_channels", 7),
        ("decoder_width", 10),
    ],
)
def test_each_field_can_be_given_and_the_preset_fills_the_others(key, value):
    plain, changed = (
        fill(configured(preset="p1", **given), classes=10, channels=3, image_size=32, images_per_class=1)
        for given in ({}, {key: value})
    )
    assert getattr(plain, key) != value
    shapes = [vars(HmnShape.of(config, classes=10, channels=3, image_size=32)) for config in (plain, changed)]
    assert shapes[1] == shapes[0] | {key: value}


def test_settings_that_are_no_shapes_pass_through_a_preset():
    given = dict(decoder="transposed", decoder_norm=True, init="fit_real", instance_init_scale=2.0, fit_steps=7)
    filled = fill(configured(**given), classes=10, channels=3, image_size=32, images_per_class=1)
    assert {key: getattr(filled, key) for key in given} == given


# Impossible settings


def test_an_unknown_preset_is_told_the_known_ones():
    with pytest.raises(ConfigError, match=r"^container\.preset=p99: must be auto or one of p1, p1b, .*digits_ipc10$"):
        fill(configured(preset="p99"), classes=10, channels=3, image_size=32, images_per_class=1)


@pytest.mark.parametrize(("side", "size"), [(5, 32), (32, 32), (64, 32), (3, 32), (12, 32), (6, 28)])
def test_a_latent_side_that_doubling_does_not_lead_to_the_image_is_refused(side, size):
    with pytest.raises(ConfigError) as caught:
        fill(configured(latent_side=side), classes=10, channels=3, image_size=size, images_per_class=1)
    assert str(caught.value) == (
        f"container.latent_side={side}: must be the image side divided by 2, 4, 8 or a higher power of two: "
        f"dataset.image_size={size} is not {side} doubled one or more times"
    )


def test_an_odd_image_side_has_no_latent_side():
    with pytest.raises(ConfigError, match=r"^container\.latent_side=25: .*dataset\.image_size=25"):
        fill(configured(), classes=10, channels=3, image_size=25, images_per_class=1)


def test_a_budget_too_small_is_told_the_smallest_that_fits_and_that_one_does():
    shape = shape_of("p2")  # 41,235 shared floats in a budget of 30,720
    with pytest.raises(ConfigError) as caught:
        storage(shape, 1, 0.1)
    smallest = int(re.search(r"smallest budget that fits is ([\d,]+)", str(caught.value))[1].replace(",", ""))
    assert smallest == on_meta(shape, 1).storage_floats() == 41_235 + 10 * 128
    assert "memory.images_per_class" in str(caught.value)
    assert storage(shape, 2, 0.1).images_per_class == (61_440 - 41_235) // 1280
