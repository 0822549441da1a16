"""Trainings of several networks, observed, stopped and continued; predictions of a trained network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hmn import training as trainer
from hmn.checkpoint import Checkpoints
from hmn.data.preprocess import Normalise
from hmn.errors import ArtifactError, Diverged, Interrupted
from hmn.networks import initialise
from hmn.networks.together import Together
from hmn.stop import Stop
from hmn.training import Training, accuracy, logits_of, train_networks
from tests.small_training import NORMALISE, assert_equal_states, generator, images_and_labels, in_float64, training

# Several networks, one after another or together


def observe(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
    """Add up something over epochs that depends on every parameter."""
    for position, index in enumerate(networks):
        for value in run.network.state_dict().values():
            own = value[position] if len(networks) > 1 else value
            memo["sum"][index] += float(own.double().sum())
        memo["epochs"][index] += 1


def train_three(checkpoints: Checkpoints, observe=observe, together: int = 1) -> tuple[dict[str, Tensor], list[range]]:
    made: list[range] = []

    def make(networks: range) -> Training:
        made.append(networks)
        return training(seeds=networks)

    memo = {"sum": torch.zeros(3, dtype=torch.float64), "epochs": torch.zeros(3, dtype=torch.int64)}
    return train_networks(3, make, observe, memo, checkpoints, "networks", together), made


GROUPS = {1: [range(1), range(1, 2), range(2, 3)], 2: [range(2), range(2, 3)], 3: [range(3)], 7: [range(3)]}


@pytest.mark.parametrize("together", GROUPS)
def test_networks_are_trained_in_groups_and_observed_after_every_epoch(tmp_path: Path, together: int):
    memo, made = train_three(Checkpoints(tmp_path, 1e9), together=together)
    assert made == GROUPS[together]
    assert memo["epochs"].tolist() == [4, 4, 4]
    expected = {"sum": torch.zeros(3, dtype=torch.float64), "epochs": torch.zeros(3, dtype=torch.int64)}
    for networks in made:
        run = training(seeds=networks)
        for _ in range(4):
            run.run_epoch()
            observe(networks, run, expected)
    assert_equal_states(memo, expected)
    assert len(set(memo["sum"].tolist())) == 3


@pytest.mark.parametrize(("together", "groups"), [(1, GROUPS[1]), (2, [range(2), range(2, 4), range(4, 5)])])
def test_a_bar_says_which_networks_are_trained(tmp_path: Path, monkeypatch, together: int, groups: list[range]):
    titles = []
    bar = trainer.tqdm
    monkeypatch.setattr(trainer, "tqdm", lambda *args, **options: titles.append(options["desc"]) or bar(**options))
    count = groups[-1].stop
    arguments = (count, lambda networks: training(seeds=networks), lambda *_: None, {}, Checkpoints(tmp_path, 1e9))
    train_networks(*arguments, "score", together)
    assert titles == (
        ["score 1/3", "score 2/3", "score 3/3"] if together == 1 else ["score 1-2/5", "score 3-4/5", "score 5/5"]
    )


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_a_loss_that_is_not_finite_in_any_batch_stops_training_and_names_the_network(tmp_path, together, batch):
    """The second network reports one infinite loss in the second epoch, though its update did no harm."""
    bad = torch.tensor([0.0, torch.inf, 0.0])

    def make(networks: range) -> Training:
        run, done = training(seeds=networks), []
        run_batch = run.run_batch

        def spoilt(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = run_batch(inputs)["loss"]
            done.append(loss)
            own = bad[networks.start : networks.stop].view(loss.shape)
            return {"loss": loss + own if len(done) == 4 + batch else loss}

        run.run_batch = spoilt
        return run

    message = r"^judge 2/3: the training loss of this network is inf after epoch 2: lower its learning rate$"
    with pytest.raises(Diverged, match=message):
        train_networks(3, make, lambda *_: None, {}, Checkpoints(tmp_path, 1e9), "judge", together)


def test_a_network_that_diverges_leaves_the_others_as_they_are():
    run, other = training(seeds=[0, 1, 2]), training(seeds=[0, 1, 2])
    with torch.no_grad():
        run.network.classifier.bias[1].fill_(torch.nan)
    losses, expected = run.run_epoch(), other.run_epoch()
    assert math.isnan(losses[1])
    assert [losses[0], losses[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize(("together", "begun"), [(1, GROUPS[1][1:]), (2, GROUPS[2]), (3, GROUPS[3])])
@pytest.mark.parametrize("epoch", [2, 4])
def test_an_interruption_with_the_second_of_three_networks_leaves_no_trace(tmp_path: Path, epoch, together, begun):
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9), together=together)
    stop = Stop()

    def observe_and_stop(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        if 1 in networks and run.epoch == epoch:
            stop.signum = 15

    with pytest.raises(Interrupted):
        train_three(Checkpoints(tmp_path / "parts", 1e9, stop), observe_and_stop, together)
    found, made = train_three(Checkpoints(tmp_path / "parts", 1e9), together=together)
    assert made == begun
    assert_equal_states(found, expected)


def test_what_was_begun_together_is_finished_together(tmp_path: Path):
    """A setting that changes between sittings must not lose training: here from 2 networks at once to 1."""
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9), together=2)
    stop = Stop()
    stop.signum = 15
    with pytest.raises(Interrupted):
        train_three(Checkpoints(tmp_path / "parts", 1e9, stop), together=2)
    found, made = train_three(Checkpoints(tmp_path / "parts", 1e9), together=1)
    assert made == [range(2), range(2, 3)]
    assert_equal_states(found, expected)


def test_a_crash_repeats_only_what_came_after_the_last_checkpoint(tmp_path: Path):
    expected, _ = train_three(Checkpoints(tmp_path / "whole", 1e9))

    def observe_and_fail(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        if (*networks, run.epoch) == (1, 3):
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError):
        train_three(Checkpoints(tmp_path / "parts", 0), observe_and_fail)
    epochs: list[tuple[int, int]] = []

    def observe_and_note(networks: range, run: Training, memo: dict[str, Tensor]) -> None:
        observe(networks, run, memo)
        epochs.append((*networks, run.epoch))

    found, _ = train_three(Checkpoints(tmp_path / "parts", 0), observe_and_note)
    assert epochs == [(1, 3), (1, 4), (2, 1), (2, 2), (2, 3), (2, 4)]
    assert_equal_states(found, expected)


def test_a_finished_stage_is_read_back_without_training(tmp_path: Path):
    expected, _ = train_three(Checkpoints(tmp_path, 1e9))
    found, made = train_three(Checkpoints(tmp_path, 1e9))
    assert made == []
    assert_equal_states(found, expected)


@pytest.mark.parametrize("lacks", ["memo", "training"])
def test_a_state_that_other_sources_wrote_otherwise_is_refused(tmp_path: Path, lacks: str):
    origin = {"data": "d", "device": "cpu", "code": "c1"}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0, origin=origin)
    checkpoints.stop.signum = 15
    with pytest.raises(Interrupted):
        train_three(checkpoints)
    state = checkpoints.load("networks")
    del state[lacks]["sum" if lacks == "memo" else "update"]
    checkpoints.save("networks", state)
    with pytest.raises(ArtifactError, match=r"of another code version \(c1\), which this one cannot continue"):
        train_three(Checkpoints(tmp_path / "checkpoints", 0, origin=origin | {"code": "c2"}))


# Judging


class ByHand(nn.Module):
    """Its logits are the channels of the first pixel; it records its mode and the batch size of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []
        self.sizes: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.modes.append(self.training)
        self.sizes.append(len(images))
        return images[:, :, 0, 0]


def test_logits_are_those_of_normalised_images_in_evaluation_mode_chunk_by_chunk():
    network, (images, _) = ByHand(), images_and_labels(5)
    logits = logits_of(network, images, NORMALISE, batch=2)
    assert torch.equal(logits, torch.stack([NORMALISE(images[i : i + 1])[0, :, 0, 0] for i in range(5)]))
    assert (network.modes, network.sizes) == ([False] * 3, [2, 2, 1])
    assert network.training
    assert not logits.requires_grad


def test_accuracy_is_the_share_of_images_whose_largest_logit_is_the_labels():
    images = torch.zeros(4, 3, 2, 2)
    images[[0, 1, 2, 3], [0, 2, 1, 1], 0, 0] = 1.0  # predictions 0, 2, 1, 1
    value = accuracy(ByHand(), images, torch.tensor([0, 2, 1, 0]), Normalise((0.0,) * 3, (1.0,) * 3))
    assert value == 0.75


def test_logits_and_accuracies_of_networks_together_are_those_of_each():
    networks = [initialise(in_float64(), generator(seed)) for seed in range(3)]
    images = torch.rand(50, 3, 8, 8, generator=generator(), dtype=torch.float64)
    labels = images_and_labels(50)[1]
    logits = logits_of(Together(networks), images, NORMALISE, batch=20)
    expected = torch.stack([logits_of(network, images, NORMALISE, batch=20) for network in networks])
    assert logits.shape == (3, 50, 3) and not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    found = accuracy(Together(networks), images, labels, NORMALISE)
    assert found.tolist() == [float(accuracy(network, images, labels, NORMALISE)) for network in networks]
    assert len(set(found.tolist())) > 1
