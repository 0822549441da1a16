"""Condensing through a student: one step against autograd through everything, batches, rate, adversary, resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from hmn import experts
from hmn.adversary import StyleAdversary, supervised_contrast
from hmn.checkpoint import Checkpoints
from hmn.config.containers import HabaConfig, MultiformationConfig
from hmn.config.objectives import BpttConfig, TrajectoryMatchingConfig
from hmn.containers import KINDS
from hmn.containers.base import Container
from hmn.containers.haba import Haba
from hmn.containers.multiformation import Multiformation, MultiformationShape
from hmn.data import augment
from hmn.data.preprocess import Normalise
from hmn.data.sampling import per_class
from hmn.network_update import training_step
from hmn.networks import initialise
from hmn.networks.convnet import ConvNet
from hmn.objectives.unroll import Unrolled
from hmn.seeding import derived_seed, generator
from hmn.stop import Stop
from hmn.through_student import ClassifyReal, LearnedRate, ReachExpert, ThroughStudent, of_every_class, shuffled
from hmn.training import Training
from tests.command import configured
from tests.small_matching import (
    CLASSES,
    CPU,
    MEAN,
    REAL,
    SEED,
    STD,
    assert_same,
    build,
    clone_of,
    make_container,
    make_haba,
)

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def config(**changes: Any) -> TrajectoryMatchingConfig:
    settings = experts.ExpertsConfig(count=2, epochs=2, batch=16)
    values = {"outer_steps": 6, "student_steps": 3, "student_batch": 6, "max_start_epoch": 2, "expert_epochs": 1}
    values |= {"memory_lr": 1.0, "weights_lr": 1.0, "momentum": 0.0, "student_lr": 0.05, "experts": settings}
    return TrajectoryMatchingConfig(name="trajectory_matching", **{**values, **changes})


def bptt_config(**changes: Any) -> BpttConfig:
    values = {"outer_steps": 6, "student_steps": 3, "class_batch": 2, "real_batch": 6, "momentum": 0.0}
    return BpttConfig(name="bptt", **{**values, "memory_lr": 1.0, "weights_lr": 1.0, **changes})


@pytest.fixture(scope="module")
def expert_files(tmp_path_factory) -> list[Path]:
    recipe = experts.recipe_of(config().experts, "none")

    def train(numbers: list[int]) -> Training:
        streams = [generator(0, "experts", number) for number in numbers]
        step, normalise = training_step(build(), CPU), Normalise(MEAN, STD)
        return Training(build, REAL.train.images, REAL.train.labels, recipe, normalise, step, *streams)

    folder = tmp_path_factory.mktemp("experts")
    opened = partial(Checkpoints, folder / "unfinished", 1e9)
    return experts.build(folder, train, 2, fingerprint="", together=1, stop=Stop(), open_checkpoints=opened)


def make_multiformation() -> Multiformation:
    """12 images per class, of which condensing sees 6: four tiles of one stored image, and two whole."""
    shape = MultiformationShape(classes=CLASSES, channels=3, image_size=8, factor=2, decode="bound", bound=8)
    container = Multiformation(shape, 3)
    container.initialise(generator(0), MultiformationConfig(name="multiformation", init="noise"), None)
    return container


def trajectory_run(
    files: list[Path], settings: TrajectoryMatchingConfig, container: Container | None = None, **parts: Any
) -> ThroughStudent:
    container = make_container() if container is None else container
    goal = ReachExpert(
        files,
        max_start=settings.max_start_epoch,
        length=settings.expert_epochs,
        device=CPU.device,
        generator=generator(SEED, "experts"),
    )
    rate = LearnedRate(
        settings.student_lr,
        lr=settings.student_lr_lr,
        momentum=settings.student_lr_momentum,
        least=1e-3,
        device=CPU.device,
    )
    options = {"unrolled": unrolled(settings), "batches": shuffled(container.views(), settings.student_batch)}
    return ThroughStudent(container, goal, settings, **{**options, **shared(), "rate": rate, **parts})


def bptt_run(settings: BpttConfig, container: Container | None = None, **parts: Any) -> ThroughStudent:
    container = make_container() if container is None else container
    student, train = unrolled(settings), REAL.train
    real = per_class(train.labels, REAL.class_names, settings.real_batch, generator(SEED, "real"))
    options = {"real": real, "normalise": Normalise(MEAN, STD), "seed": SEED}
    goal = ClassifyReal(build(), student.loss_and_gradient, train.images, train.labels, **options)
    batches = of_every_class(container.classes, container.matched_per_class, settings.class_batch)
    rate = LearnedRate(settings.student_lr, lr=0.0, momentum=0.0, least=0.0, device=CPU.device)
    return ThroughStudent(
        container, goal, settings, **{"unrolled": student, "batches": batches, "rate": rate, **shared(), **parts}
    )


def unrolled(settings: TrajectoryMatchingConfig | BpttConfig) -> Unrolled:
    names = {"momentum": settings.student_momentum, "dampening": settings.student_dampening}
    return Unrolled(build(), CPU, segment=settings.segment, **names)


def shared() -> dict[str, Any]:
    parts = {"normalise": Normalise(MEAN, STD), "strategy": STRATEGY, "compute": CPU, "seed": SEED}
    return parts | {"chunk": 4}


def adversary_of(container: Haba, **weights: float) -> StyleAdversary:
    network = initialise(ConvNet(3, CLASSES, 8, width=4, depth=2), generator(1))
    views = container.views()
    labels, settings = views[0] // container.images_per_class, HabaConfig(name="haba", **weights)
    return StyleAdversary(network, views, labels, settings, batch=None, compute=CPU, generator=generator(2))


# One step, against autograd through decoder, augmentation and all of the student's training at once


def student_by_autograd(work: ThroughStudent, start: dict[str, Tensor], lr: Tensor) -> dict[str, Tensor]:
    """theta_T with a graph to the container and to ``lr``; it makes the draws that ``work`` is about to make."""
    streams = {name: torch.Generator().set_state(s.get_state()) for name, s in work.generators.items()}
    settings, container, normalise = work.config, work.container, Normalise(MEAN, STD)
    theta, v = dict(start), {name: torch.zeros_like(value) for name, value in start.items()}
    theta = {name: value.clone().requires_grad_() for name, value in theta.items()}
    for index in work.batches(settings.student_steps, streams["batches"]):
        drawn = augment.draw(STRATEGY, len(index), 8, streams["augment"], rule="vico")
        images = augment.apply(normalise(container.decode_matched(index)), drawn)
        loss = F.cross_entropy(functional_call(build(), theta, (images,)), index // container.matched_per_class)
        gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        for name, g in zip(theta, gradients, strict=True):
            v[name] = settings.student_momentum * v[name] + (1 - settings.student_dampening) * g
        theta = {name: theta[name] - lr * v[name] for name in theta}
    return theta


def moved(before: dict[str, Tensor], container: Container) -> dict[str, Tensor]:
    """The gradient, recovered from a plain SGD step at learning rate 1."""
    return {name: value - container.state_dict()[name] for name, value in before.items()}


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("make", "chunk"), [(make_container, 4), (make_container, 100), (make_multiformation, 4)])
@pytest.mark.parametrize(("momentum", "dampening", "segment"), [(0.0, 0.0, 1), (0.9, 0.9, 2)])
def test_a_trajectory_step_is_autograd_s_through_everything(expert_files, momentum, dampening, segment, make, chunk):
    options = {"student_momentum": momentum, "student_dampening": dampening, "segment": segment}
    settings = config(**options, student_lr_lr=1e-5, student_lr_momentum=0.0)
    work = trajectory_run(expert_files, settings, make(), chunk=chunk)
    drawn = trajectory_run(expert_files, settings).goal.draw()
    start, target = ({name: value.double() for name, value in end.items()} for end in drawn)
    work.goal.draw = lambda: (start, target)
    lr = torch.tensor(settings.student_lr).requires_grad_()
    end = student_by_autograd(work, start, lr)
    far = sum((end[name] - target[name]).square().sum() for name in end)
    expected = far / sum((start[name] - target[name]).square().sum() for name in end)
    parameters = dict(work.container.named_parameters())
    *gradients, by_lr = torch.autograd.grad(expected, [*parameters.values(), lr])
    before = clone_of(work.container)
    losses, norms = work.run_step()
    torch.testing.assert_close(losses, expected.detach()[None], rtol=1e-9, atol=0)
    found = moved(before, work.container)
    for name, gradient in zip(parameters, gradients, strict=True):
        assert gradient.norm() > 0
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(work.rate.value, lr.detach() - 1e-5 * by_lr, rtol=1e-9, atol=0)
    assert norms["instances"] == pytest.approx(float(found["instances"].norm()), rel=1e-6)


@pytest.mark.usefixtures("double")
def test_a_bptt_step_is_autograd_s_through_everything_then_clipped():
    settings = bptt_config(student_momentum=0.9, gradient_clip=1e-3)
    work, twin = bptt_run(settings), bptt_run(settings)
    start = {name: value.clone() for name, value in twin.goal.begin(0).items()}
    end = student_by_autograd(work, start, torch.tensor(settings.student_lr))
    index = twin.goal.real.draw(torch.arange(CLASSES)).flatten()
    images = (REAL.train.images[index].double() / 255 - twin.normalise.mean) / twin.normalise.std
    expected = F.cross_entropy(functional_call(build(), end, (images,)), REAL.train.labels[index])
    parameters = dict(work.container.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))
    before = clone_of(work.container)
    losses, _ = work.run_step()
    torch.testing.assert_close(losses, expected.detach()[None], rtol=1e-6, atol=0)  # uint8 pixels become float32
    whole = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert whole > 1e-3
    for (name, found), gradient in zip(moved(before, work.container).items(), gradients, strict=True):
        torch.testing.assert_close(found, gradient * (1e-3 / whole), rtol=1e-4, atol=1e-9, msg=name)


def test_every_student_is_a_fresh_network_of_the_run_s_seed():
    first, second = bptt_run(bptt_config()).goal, bptt_run(bptt_config()).goal
    names = [{name: value.clone() for name, value in first.begin(step).items()} for step in (0, 1, 0)]
    assert_same(names[0], names[2])
    assert not torch.equal(names[0]["classifier.weight"], names[1]["classifier.weight"])
    assert_same({name: value.clone() for name, value in second.begin(1).items()}, names[1])


def test_every_step_has_a_student_of_its_own(monkeypatch):
    work, begun = bptt_run(bptt_config()), []
    begin = work.goal.begin
    monkeypatch.setattr(work.goal, "begin", lambda step: begun.append(step) or begin(step))
    for _ in range(3):
        work.run_step()
    assert begun == [0, 1, 2]


def test_streams_have_the_names_that_kept_results_were_made_with():
    streams = bptt_run(bptt_config()).generators
    for name in ("batches", "augment"):
        assert streams[name].initial_seed() == derived_seed(SEED, "condense", name)


def test_images_that_no_batch_takes_are_not_decoded(expert_files):
    work, seen = trajectory_run(expert_files, config(student_steps=1, student_batch=2)), []
    decode = work.container.decode_matched
    work.container.decode_matched = lambda index: seen.append(index) or decode(index)
    work.run_step()
    assert [len(index) for index in seen] == [2, 2]  # decoded without a graph, and then with one


def test_a_container_s_penalty_is_part_of_the_gradient(expert_files):
    plain, penalised = (trajectory_run(expert_files, config()) for _ in range(2))
    penalised.container.penalty = lambda: 0.25 * penalised.container.instances.sum()
    plain.run_step()
    penalised.run_step()
    difference = plain.container.instances - penalised.container.instances
    torch.testing.assert_close(difference, torch.full_like(difference, 0.25), rtol=0, atol=1e-5)


# Batches


def test_batches_are_chunks_of_random_orders():
    drawn = shuffled(torch.arange(10)[None], 4)(7, generator(0))
    assert [len(index) for index in drawn] == [4, 4, 2, 4, 4, 2, 4]
    for first in (0, 3):
        assert sorted(torch.cat(drawn[first : first + 3]).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(drawn[:3]), torch.cat(drawn[3:6]))


def test_without_a_batch_size_every_step_takes_all_images():
    for index in shuffled(torch.arange(10)[None], None)(3, generator(0)):
        assert sorted(index.tolist()) == list(range(10))


def test_a_batch_shows_one_style_of_all_bases():
    container = make_haba()
    styles = set()
    for index in shuffled(container.views(), None)(30, generator(0)):
        (style,) = (index % 3).unique().tolist()
        assert sorted((index // 3).tolist()) == list(range(CLASSES * 2))
        styles.add(style)
    assert styles == {0, 1, 2}


def test_other_containers_show_all_images_at_once():
    assert torch.equal(make_container().views(), torch.arange(15)[None])


def test_class_batches_take_as_many_different_images_of_every_class():
    drawn = of_every_class(3, 5, 2)(6, generator(0))
    for index in drawn:
        assert (index // 5).tolist() == [0, 0, 1, 1, 2, 2]
        assert len(index.unique()) == 6
    assert len({tuple(index.tolist()) for index in drawn}) > 1
    assert sorted(of_every_class(3, 5, 9)(1, generator(0))[0].tolist()) == list(range(15))


# The student's rate


def test_a_learned_rate_is_stepped_with_momentum_and_held():
    rate = LearnedRate(0.01, lr=0.1, momentum=0.5, least=1e-3, device=CPU.device)
    rate.step(torch.tensor(0.02))
    assert float(rate.value) == pytest.approx(0.01 - 0.002)
    rate.step(torch.tensor(0.02))
    assert float(rate.value) == pytest.approx(0.008 - 0.1 * (0.5 * 0.02 + 0.02))
    rate.step(torch.tensor(1.0))
    assert float(rate.value) == pytest.approx(0.001)


def test_rates_are_held_where_their_papers_hold_them():
    for name, least in {"mtt_cifar10_ipc50": 0.0, "mtt_haba": 1e-3, "mtt_speed": 1e-3, "mtt_hmn": 1e-3}.items():
        assert configured(f"objective={name}").objective.student_lr_min == least


def test_a_rate_that_is_not_learned_stays():
    rate = LearnedRate(1e-4, lr=0.0, momentum=0.5, least=1e-3, device=CPU.device)
    rate.step(torch.tensor(1.0))
    assert float(rate.value) == pytest.approx(1e-4)


# HaBa's adversary


def test_the_supervised_contrastive_loss_by_its_definition():
    features, labels = torch.randn(6, 5, generator=generator(0)), torch.tensor([0, 1, 0, 1, 2, 2])
    z = features / features.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        log_sum = math.log(sum(math.exp(float(z[i] @ z[j]) / 0.07) for j in others))
        positives = [j for j in others if labels[j] == labels[i]]
        total -= sum(float(z[i] @ z[j]) / 0.07 - log_sum for j in positives) / len(positives)
    assert float(supervised_contrast(features, labels)) == pytest.approx(total / 6, rel=1e-5)


def test_the_adversary_sees_the_same_bases_in_two_different_styles():
    adversary = adversary_of(make_haba())
    for _ in range(10):
        index, labels = adversary._pair()
        first, second = index.chunk(2)
        assert (first // 3).tolist() == (second // 3).tolist()
        assert ((first - second) % 3).all()
        assert labels.tolist() == (first // 6).tolist()


def test_the_container_is_pushed_away_from_likeness_and_the_extractor_is_not():
    container = make_haba()
    adversary = adversary_of(container, club_weight=0.5)
    index, _ = adversary_of(container)._pair()
    network = clone_of(adversary.network)
    loss = adversary.push(container.decode)
    first, second = adversary.network.features(container.decode(index)).chunk(2)
    expected = 0.5 * ((F.cosine_similarity(first, second) + 1) / 2).mean()
    torch.testing.assert_close(loss, expected.detach())
    (gradient,) = torch.autograd.grad(expected, container.instances)
    torch.testing.assert_close(container.instances.grad, gradient)
    assert_same(clone_of(adversary.network), network)


def test_the_extractor_steps_on_its_own_losses_and_leaves_the_container_alone():
    container = make_haba()
    weights = {"class_weight": 0.3, "likeli_weight": 0.7, "contrast_weight": 0.2, "adversary_lr": 0.1}
    adversary, twin = (adversary_of(container, **weights) for _ in range(2))
    index, labels = twin._pair()
    images, labels = container.decode(index).detach(), labels.repeat(2)
    features = twin.network.features(images)
    first, second = features.chunk(2)
    loss = 0.3 * F.cross_entropy(twin.network.classifier(features), labels)
    loss = loss + 0.7 * ((1 - F.cosine_similarity(first, second)) / 2).mean()
    loss = loss + 0.2 * supervised_contrast(features, labels)
    gradients = torch.autograd.grad(loss, list(twin.network.parameters()))
    adversary.learn(container.decode)
    for (name, value), gradient in zip(twin.network.named_parameters(), gradients, strict=True):
        found = adversary.network.get_parameter(name)
        torch.testing.assert_close(found, value - 0.1 * gradient, rtol=1e-4, atol=1e-6)
    assert container.instances.grad is None


def test_a_step_with_an_adversary_reports_both_losses_and_uses_both(expert_files):
    container, alone = make_haba(), make_haba()
    work = trajectory_run(expert_files, config(), container, adversary=adversary_of(container, club_weight=10.0))
    losses, _ = work.run_step()
    plain, _ = trajectory_run(expert_files, config(), alone).run_step()
    assert losses.shape == (2,)
    torch.testing.assert_close(losses[:1], plain)
    assert not torch.allclose(container.instances, alone.instances)


def test_the_extractor_learns_at_every_step(expert_files):
    container = make_haba()
    adversary = adversary_of(container)
    work = trajectory_run(expert_files, config(), container, adversary=adversary)
    for _ in range(2):
        before = clone_of(adversary.network)
        work.run_step()
        after = dict(adversary.network.named_parameters())
        assert not all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("rule", ["vico", "idc"])
def test_the_adversary_is_shown_what_a_student_sees(expert_files, rule):
    container, index = make_haba(), torch.tensor([4, 0, 13])
    work = trajectory_run(expert_files, config(augmentation_rule=rule), container)
    stream = torch.Generator().set_state(work.generators["augment"].get_state())
    drawn = augment.draw(STRATEGY, 3, 8, stream, rule=rule)
    expected = augment.apply(Normalise(MEAN, STD)(container.decode_matched(index)), drawn)
    torch.testing.assert_close(work._seen(index), expected)


def test_a_step_counts_all_images_of_its_student(expert_files):
    """It sees six bases in one style, four at a time: batches of 4, 2 and 4."""
    work = trajectory_run(expert_files, config(student_steps=3, student_batch=4), make_haba())
    assert work.images_per_step == 4 + 2 + 4


# Over many steps


def hmn_config(**changes: Any) -> TrajectoryMatchingConfig:
    rates = {
        "optimizer": "adam",
        "momentum": 0.5,
        "memory_lr": 0.1,
        "weights_lr": 0.01,
        "student_batch": None,
        "student_lr": 0.02,
    }
    return config(**{**rates, "outer_steps": 15, "max_start_epoch": 1, "student_steps": 4, **changes})


def test_hmn_under_trajectory_matching_learns(expert_files):
    """The paper left this pair open. Here, students come closer to where an expert went than where they started."""
    work = trajectory_run(expert_files[:1], hmn_config(), strategy="none")
    losses = [float(work.run_step()[0]) for _ in range(15)]
    assert losses[0] > 1
    assert losses[-1] < 0.95


def test_hmn_under_bptt_learns():
    rates = {
        "optimizer": "adam",
        "momentum": 0.5,
        "memory_lr": 0.1,
        "weights_lr": 0.01,
        "student_lr": 0.3,
        "gradient_clip": None,
    }
    settings = bptt_config(outer_steps=15, student_steps=4, real_batch=12, class_batch=5, **rates)
    work = bptt_run(settings, strategy="none")
    losses = [float(work.run_step()[0]) for _ in range(15)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def haba_run(files: list[Path], seed: int = 0) -> ThroughStudent:
    container = make_haba(seed)
    settings = config(student_lr_lr=0.01, momentum=0.9, student_momentum=0.9, memory_lr=0.1, weights_lr=0.1)
    return trajectory_run(files, settings, container, adversary=adversary_of(container))


RUNS: dict[str, Callable[[list[Path], int], ThroughStudent]] = {
    "hmn": lambda files, seed: trajectory_run(files, hmn_config(student_lr_lr=0.01), make_container(seed)),
    "haba": haba_run,
    "bptt": lambda files, seed: bptt_run(bptt_config(optimizer="adam", momentum=0.5), make_container(seed)),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_bit_for_bit(name: str, expert_files, tmp_path: Path):
    whole, half = RUNS[name](expert_files, 0), RUNS[name](expert_files, 0)
    expected = [whole.run_step() for _ in range(5)]
    for _ in range(2):
        half.run_step()
    Checkpoints(tmp_path, 0).save("condense", half.state_dict())
    rest = RUNS[name](expert_files, 99)
    rest.load_state_dict(Checkpoints(tmp_path, 0).load("condense"))
    assert_same([rest.run_step() for _ in range(3)], expected[2:])
    assert_same(rest.state_dict(), whole.state_dict())


# On every container


@pytest.mark.parametrize("objective", ["trajectory_matching", "bptt"])
@pytest.mark.parametrize("name", ["hmn", "image", "linba", "speed", "haba", "fred", "multiformation"])
def test_every_container_is_condensed_through_a_student(name: str, objective: str, expert_files):
    shape = {"classes": CLASSES, "channels": 3, "image_size": 8}
    given = ["container.patch=4", "container.top_k=2", "container.tokens=4"] if name == "speed" else []
    given += [f"container.{key}=4" for key in ("token_dim",)] if name == "speed" else []
    section = configured(f"container={name}", *given).container
    filled = KINDS[name].fill(section, images_per_class=10, **shape)
    container = KINDS[name].container(KINDS[name].shape.of(filled, **shape), 2)
    container.initialise(generator(0), filled, Noise())
    before = clone_of(container)
    rates = {"memory_lr": 0.1, "weights_lr": 0.1}
    work = (
        trajectory_run(expert_files, config(**rates), container)
        if objective == "trajectory_matching"
        else bptt_run(bptt_config(**rates), container)
    )
    for _ in range(2):
        losses, norms = work.run_step()
        assert losses.isfinite().all()
    assert norms.keys() == container.tiers().keys()
    assert all(value.isfinite() and value > 0 for value in norms.values())
    for parameter, value in before.items():
        assert not torch.equal(container.get_parameter(parameter), value), parameter


class Noise:
    """Images for containers that start from real ones."""

    def draw(self, count: int, how: str = "random") -> Tensor:
        return torch.rand(CLASSES * count, 3, 8, 8, generator=generator(3))
