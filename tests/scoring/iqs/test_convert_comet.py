"""Checkpoints of the original's layout: read safely and completely, with the shape and the tokenizer that they were made with."""

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertModel, XLMRobertaConfig, XLMRobertaModel

from car_datasets import IQSConfig, IQSModel, QualityScorer
from car_datasets.scoring.iqs.convert_comet import load_tokenizer, read_checkpoint
from car_datasets.scoring.iqs.modeling_iqs import convert_checkpoint
from car_datasets.utils import digests, revisions
from tests.conftest import save_tokenizer, tiny_encoder_config

ROWS = {"instruction": ["name the sea", "write a list"], "output": ["good and bad", "a, the, of"]}
OPTIONS = {
    "class_identifier": "instruction_metric",
    "encoder_model": "BERT",
    "pretrained_model": "tiny-bert",
    "layer": "mix",
    "layer_transformation": "sparsemax",
    "layer_norm": False,
    "pool": "avg",
    "hidden_sizes": [8, 4],
    "activations": "Tanh",
    "final_activation": None,
    "dropout": 0.1,
}


def lightning_weights(encoder: torch.nn.Module, hidden_sizes: list[int]) -> dict[str, torch.Tensor]:
    """Return a state dict with the original's names."""
    state = {f"encoder.model.{name}": tensor for name, tensor in encoder.state_dict().items()}
    layers, width = encoder.config.num_hidden_layers + 1, encoder.config.hidden_size
    state |= {f"layerwise_attention.scalar_parameters.{i}": torch.randn(1) for i in range(layers)}
    state |= {"layerwise_attention.gamma": torch.tensor([1.3]), "layerwise_attention.dropout_fill": torch.zeros(layers)}
    for place, (n_in, n_out) in enumerate(zip([width, *hidden_sizes], [*hidden_sizes, 1], strict=True)):
        state[f"estimator.ff.{3 * place}.weight"] = torch.randn(n_out, n_in)
        state[f"estimator.ff.{3 * place}.bias"] = torch.randn(n_out)
    return state


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """Make a folder like the original's: `hparams.yaml`, `checkpoints/*.ckpt`; and the folder of the base model."""
    torch.manual_seed(0)
    base = tmp_path / "tiny-bert"
    tiny_encoder_config().save_pretrained(base)
    save_tokenizer(base)
    folder = tmp_path / "instruction_score"
    write(folder, lightning_weights(BertModel(tiny_encoder_config()), [8, 4]), OPTIONS)
    return folder


def write(folder: Path, state: dict[str, Any], options: dict[str, Any]) -> Path:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "hparams.yaml").write_text(json.dumps(options))  # JSON is YAML
    path = folder / "checkpoints" / "epoch=3-step=1016-val_kendall=0.600.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": options, "epoch": 3}, path)
    return path


def change(layout: Path, state: dict[str, Any] | None = None, drop: str | None = None, **options: Any) -> None:
    content = torch.load(next(layout.glob("checkpoints/*.ckpt")), weights_only=True)
    weights = {**content["state_dict"], **(state or {})}
    if drop is not None:
        del weights[drop]
    write(layout, weights, {**OPTIONS, **options})


def test_bert_checkpoint_computes_what_its_weights_say(layout: Path) -> None:
    model = IQSModel.from_pretrained(layout).eval()
    assert model.config.encoder_config.model_type == "bert"
    assert model.config.max_tokens == 60  # 64 positions - 4: the original takes XLM-R's two off for BERT as well
    content = read_checkpoint(next(layout.glob("checkpoints/*.ckpt")))["state_dict"]
    assert torch.equal(model.head[6].weight, content["estimator.ff.6.weight"])
    scalars = [content[f"layerwise_attention.scalar_parameters.{i}"] for i in range(3)]
    assert torch.equal(model.layers.weight, torch.cat(scalars))


@pytest.mark.parametrize("name", ["", "checkpoints", "checkpoints/epoch=3-step=1016-val_kendall=0.600.ckpt", ".."])
def test_every_way_to_name_it_gives_the_same_scores(layout: Path, name: str) -> None:
    expected = QualityScorer(str(layout))(ROWS)["iqs_score"]
    assert QualityScorer(str(layout / name))(ROWS)["iqs_score"] == pytest.approx(expected, abs=1e-6)


def test_converted_folder_is_an_ordinary_model(layout: Path, tmp_path: Path) -> None:
    convert_checkpoint(layout, tmp_path / "out")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    checkpoint = next(layout.glob("checkpoints/*.ckpt"))
    assert digests.file_digest(checkpoint) in card and checkpoint.name in card
    assert "license" not in card.split("---")[1] and str(tmp_path) not in card
    shutil.rmtree(tmp_path / "tiny-bert")  # nothing of the original is needed any more
    expected = QualityScorer(str(tmp_path / "out"))(ROWS)["iqs_score"]
    shutil.rmtree(layout)
    assert QualityScorer(str(tmp_path / "out"))(ROWS)["iqs_score"] == expected
    with pytest.raises(ValueError, match="exists already"):
        convert_checkpoint(tmp_path / "out", tmp_path / "out")


def test_a_pickle_that_runs_code_is_refused(layout: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {marker}",)

    path = next(layout.glob("checkpoints/*.ckpt"))
    content = torch.load(path, weights_only=True)
    torch.save({**content, "callbacks": Payload()}, path)
    with pytest.raises(ValueError, match=r"was refused.*system"):
        IQSModel.from_pretrained(layout)
    with pytest.raises(ValueError, match="was refused"):
        QualityScorer(str(layout))
    path.write_bytes(
        pickle.dumps({"state_dict": {}, "hyper_parameters": Payload()})
    )  # the old format, without a zip file
    with pytest.raises(ValueError, match="was refused"):
        IQSModel.from_pretrained(layout)
    assert not marker.exists()
    torch.load(_zip_with(Payload(), tmp_path), weights_only=False)  # the payload is real: loaded carelessly, it runs
    assert marker.exists()


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda w: w.to(torch.complex64), lambda w: w.to("meta")])
def test_weights_that_are_no_plain_numbers_are_refused(layout: Path, change: Any) -> None:
    path = next(layout.glob("checkpoints/*.ckpt"))
    content = torch.load(path, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = change(content["state_dict"][name])
    torch.save(content, path)
    with pytest.raises(ValueError, match="are sparse, complex, quantised") as error:
        IQSModel.from_pretrained(layout)
    assert str(path) in str(error.value)


def _zip_with(payload: Any, folder: Path) -> Path:
    torch.save(payload, folder / "careless.ckpt")
    return folder / "careless.ckpt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": "estimator.ff.3.bias"}, r"do not fit.*missing.*head\.3\.bias"),
        ({"drop": "layerwise_attention.scalar_parameters.1"}, "some are missing"),
        ({"drop": "encoder.model.encoder.layer.1.output.dense.weight"}, "do not fit.*missing"),
        ({"drop": "encoder.model.embeddings.word_embeddings.weight"}, "lacks the weight.*word_embeddings"),
        ({"state": {"estimator.ff.9.weight": torch.zeros(1, 1)}}, r"do not fit.*unexpected.*head\.9"),
        ({"state": {"classifier.weight": torch.zeros(1)}}, "no model of CaR has.*classifier.weight"),
        ({"state": {"estimator.ff.0.weight": torch.zeros(8, 31)}}, r"do not fit.*mismatched.*head\.0"),
        ({"class_identifier": "referenceless_metric"}, "class_identifier='referenceless_metric'"),
        ({"encoder_model": "RemBERT"}, "encoder_model='RemBERT'"),
        ({"pool": "median"}, "pooling='median'"),
        ({"activations": "relu"}, "activation='Relu'"),
        ({"layer": 7}, "layer=7; the encoder has the hidden states 0 to 2"),
        ({"pretrained_model": "elsewhere"}, "number of attention heads.*--tokenizer"),
        ({"drop": "layerwise_attention.gamma"}, "lacks the weight 'layerwise_attention.gamma'"),
        ({"hidden_sizes": None}, "hidden_sizes=None must be a list or tuple"),
        ({"hidden_sizes": ["8"]}, "must be a list of widths"),
        ({"layer": "top"}, "layer='top' must be 'mix' or the number"),
        ({"layer_norm": "false"}, "layer_norm='false' must be a bool"),
        ({"dropout": None}, "dropout=None must be a float or int"),
        ({"encoder_model": ["BERT"]}, r"encoder_model=\['BERT'\]"),
        ({"state": {"estimator.ff.0.bias": "text"}}, "not named tensors"),
    ],
)
def test_what_does_not_fit_is_named(layout: Path, changes: dict[str, Any], message: str) -> None:
    change(layout, **changes)
    with pytest.raises(ValueError, match=message):
        IQSModel.from_pretrained(layout)


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']", "a: [1", "!!python/tuple [1]"])
def test_hparams_that_are_no_plain_yaml_are_refused(layout: Path, text: str) -> None:
    (layout / "hparams.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"hparams\.yaml is not plain YAML"):
        IQSModel.from_pretrained(layout)


def test_hparams_of_another_class_are_refused(layout: Path) -> None:
    (layout / "hparams.yaml").write_text("class_identifier: instruction_ranking_metric")
    with pytest.raises(ValueError, match="Make them agree"):
        IQSModel.from_pretrained(layout)


def test_a_tokenizer_of_another_model_is_refused(layout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "tiny-bert", other)
    content = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["vocab"] |= {f"word{i}": 100 + i for i in range(60)}  # more tokens than the encoder has
    (other / "tokenizer.json").write_text(json.dumps(content))
    for load in (
        lambda: QualityScorer(str(layout), tokenizer=str(other))(ROWS),
        lambda: convert_to(layout, other, tmp_path),
    ):
        with pytest.raises(ValueError, match="is not the encoder's"):
            load()


def convert_to(layout: Path, tokenizer: Path, tmp_path: Path) -> None:
    convert_checkpoint(layout, tmp_path / "out", str(tokenizer))


def test_a_tokenizer_replaced_in_place_is_another_fingerprint(layout: Path, tmp_path: Path) -> None:
    before = QualityScorer(str(layout))
    scores = before(ROWS)["iqs_score"]
    file = tmp_path / "tiny-bert" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    file.write_text(json.dumps(content))
    after = QualityScorer(str(layout))
    assert Hasher.hash(before) != Hasher.hash(after)
    assert after(ROWS)["iqs_score"][0] != scores[0]


def test_the_ranking_variant_alone_or_by_name_in_a_folder_of_folders(layout: Path, tmp_path: Path) -> None:
    both = tmp_path / "instruction_comet"
    content = read_checkpoint(next(layout.glob("checkpoints/*.ckpt")))
    plain = {k: v for k, v in content["state_dict"].items() if not k.startswith("estimator")}
    write(both, plain, {**content["hyper_parameters"], "class_identifier": "instruction_ranking_metric"})
    assert QualityScorer(str(tmp_path)).objective == "regression"
    assert QualityScorer(str(both)).objective == "ranking"
    shutil.rmtree(layout)
    assert QualityScorer(str(tmp_path)).objective == "ranking"


def test_another_base_models_folder_is_refused(layout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    XLMRobertaConfig(hidden_size=48, num_attention_heads=4).save_pretrained(other)
    with pytest.raises(ValueError, match=r"other is not the base model.*hidden_size"):
        IQSModel.from_pretrained(layout, tokenizer=str(other))


def test_no_tokenizer_says_what_to_pass(layout: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny-bert" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"bring no tokenizer.*--tokenizer"):
        QualityScorer(str(layout), tokenizer=str(tmp_path / "tiny-bert"))(ROWS)


def test_two_checkpoints_are_not_guessed_between(layout: Path) -> None:
    path = next(layout.glob("checkpoints/*.ckpt"))
    shutil.copy(path, path.with_name("epoch=2.ckpt"))
    with pytest.raises(ValueError, match="contains 2 checkpoints"):
        IQSModel.from_pretrained(layout)
    assert IQSModel.from_pretrained(path) is not None


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_checkpoint_is_named(layout: Path, content: bytes) -> None:
    next(layout.glob("checkpoints/*.ckpt")).write_bytes(content)
    with pytest.raises(ValueError, match=r"\.ckpt"):
        IQSModel.from_pretrained(layout)


def test_weights_replaced_in_place_are_another_revision(layout: Path) -> None:
    before = revisions.pin_revision(str(layout))
    change(layout, {"estimator.ff.6.bias": torch.ones(1)})
    assert revisions.pin_revision(str(layout)) != before


def test_a_checkpoint_is_unpickled_once_and_its_model_does_not_need_the_file(
    layout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    ordinary = torch.load

    def watched(path: Path, **options: Any) -> Any:
        read.append(path)
        return ordinary(path, **options)

    monkeypatch.setattr(torch, "load", watched)
    scorer = QualityScorer(str(layout))
    again = replace(scorer, output_column="again_score")
    assert (again.objective, again.revision, again.tokenizer_revision) == (
        "regression",
        scorer.revision,
        scorer.tokenizer_revision,
    )
    expected = scorer(ROWS)["iqs_score"]
    assert len(read) == 1
    file = next(layout.glob("checkpoints/*.ckpt"))
    file.write_bytes(b"")  # a weight that were still mapped from the file would end this process
    assert again(ROWS)["again_score"] == expected


def test_options_can_be_changed_on_loading(layout: Path) -> None:
    assert IQSModel.from_pretrained(layout, pooling="max").config.pooling == "max"


@pytest.mark.shared
@pytest.mark.parametrize("form", ["as the hub has it", "as older converters wrote it"])
def test_token_ids_are_those_of_the_file(form: str, shared: Path, tmp_path: Path) -> None:
    """Compare them, because transformers 5 ignores the file's normaliser and pre-tokeniser for XLM-RoBERTa."""
    source = shared / "oracle" / "tiny-xlmr"
    content = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    if form == "as older converters wrote it":
        squeeze = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
        content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], squeeze]}
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", base)
    shutil.copy(source / "config.json", base)
    probes = [
        "a",
        "two  spaces ",
        " lead",
        "trail ",
        "tab\tnew\nline",
        "<pad> <s> </s> <mask>",
        "é ﬁ Ⅳ",
        "日本語",
        "😀",
        "",
    ]
    probes += [json.loads(line)["output"] for line in (shared / "oracle" / "inputs.jsonl").read_text().splitlines()]
    expected = [e.ids for e in Tokenizer.from_file(str(base / "tokenizer.json")).encode_batch(probes)]
    assert load_tokenizer(str(base))(probes)["input_ids"] == expected
    convert_checkpoint(shared / "oracle" / "instruction_score", tmp_path / "out", str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(probes)["input_ids"] == expected


def test_a_ranking_model_needs_both_texts(layout: Path) -> None:
    change(layout, class_identifier="instruction_ranking_metric")
    content = read_checkpoint(next(layout.glob("checkpoints/*.ckpt")))
    plain = {k: v for k, v in content["state_dict"].items() if not k.startswith("estimator")}
    write(layout, plain, content["hyper_parameters"])
    scorer = QualityScorer(str(layout), diagnostics=True)
    found = scorer(ROWS)
    assert all(0 < score < 1 for score in found["iqs_score"])
    apart = [scorer({c: [v] for c, v in zip(ROWS, values, strict=True)}) for values in zip(*ROWS.values(), strict=True)]
    assert [one["iqs_score"][0] for one in apart] == pytest.approx(found["iqs_score"], abs=1e-6)
    with pytest.raises(ValueError, match="question"):
        scorer.score_texts(["Instruction: a Response: b"])
    with pytest.raises(ValueError, match="question_ids"):
        IQSModel.from_pretrained(layout)(torch.tensor([[2, 5, 3]]))


def test_xlmr_positions_start_after_the_pad_id() -> None:
    """Score a text with a literal pad token, which shifts positions in the original."""
    encoder = XLMRobertaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = IQSModel(IQSConfig(encoder_config=encoder, hidden_sizes=[])).eval()
    ids = torch.tensor([[0, 5, 1, 6, 2]])
    bare = XLMRobertaModel(encoder, add_pooling_layer=False).eval()
    bare.load_state_dict(model.encoder.state_dict())
    expected = bare(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert torch.allclose(model(ids).hidden_states[-1], expected)


def test_a_checkpoint_is_never_larger_in_memory_than_its_file(tmp_path: Path) -> None:
    path = tmp_path / "small.ckpt"
    options: dict[str, Any] = {"hyper_parameters": {}}
    torch.save({"state_dict": {"weight": torch.zeros(1).expand(10**9, 10**6)}, **options}, path)
    with pytest.raises(ValueError, match="its weights would take 4,000,000,000,000,000 bytes"):
        read_checkpoint(path)
    torch.save({"state_dict": {"weight": torch.zeros(10**6)}, **options}, path)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"it would unpack to 4,\d{3},\d{3} bytes, more than its size"):
        read_checkpoint(tmp_path / "packed.ckpt")


@pytest.mark.parametrize("name", OPTIONS)
def test_lists_in_lists_do_not_make_a_message_grow(name: str, layout: Path, tmp_path: Path) -> None:
    value: Any = [1]
    for _ in range(60):  # written out, 2**60 numbers
        value = [value, value]
    path = next(layout.glob("checkpoints/*.ckpt"))
    torch.save({"state_dict": {}, "hyper_parameters": {**OPTIONS, name: value}}, path)
    with pytest.raises(ValueError, match=f"the hyper-parameter {name} is a list") as refused:
        convert_checkpoint(layout, tmp_path / "out")
    assert len(str(refused.value)) < 1_000
