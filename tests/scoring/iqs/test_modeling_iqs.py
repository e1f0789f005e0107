"""IQSModel: an ordinary transformers model; every configuration saves, loads and computes what its parts say."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from car_datasets import IQSConfig, IQSModel
from car_datasets.scoring.iqs.configuration_iqs import HEAD_NAMES
from car_datasets.scoring.iqs.layers import sparsemax
from car_datasets.scoring.iqs.modeling_iqs import HEADS
from car_datasets.utils import revisions
from tests.conftest import tiny_encoder_config

IDS = torch.tensor([[2, 5, 6, 7, 3, 0, 0], [2, 9, 10, 11, 12, 13, 3]])
MASK = (IDS != 0).long()


def test_every_head_of_the_configuration_can_be_built() -> None:
    assert tuple(HEADS) == HEAD_NAMES


CONFIGURATIONS = [
    {},
    {"layer_mix": "softmax", "layer_norm": True, "pooling": "max", "activation": "Sigmoid"},
    {"layer_mix": "softmax", "hidden_sizes": [], "final_activation": "Sigmoid"},
    {"layer": 1, "pooling": "cls", "hidden_sizes": [8, 4]},
]


SEGMENTS = {"head": "segments", "hidden_sizes": [4, 3], "members": 3, "word_bits": 6}
STARTS = torch.tensor([2, 3])


def build(**options: object) -> IQSModel:
    torch.manual_seed(0)
    return IQSModel(IQSConfig(encoder_config=tiny_encoder_config(), **{"hidden_sizes": [16], **options})).eval()


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_round_trip_through_auto_classes(options: dict, tmp_path: Path) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path)
    assert [p.suffix for p in tmp_path.glob("model*")] == [".safetensors"]
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is IQSModel
    assert isinstance(AutoConfig.from_pretrained(tmp_path), IQSConfig)
    state = again.state_dict()
    assert all(torch.equal(state.pop(name), tensor) for name, tensor in model.state_dict().items())
    assert not state
    # Not to the last bit: a product's last bit depends on where in memory its weights lie.
    assert torch.allclose(model(IDS, MASK).logits, again.eval()(IDS, MASK).logits, atol=1e-7)


def test_fields_of_the_configuration_win_over_the_file(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    again = IQSModel.from_pretrained(tmp_path, pooling="max", max_tokens=7)
    assert (again.config.pooling, again.config.max_tokens, again.config.hidden_sizes) == ("max", 7, [16])
    with pytest.raises(ValueError, match="pooling='first'"):
        IQSModel.from_pretrained(tmp_path, pooling="first")


def test_defaults_are_the_original_architecture() -> None:
    config = IQSConfig()
    assert (config.layer_mix, config.pooling, config.hidden_sizes, config.activation) == (
        "sparsemax",
        "avg",
        [2048, 1024],
        "Tanh",
    )
    assert (config.encoder_config.hidden_size, config.encoder_config.num_hidden_layers) == (1024, 24)
    assert (config.max_tokens, config.template, config.final_activation) == (510, "paper", None)


def test_mix_is_gamma_times_weighted_layers_averaged_over_tokens() -> None:
    model = build(layer_mix="softmax", hidden_sizes=[])
    torch.nn.init.normal_(model.layers.weight)
    model.layers.gamma.data.fill_(1.7)
    hidden = torch.stack(model.encoder(IDS, attention_mask=MASK, output_hidden_states=True).hidden_states)
    mixed = 1.7 * (model.layers.weight.softmax(0)[:, None, None, None] * hidden).sum(0)
    pooled = torch.stack([mixed[0, :5].mean(0), mixed[1].mean(0)])
    assert torch.allclose(model(IDS, MASK).logits, model.head(pooled), atol=1e-6)


def test_whole_layers_are_dropped_in_training_only_and_never_all() -> None:
    model = build(layer_mix="sparsemax", dropout=0.9, hidden_sizes=[])
    states = [torch.full((1, 2, 32), float(i)) for i in range(3)]
    assert torch.allclose(model.layers(states), torch.full((1, 2, 32), 1.0))
    model.layers.train()
    seen = {round(model.layers(states)[0, 0, 0].item(), 3) for _ in range(200)}
    assert {0.0, 1.0, 2.0} < seen  # one layer alone, each of them, and mixes
    assert all(value == value for value in seen)


def test_layer_norm_uses_only_real_tokens() -> None:
    model = build(layer_mix="softmax", layer_norm=True)
    alone = model(IDS[:1, :5], MASK[:1, :5]).logits
    assert torch.allclose(model(IDS, MASK).logits[:1], alone, atol=1e-5)


@pytest.mark.parametrize("options", CONFIGURATIONS)
def test_padding_does_not_change_a_score(options: dict) -> None:
    model = build(**options)
    assert torch.allclose(model(IDS, MASK).logits[:1], model(IDS[:1, :5]).logits, atol=1e-6)


def randomised(**options: object) -> IQSModel:
    model = build(**{**SEGMENTS, **options})
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_the_segment_head_is_saved_padded_and_averaged_like_any_other(tmp_path: Path) -> None:
    model = randomised()
    model.head.scale.fill_(0.5)
    members, _ = model.member_scores(IDS, MASK, STARTS)
    assert members.shape == (2, 3)
    assert torch.allclose(model(IDS, MASK, answer_start=STARTS).logits[:, 0], members.mean(dim=1))
    alone = model(IDS[:1, :5], answer_start=STARTS[:1]).logits
    assert torch.allclose(model(IDS, MASK, answer_start=STARTS).logits[:1], alone, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = IQSModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS, MASK, answer_start=STARTS).logits, model(IDS, MASK, answer_start=STARTS).logits)
    with pytest.raises(ValueError, match="pass answer_start"):
        model(IDS, MASK)


def test_a_broken_answer_loses_at_most_the_penalty() -> None:
    free, strict = randomised(penalty=0.0), randomised(penalty=2.0)
    strict.load_state_dict(free.state_dict())
    with torch.no_grad():
        strict.head.integrity[2].weight.zero_()
        for bias, lost in ((50.0, 0.0), (-50.0, 2.0), (0.0, 1.0)):
            strict.head.integrity[2].bias.fill_(bias)
            free_scores, strict_scores = (m(IDS, MASK, answer_start=STARTS).logits for m in (free, strict))
            assert torch.allclose(free_scores - lost, strict_scores, atol=1e-6)
            assert ((free_scores > 0) & (free_scores < 1)).all()


def test_sparsemax_projects_onto_the_simplex() -> None:
    weights = sparsemax(torch.tensor([2.0, 1.9, -1.0, 0.5]))
    assert weights.sum().item() == pytest.approx(1)
    assert weights.tolist() == pytest.approx([0.55, 0.45, 0.0, 0.0])  # by hand: threshold (3.9 - 1) / 2
    assert torch.allclose(sparsemax(torch.zeros(4)), torch.full((4,), 0.25))


def test_labels_give_the_mean_squared_error_and_gradients_reach_the_mix() -> None:
    model = build()
    output = model(IDS, MASK, labels=torch.tensor([0.0, 1.0]))
    expected = ((output.logits.squeeze(-1) - torch.tensor([0.0, 1.0])) ** 2).mean()
    assert output.loss.item() == pytest.approx(expected.item())
    output.loss.backward()
    assert model.layers.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del state["head.0.weight"]
    elif change == "unknown":
        state["head.9.weight"] = torch.zeros(2)
    else:
        state["head.0.weight"] = torch.zeros(16, 31)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit the configuration.*head\."):
        IQSModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_mix": "mean"}, "layer_mix='mean'"),
        ({"pooling": "median"}, "pooling='median'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"layer": 3}, "hidden states 0 to 2"),
        ({"head": "linear"}, "head='linear' is not known"),
        ({"head": "segments"}, r"two hidden_sizes, not 'regression' and \[16\]"),
        ({"head": "segments", "objective": "ranking"}, "needs objective='regression'"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_the_embedded_default_takes_its_encoder_from_the_package(tmp_path: Path) -> None:
    folder = revisions.default_scorer_folder()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 5_000_000
    assert not any(name.startswith("encoder.") for name in load_file(folder / "model.safetensors"))
    model = IQSModel.from_pretrained(folder).eval()
    source = load_file(revisions.default_encoder_folder() / "model.safetensors")
    name = "encoder.layer.5.output.dense.weight"
    assert torch.equal(model.encoder.state_dict()[name], source[name])
    model.save_pretrained(tmp_path)  # with its encoder, so that it works without the package
    again = IQSModel.from_pretrained(tmp_path).eval()
    assert again.config.encoder_source is None
    assert model.config.encoder_source is not None
    found = [m(IDS, MASK, answer_start=STARTS).logits for m in (model, again)]
    assert torch.equal(*found)
