"""heads.py: the fork is the encoder's own top, a kernel weighs what is alike, the score is a share of a pool."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from car_datasets import IQSConfig
from car_datasets.scoring.iqs.heads import (
    FAULTS,
    JUDGED,
    KNOTS,
    OUTPUTS,
    PARTS,
    KernelHead,
    PartsHead,
    judges_for,
    read_kernel,
)
from car_datasets.training.head import save_head
from tests.conftest import tiny_encoder_config


def make_head(**options: Any) -> PartsHead:
    torch.manual_seed(0)
    options = {"head": "parts", "hidden_sizes": (8,), "members": 3, "fork_layers": 1, "queries": 2, **options}
    return PartsHead(IQSConfig(encoder_config=tiny_encoder_config(), **options)).eval()


IDS = torch.tensor([[2, 7, 8, 9, 10, 11, 3], [2, 12, 13, 14, 3, 0, 0]])
MASK = (IDS > 0).long()
STARTS = torch.tensor([3, 2])


def test_a_copied_fork_gives_the_last_state_of_the_encoder() -> None:
    torch.manual_seed(1)
    encoder = AutoModel.from_config(tiny_encoder_config()).eval()
    head = make_head(fork_layers=2)
    for copy, layer in zip(head.fork, encoder.encoder.layer, strict=True):
        copy.copy_from(layer)
    with torch.no_grad():
        states = encoder(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        above = states[0]
        for layer in head.fork:
            above = layer(above, MASK.bool())
    assert head.lower == 0
    assert torch.allclose(above[MASK.bool()], states[-1][MASK.bool()], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fork_layers": 0}, {"queries": 0}, {"fork_layers": 0, "queries": 3}])
def test_padding_and_company_change_nothing(options: dict[str, Any]) -> None:
    head = make_head(**options)
    states = torch.randn(2, 7, 32)
    longer = torch.nn.functional.pad(states, (0, 0, 0, 4), value=5.0)
    with torch.no_grad():
        both = head(states, MASK, STARTS)
        padded = head(longer, torch.nn.functional.pad(MASK, (0, 4)), STARTS)
        alone = head(states[1:, :5], MASK[1:, :5], STARTS[1:])
    assert both.shape == (2, 3, len(OUTPUTS) + len(FAULTS))
    assert torch.allclose(padded, both, atol=1e-5)
    assert torch.allclose(alone, both[1:], atol=1e-5)


def test_an_answer_that_was_cut_off_is_judged_all_the_same() -> None:
    head = make_head()
    assert head(torch.randn(2, 7, 32), MASK, torch.tensor([6, 4])).isfinite().all()


def test_the_score_is_the_share_of_the_pool_below_and_keeps_the_order() -> None:
    head = make_head()
    pool = torch.randn(5000).sort().values
    head.knots.copy_(torch.quantile(pool, torch.linspace(0, 1, KNOTS)))
    share = head.placed(pool)
    assert (share - torch.linspace(0, 1, 5000)).abs().max() < 0.01
    beyond = torch.cat([pool[:1] - torch.arange(5, 0, -1) * 0.1, pool, pool[-1:] + torch.arange(1, 6) * 0.1])
    placed = head.placed(beyond)
    assert (placed[1:] > placed[:-1]).all()  # also beyond the pool: no lump at either end
    assert placed.min() > 0 and placed.max() < 1


def test_parts_have_their_units_and_members_the_mean_of_the_score() -> None:
    head = make_head(penalty=1.0)
    columns = head.judge(torch.randn(50, 3, len(OUTPUTS) + len(FAULTS)) * 4)
    assert columns.shape == (50, 3 + JUDGED)
    expert, soundness, worth = columns[:, 3 : 3 + len(PARTS)].unbind(1)
    assert expert.min() > 0 and expert.max() < 1
    assert soundness.min() == 0 and soundness.max() == 10 and worth.min() == 0
    assert torch.allclose(columns[:, 3 + len(PARTS) :].sum(1), torch.ones(50), atol=1e-5)
    assert ((columns[:, :3].mean(1) > 0) & (columns[:, :3].mean(1) < 1)).all()


def test_a_broken_answer_loses_the_penalty() -> None:
    head = make_head(penalty=2.0)
    outputs = torch.zeros(2, 3, len(OUTPUTS) + len(FAULTS))
    outputs[:, :, OUTPUTS.index("intact")] = torch.tensor([-50.0, 50.0])[:, None]
    assert torch.allclose(head.unscaled(outputs)[:, 0], torch.tensor([-2.0, 0.0]))


def test_a_kernel_tells_what_it_knows_and_the_mean_far_from_it() -> None:
    config = IQSConfig(encoder_config=tiny_encoder_config(), head="kernel", hidden_sizes=(2, 2))
    head = KernelHead(config).eval()
    head.axes[:2] = torch.eye(2)
    head.kept.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    head.duals[:, 0] = torch.tensor([1.0, -1.0])
    head.bias[:4] = torch.tensor([0.5, 0.0, 0.0, 0.75])
    features = torch.zeros(4, len(head.mean))
    features[1, 0], features[2, 1], features[3, :2] = 3.0, 1.0, -99.0  # the last one is clamped
    outputs = head(features)
    assert outputs.shape == (4, 1, len(OUTPUTS) + len(FAULTS))
    expected = torch.tensor([1.5, -0.5, 0.5 + 0.367879, 0.5])
    assert torch.allclose(outputs[:, 0, 0], expected, atol=2e-4)
    assert torch.allclose(outputs[:, 0, 3].sigmoid(), torch.full((4,), 0.75))
    assert head.columns(features).shape == (4, 1 + JUDGED)


def test_a_kernel_is_read_for_a_head_with_its_features_alone(tmp_path: Path) -> None:
    source = {"model_id": "a/b", "revision": "0" * 40, "sha256": "1" * 64}
    options: dict[str, Any] = {"encoder_config": tiny_encoder_config(), "encoder_source": source}
    kernel = IQSConfig(head="kernel", hidden_sizes=(4, 2), **options)
    reader = IQSConfig(head="segments", hidden_sizes=(4, 4), **options)
    save_head(tmp_path, kernel, KernelHead(kernel))
    assert read_kernel(tmp_path, reader).kept.shape == (2, 4)
    others = [{"max_tokens": 9}, {"encoder_source": {**source, "sha256": "2" * 64}}, {"head": "kernel"}]
    for other in others:
        changed = IQSConfig.from_dict({**reader.to_dict(), **other})
        assert not judges_for(kernel, changed)
        with pytest.raises(ValueError, match="does not judge what a head"):
            read_kernel(tmp_path, changed)
