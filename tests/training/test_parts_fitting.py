"""parts_fitting.py: pairs share a batch, the order of ratings is learnt, and a fit is deterministic."""

import numpy as np
import pytest
import torch
from torch import Tensor

from car_datasets import IQSConfig
from car_datasets.scoring.batching import Tokens
from car_datasets.scoring.iqs.heads import OUTPUTS, PartsHead
from car_datasets.training.parts_fitting import Copy, Examples, Schedule, Weights, fit_parts, order_loss, outputs_of
from tests.conftest import tiny_encoder_config

ROWS = 48
WEIGHTS = Weights(rank=1, fault=0.3, worth=1, product=1, expert=1, style=1, style_expert=0.3, corruption=1)
SCHEDULE = Schedule(
    epochs=20, units_per_batch=12, learning_rate=3e-3, head_learning_rate=1e-2, layerwise_decay=0.9, weight_decay=0.01
)


def examples() -> Examples:
    """Return rows whose first unit tells soundness; a copy in style is equal, a corrupted one has the sign changed."""
    even = np.arange(ROWS) % 2
    sound = np.where(np.arange(ROWS) % 4 < 2, 9.0, 2.0).astype(np.float32)
    return Examples(
        tokens=Tokens([[2, 5, 6, 3]] * (3 * ROWS), [4] * (3 * ROWS), [2] * (3 * ROWS)),
        soundness=sound,
        worth=np.where(np.arange(ROWS) < ROWS // 2, sound / 2, np.nan).astype(np.float32),
        fault=(sound < 5).astype(np.int64),
        expert=np.where(np.arange(ROWS) < 16, even, np.nan).astype(np.float32),
        partner=np.where(np.arange(ROWS) < 16, np.arange(ROWS) ^ 1, -1),
        styled=[[Copy(ROWS + i)] for i in range(ROWS)],
        corrupted=[[Copy(2 * ROWS + i)] if i % 3 else [] for i in range(ROWS)],
    )


def states_of(given: Examples) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3 * ROWS, 4, 32, generator=generator)
    sign = torch.from_numpy(np.sign(given.soundness - 5))[:, None]
    states[:ROWS, :, 0] = states[ROWS : 2 * ROWS, :, 0] = 3 * sign
    states[2 * ROWS :, :, 0] = -3
    states[:ROWS, :, 1] = torch.from_numpy(np.nan_to_num(given.expert, nan=0.5) * 4 - 2)[:, None]
    return states


def fitted(seed: int = 0) -> tuple[PartsHead, Tensor]:
    given = examples()
    states = states_of(given)

    def below(texts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = states[torch.tensor(texts)]
        return chosen, torch.ones(chosen.shape[:2], dtype=torch.long), torch.full((len(texts),), 2)

    torch.manual_seed(seed)
    head = PartsHead(
        IQSConfig(
            encoder_config=tiny_encoder_config(), head="parts", hidden_sizes=(8,), members=2, fork_layers=1, queries=2
        )
    )
    fit_parts(head, below, given, np.arange(ROWS), WEIGHTS, SCHEDULE, seed)
    return head, outputs_of(head, below, [4] * (3 * ROWS), list(range(3 * ROWS)), 200)


def test_pairs_are_units_and_a_half_without_its_partner_is_single() -> None:
    units = examples().units(np.array([0, 1, 2, 20, 21]))
    assert units == [(0, 1), (2,), (20,), (21,)]


def test_order_loss_counts_pairs_with_a_gap() -> None:
    given = torch.tensor([0.0, 0.5, 2.0])
    right, wrong = torch.tensor([[0.0], [0.0], [9.0]]), torch.tensor([[0.0], [0.0], [-9.0]])
    assert order_loss(right, given, 1.0) < 0.01
    assert order_loss(wrong, given, 1.0) == pytest.approx(9.0, abs=0.01)
    assert order_loss(wrong, torch.zeros(3), 1.0) == 0


@pytest.mark.slow
def test_a_fit_learns_every_part_and_is_deterministic() -> None:
    head, outputs = fitted()
    assert not head.training
    mean = outputs.mean(dim=1)
    given = examples()
    sound = torch.from_numpy(given.soundness) > 5
    plain = mean[:ROWS, OUTPUTS.index("soundness")]
    assert plain[sound].min() > plain[~sound].max()
    faulty = mean[:ROWS, len(OUTPUTS) + 1] > mean[:ROWS, len(OUTPUTS)]
    assert torch.equal(faulty, ~sound)
    expert = mean[:16, OUTPUTS.index("expert")]
    assert (expert[1::2] > expert[::2]).all()
    broken = torch.tensor([i for i in range(ROWS) if given.corrupted[i] and given.soundness[i] > 5])
    assert (plain[broken] > mean[2 * ROWS + broken, OUTPUTS.index("soundness")]).all()
    assert torch.equal(outputs, fitted()[1])
    assert not torch.equal(outputs, fitted(1)[1])
