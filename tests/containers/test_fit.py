"""Fitting a container to real images: it comes close to them, and an interrupted fit resumes bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hmn.checkpoint import Checkpoints
from hmn.config import HmnConfig
from hmn.containers.fit import SLOT, fit_real
from hmn.containers.hierarchical import HierarchicalMemory, HmnShape
from hmn.errors import Diverged, Interrupted
from hmn.stop import Stop

SHAPE = HmnShape(
    classes=3,
    channels=3,
    image_size=8,
    latent_side=4,
    dataset_channels=2,
    feature_channels=2,
    feature_kernel=1,
    class_channels=2,
    instance_channels=2,
    decoder_width=8,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(seed: int = 0) -> HierarchicalMemory:
    container = HierarchicalMemory(SHAPE, 2)
    container.initialise(generator(seed), HmnConfig(name="hmn"), None)
    return container


def targets() -> Tensor:
    """Six images, each of one colour and all different."""
    levels = torch.tensor([[250, 20, 20], [20, 250, 20], [20, 20, 250], [250, 250, 20], [0, 0, 0], [255, 255, 255]])
    return levels.to(torch.uint8)[:, :, None, None].expand(6, 3, 8, 8).contiguous()


def fit(
    container: HierarchicalMemory,
    folder: Path,
    *,
    steps: int,
    batch: int = 6,
    lr: float = 2e-2,
    weights_lr: float | None = None,
    seed: int = 5,
    stop: Stop | None = None,
) -> tuple[float, torch.Generator]:
    stream = generator(seed)
    checkpoints = Checkpoints(folder, 3600.0, stop)
    rates = {"lr": lr, "weights_lr": weights_lr}
    parts = {"generator": stream, "checkpoints": checkpoints}
    return fit_real(container, targets(), steps=steps, batch=batch, **rates, **parts), stream


@torch.no_grad()
def errors(container: HierarchicalMemory) -> Tensor:
    """Mean squared difference of every pair (decoded image, target), shape (6, 6)."""
    images = container.decode(torch.arange(6))
    return (images[:, None] - targets()[None] / 255).square().mean((2, 3, 4))


def test_every_image_comes_near_its_own_target(tmp_path):
    container = made()
    before = float(errors(container).diagonal().mean())
    error, _ = fit(container, tmp_path, steps=120)
    found = errors(container)
    assert found.argmin(dim=1).tolist() == list(range(6))
    assert found.diagonal().mean() < before / 5
    assert error == pytest.approx(float(found.diagonal().mean()), rel=0.1)


def test_the_error_is_that_of_the_last_steps_batch_before_its_update(tmp_path):
    container = made()
    before = float(errors(container).diagonal().mean())
    assert fit(container, tmp_path, steps=1)[0] == pytest.approx(before, rel=1e-5)


def test_no_gradient_is_left_that_would_be_added_to_the_first_of_condensing(tmp_path):
    container = made()
    fit(container, tmp_path, steps=3)
    assert all(parameter.grad is None for parameter in container.parameters())


def test_small_batches_reach_every_image(tmp_path):
    container = made()
    fit(container, tmp_path, steps=250, batch=3)
    assert errors(container).argmin(dim=1).tolist() == list(range(6))


@pytest.mark.parametrize(("lr", "weights_lr", "moving"), [(2e-2, 1e-9, "memories"), (1e-9, 2e-2, "networks")])
def test_networks_may_have_a_rate_of_their_own(tmp_path, lr, weights_lr, moving):
    container, before = made(), made()
    fit(container, tmp_path, steps=9, lr=lr, weights_lr=weights_lr)
    for name, parameters in container.tiers().items():
        kind = "memories" if name in container.memory_tiers() else "networks"
        for now, then in zip(parameters, before.tiers()[name], strict=True):
            assert (float((now - then).detach().abs().max()) > 1e-3) == (kind == moving), name


def test_batches_depend_on_the_generator_alone(tmp_path):
    found = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        container = made()
        fit(container, tmp_path / name, steps=5, batch=2, seed=seed)
        found.append(container.instances)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Interrupting(Stop):
    """A stop signal that arrives during step ``at``."""

    def arm(self, container: HierarchicalMemory, at: int) -> None:
        left = iter(range(at - 1, -1, -1))

        def count(*_: object) -> None:
            if next(left) == 0:
                self.signum = signal.SIGTERM

        container.decoder.register_forward_hook(count)


@pytest.mark.parametrize("at", [1, 4])
def test_an_interrupted_fit_goes_on_bit_equal(tmp_path, at):
    whole = made()
    expected, expected_stream = fit(whole, tmp_path / "whole", steps=9, batch=4)

    first, stop = made(), Interrupting()
    stop.arm(first, at)
    with pytest.raises(Interrupted) as caught:
        fit(first, tmp_path / "cut", steps=9, batch=4, stop=stop)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert Checkpoints(tmp_path / "cut", 3600.0).load(SLOT)["done"] == at

    second = made(seed=77)  # other initial values and another stream: all must come from the checkpoint
    error, stream = fit(second, tmp_path / "cut", steps=9, batch=4, seed=78)
    assert error == expected
    for (name, one), other in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert torch.equal(stream.get_state(), expected_stream.get_state())


def test_a_fit_interrupted_after_its_last_step_has_nothing_left_to_do(tmp_path):
    whole = made()
    expected, _ = fit(whole, tmp_path / "whole", steps=3)
    first, stop = made(), Interrupting()
    stop.arm(first, 3)
    with pytest.raises(Interrupted):
        fit(first, tmp_path / "cut", steps=3, stop=stop)
    second = made(seed=77)
    assert fit(second, tmp_path / "cut", steps=3)[0] == expected
    assert torch.equal(second.instances, whole.instances)


@pytest.mark.parametrize("batch", [6, 2])
def test_a_fit_that_ends_further_off_than_it_began_is_refused(tmp_path, batch):
    told = r"^fitting real images: the squared error went from 0\.\d+ to 0\.\d+; lower container\.fit_learning_rate or "
    told += r"container\.fit_weights_lr$"
    with pytest.raises(Diverged, match=told):
        fit(made(), tmp_path, steps=40, batch=batch, lr=100.0)
    with pytest.raises(Diverged, match=told):  # also if all steps are done and only the check is left
        fit(made(seed=77), tmp_path, steps=40, batch=batch, lr=100.0)


def test_a_fit_whose_images_are_not_numbers_in_the_end_is_refused(tmp_path):
    def spoil_the_last_look(_decoder: nn.Module, _inputs: object, images: Tensor) -> Tensor:
        return images if torch.is_grad_enabled() else images * torch.nan

    container = made()
    container.decoder.register_forward_hook(spoil_the_last_look)
    with pytest.raises(Diverged, match=r"the squared error went from 0\.\d+ to nan; lower"):
        fit(container, tmp_path, steps=3)
