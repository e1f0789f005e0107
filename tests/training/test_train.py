"""`car-datasets train` on the real Trainer: it learns, repeats itself, survives a kill, agrees with itself over processes."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig

from car_datasets import IQSModel, QualityScorer
from car_datasets.loading.templates import Text, render
from car_datasets.training.evaluation import pair_metrics
from car_datasets.training.pairs import read_pairs
from car_datasets.training.train import ScorerTraining, build_model, train_scorer
from car_datasets.training.trainer import last_whole_checkpoint, parameter_groups
from car_datasets.utils import digests, files, hub, revisions
from car_datasets.utils.files import write_folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random BERT of two layers with the default encoder's words."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(revisions.default_encoder_folder()).save_pretrained(folder)
    return folder


def write_scores(path: Path, pairs: int, start: int) -> Path:
    """Return made-up pairs with something to learn: the better answer gives a reason."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["src", "score"])
        for i in range(start, start + pairs):
            question = f"Instruction: Is {i} an even number? Response: "
            writer.writerow([f"{question}{'yes' if i % 2 == 0 else 'no'}", 0])
            writer.writerow(
                [f"{question}because dividing {i} by two leaves {'nothing' if i % 2 == 0 else 'one'} over.", 1]
            )
    return path


def write_triples(path: Path, pairs: int, start: int) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["src", "pos", "neg"])
        for i in range(start, start + pairs):
            writer.writerow([f"Instruction: Is {i} even? ", f"Response: because {i} halves", f"Response: {i} yes"])
    return path


@pytest.fixture
def settings(encoder: Path, tmp_path: Path) -> ScorerTraining:
    return ScorerTraining(
        encoder=str(encoder),
        train=str(write_scores(tmp_path / "train.csv", 24, 0)),
        valid=str(write_scores(tmp_path / "valid.csv", 8, 100)),
        output=str(tmp_path / "out"),
        hidden_sizes=[16],
        max_tokens=64,
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        epochs=2,
        batch_size=4,
        mixed_precision="no",
    )


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("kind", ["iqs", "ranking"])
def test_a_trained_folder_is_a_scorer(
    settings: ScorerTraining,
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("car_datasets.training.trainer.tqdm", tqdm)  # that of datasets is disabled in tests
    settings = settings.changed(kind=kind, epochs=4, accumulation=1, keep_embeddings_frozen=False)
    if kind == "ranking":
        settings = settings.changed(train=str(write_triples(tmp_path / "t.csv", 24, 0)))
        settings = settings.changed(valid=str(write_triples(tmp_path / "v.csv", 8, 100)))
    figures = train_scorer(settings)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(r"Training: .*/\d+ \[.*kendall=", printed.err)  # it may stop early
    assert "Validating: " in printed.err
    assert figures["best_kendall"] > 0.5
    assert figures["accuracy"]["cleaned"]["pairs"]["value"] == 1.0
    scorer = QualityScorer(settings.output)
    pairs = read_pairs(settings.valid)
    halves = [scorer.score_texts([render(row) for row in half]).scores for half in zip(*pairs, strict=True)]
    assert pair_metrics(*halves)["pairs"] == 1.0
    card = (Path(settings.output) / "README.md").read_text(encoding="utf-8")
    assert f"kind: {kind}" in card
    assert "100.0 % (100.0 to 100.0)" in card
    template = hub.card_templates().get_template("trained_scorer_card.md.jinja")
    # In memory, figures of no rows are NaN; only in the file are they null.
    measured = json.loads((Path(settings.output) / "figures.json").read_text().replace("null", "NaN"))
    unknown = template.render(settings=settings, figures={**measured, "best_kendall": None}, base_model=None)
    assert "validation pairs was kept" in unknown
    assert not Path(f"{settings.output}.checkpoints").exists()


@pytest.mark.slow
def test_either_file_format_trains_either_kind(settings: ScorerTraining, tmp_path: Path) -> None:
    triples = settings.changed(
        train=str(write_triples(tmp_path / "t.csv", 8, 0)),
        valid=str(write_triples(tmp_path / "v.csv", 4, 100)),
        epochs=1,
    )
    assert train_scorer(triples.changed(output=str(tmp_path / "iqs")))["examples"] == 16
    assert train_scorer(settings.changed(kind="ranking", epochs=1))["examples"] == 24


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights(settings: ScorerTraining, tmp_path: Path) -> None:
    found = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        train_scorer(settings.changed(output=str(tmp_path / name), seed=seed))
        found.append(digests.file_digest(tmp_path / name / "model.safetensors"))
    assert found[0] == found[1] != found[2]


def test_frozen_parts_stand_still_and_the_others_learn(settings: ScorerTraining, encoder: Path, tmp_path: Path) -> None:
    before = {f"encoder.{name}": tensor for name, tensor in load_file(encoder / "model.safetensors").items()}
    train_scorer(settings.changed(output=str(tmp_path / "frozen"), frozen_epochs=9.0))
    train_scorer(settings)
    frozen, thawed = weights_of(tmp_path / "frozen"), weights_of(settings.output)
    for name in frozen:
        if name.startswith("encoder."):
            assert torch.equal(frozen[name], before[name]), name
            assert torch.equal(thawed[name], before[name]) == name.startswith("encoder.embeddings."), name
    assert not torch.equal(frozen["head.0.weight"], thawed["head.0.weight"])


def test_the_encoder_thaws_in_the_middle_of_an_epoch(settings: ScorerTraining, tmp_path: Path) -> None:
    # 48 rows in batches of 4, two a step, are 6 steps: frozen for 5.9 of them is frozen for 6, so nothing moves.
    one = settings.changed(epochs=1)
    train_scorer(one.changed(output=str(tmp_path / "late"), frozen_epochs=5.9 / 6))
    train_scorer(one.changed(output=str(tmp_path / "last_step"), frozen_epochs=4.9 / 6))
    name = "encoder.encoder.layer.1.output.dense.weight"
    start = load_file(Path(settings.encoder) / "model.safetensors")[name.removeprefix("encoder.")]
    assert torch.equal(weights_of(tmp_path / "late")[name], start)
    moved = (weights_of(tmp_path / "last_step")[name] - start).abs().max().item()
    assert 0 < moved < 2.1e-3  # one AdamW step at 1e-3


def test_rates_fall_from_the_top_layer_down(encoder: Path, settings: ScorerTraining) -> None:
    model, _ = build_model(settings)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {}
    for group in parameter_groups(model, 1e-2, 1e-4, 0.5, keep_embeddings_frozen=False):
        rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert set(rates) == set(names.values())
    assert rates["head.0.weight"] == rates["layers.weight"] == 1e-2
    assert rates["encoder.encoder.layer.1.output.dense.weight"] == 1e-4
    assert rates["encoder.encoder.layer.0.output.dense.weight"] == 5e-5
    assert rates["encoder.embeddings.word_embeddings.weight"] == 2.5e-5
    frozen = parameter_groups(model, 1e-2, 1e-4, 0.5)
    assert not any(names[id(p)].startswith("encoder.embeddings.") for group in frozen for p in group["params"])


def command(settings: ScorerTraining, folder: Path) -> list[str]:
    file = folder / "training.yaml"
    file.write_text(settings.to_yaml(), encoding="utf-8")
    return ["-m", "car_datasets", "train", str(file)]


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")  # the gradients of embeddings are added by atomics on a GPU, in an order that varies
def test_killed_and_run_again_it_ends_with_the_same_weights(settings: ScorerTraining, tmp_path: Path) -> None:
    # Each run is a process of its own, as a user's is: the number of threads moves the last bit of a sum.
    long = settings.changed(epochs=6, patience=9, train=str(write_scores(tmp_path / "more.csv", 96, 0)))
    long = long.changed(valid=str(write_scores(tmp_path / "other.csv", 8, 200)))
    subprocess.run([sys.executable, *command(long.changed(output=str(tmp_path / "whole")), tmp_path)], check=True)
    checkpoints = Path(f"{long.output}.checkpoints")
    running = subprocess.Popen([sys.executable, *command(long, tmp_path)])
    while last_whole_checkpoint(checkpoints) is None:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not Path(long.output).exists()
    half = checkpoints / "checkpoint-9999"  # as if killed while writing the next one
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="unfinished run with another seed"):
        train_scorer(long.changed(seed=7))
    subprocess.run([sys.executable, *command(long, tmp_path)], check=True)
    for name, tensor in weights_of(tmp_path / "whole").items():
        assert torch.equal(tensor, weights_of(long.output)[name]), name


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")  # NCCL refuses two processes on one GPU
def test_two_processes_end_where_one_does(settings: ScorerTraining, encoder: Path, tmp_path: Path) -> None:
    still = tmp_path / "encoder"  # dropout is another in each process
    shutil.copytree(encoder, still)
    config = json.loads((still / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plain = settings.changed(dropout=0.0, encoder=str(still))
    train_scorer(plain.changed(output=str(tmp_path / "one")))
    two = plain.changed(accumulation=1)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, *command(two, tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("The model is in") == 1
    one, both = weights_of(tmp_path / "one"), weights_of(two.output)
    for name in one:
        if not name.endswith("key.bias"):  # its gradient is zero but for rounding, which AdamW scales up
            assert torch.allclose(one[name], both[name], atol=1e-4), name


def test_what_was_written_but_not_pushed_is_not_trained_again(
    settings: ScorerTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[Path, str]] = []

    def refuse(folder: Path, repo_id: str, token: str | None, private: bool) -> None:
        pushed.append((folder, repo_id))
        if len(pushed) == 1:
            raise ValueError("the line is dead")

    monkeypatch.setattr(hub, "open_repository", lambda repo_id, private, token: None)
    monkeypatch.setattr(hub, "push_folder", refuse)
    pushing = settings.changed(epochs=1, push_to="me/scorer")
    with pytest.raises(ValueError, match="the line is dead"):
        train_scorer(pushing)
    before = digests.file_digest(Path(settings.output) / "model.safetensors")
    figures = train_scorer(pushing)
    assert figures["pairs"] == 8
    assert pushed == [(Path(settings.output), "me/scorer")] * 2
    assert digests.file_digest(Path(settings.output) / "model.safetensors") == before
    assert str(Path(settings.train).parent) not in (Path(settings.output) / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="already exists"):
        train_scorer(pushing)


def test_a_run_that_had_lost_patience_trains_no_further(
    settings: ScorerTraining, monkeypatch: pytest.MonkeyPatch
) -> None:
    from car_datasets.training import train

    stuck = settings.changed(epochs=5, patience=1, learning_rate=0.0, encoder_learning_rate=0.0)
    write = train._write
    monkeypatch.setattr(train, "_write", lambda *arguments: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError, match="killed here"):
        train_scorer(stuck)
    monkeypatch.setattr(train, "_write", write)
    steps = last_whole_checkpoint(Path(f"{settings.output}.checkpoints"))
    seen: list[int] = []
    monkeypatch.setattr(train, "_write", lambda *arguments: (seen.append(1), write(*arguments)))
    monkeypatch.setattr(train.shutil, "rmtree", lambda *arguments, **options: None)
    train_scorer(stuck)
    assert seen == [1]
    assert last_whole_checkpoint(Path(f"{settings.output}.checkpoints")) == steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "comet"}, r"kind='comet' is not known; choose one of \['iqs', 'ranking'\]"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"hidden_sizes": 16}, "hidden_sizes=16 must be of the type"),
        ({"leraning_rate": 1.0}, "did you mean 'learning_rate'"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' is not known"),
        ({"template": "papers"}, "template='papers' is not known"),
        ({"layerwise_decay": float("nan")}, "layerwise_decay=nan must be at least 0 and at most 1"),
        ({"warmup_steps": -5}, "warmup_steps=-5 must be at least 0"),
        ({"hidden_sizes": ["a"]}, "must be a list of positive integers"),
    ],
)
def test_a_bad_setting_is_named(settings: ScorerTraining, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.changed(**changes)


@pytest.mark.usefixtures("on_cpu")
def test_half_precision_without_a_gpu_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="--set mixed_precision=no"):
        train_scorer(ScorerTraining())


def test_bad_input_ends_before_training(settings: ScorerTraining, tmp_path: Path) -> None:
    crossing = str(write_scores(tmp_path / "crossing.csv", 4, 102))
    one_class = tmp_path / "one_class.csv"
    one_class.write_text("src,score\nInstruction: a Response: b,1\nInstruction: c Response: d,1\n")
    (tmp_path / "taken").mkdir()
    decoder = tmp_path / "decoder"
    decoder.mkdir()
    (decoder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    roberta = tmp_path / "roberta"
    roberta.mkdir()
    content = {"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 1}
    (roberta / "config.json").write_text(json.dumps(content))
    for changes, message in (
        ({"train": crossing}, "The split crosses"),
        ({"train": str(one_class)}, "one class only"),
        ({"valid": str(one_class)}, "same score"),
        ({"output": str(tmp_path / "taken")}, "already exists"),
        ({"encoder": str(revisions.default_scorer_folder())}, "is a 'car_iqs' model, not a plain encoder"),
        ({"encoder": str(decoder)}, "is a 't5' model, not a plain encoder"),
        ({"max_tokens": 9999}, "has 512 positions"),
        ({"encoder": str(roberta), "max_tokens": 33}, "has 32 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            train_scorer(settings.changed(**changes))
    assert not Path(f"{settings.output}.checkpoints").exists()


def test_a_roberta_without_padding_token_is_refused(settings: ScorerTraining, encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "roberta")
    config = {**RobertaConfig(num_hidden_layers=1).to_dict(), "pad_token_id": None}
    (tmp_path / "roberta" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match="has no padding token"):
        build_model(settings.changed(encoder=str(tmp_path / "roberta")))


def test_a_half_precision_encoder_is_trained_in_full(settings: ScorerTraining, encoder: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    BertModel.from_pretrained(encoder).half().save_pretrained(half)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(half)
    model, _ = build_model(settings.changed(encoder=str(half)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_encoder_with_other_weights_than_its_configuration_is_refused(
    settings: ScorerTraining, encoder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in encoder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(encoder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "layer.1.output" not in n}, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights.*layer\.1"):
        train_scorer(settings.changed(encoder=str(broken)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "no such type"}'),
        ("config.json", b'{"model_type": "bert", "hidden_size": 4800000, "vocab_size": 4000000}'),
        ("model.safetensors", b"\x10" * 40),
        ("tokenizer.json", b'{"model": 7}'),
    ],
)
def test_a_damaged_encoder_is_said_in_one_line(
    name: str, content: bytes, settings: ScorerTraining, encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder, tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"^The model in .*damaged cannot be loaded: .*Download or save") as error:
        build_model(settings.changed(encoder=str(tmp_path / "damaged")))
    assert "\n" not in str(error.value)


def test_the_shipped_files_carry_the_originals_settings() -> None:
    iqs = ScorerTraining.from_yaml(files.data_folder("configs") / "train_iqs_xlmr_large.yaml")
    assert iqs == ScorerTraining()
    ranking = ScorerTraining.from_yaml(files.data_folder("configs") / "train_ranking_xlmr_large.yaml")
    assert ranking == ScorerTraining(
        kind="ranking",
        train="expert_rank_train.csv",
        valid="expert_rank_valid.csv",
        output="ranking-xlmr-large",
        batch_size=4,
    )


def test_the_last_whole_checkpoint_is_the_one_with_most_steps(tmp_path: Path) -> None:
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"glob')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path / "none") is None


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "left").write_text("by a run that was killed")
    with pytest.raises(OSError, match="disk full"), write_folder(tmp_path / "out") as partial:
        (partial / "one").write_text("1")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []
    with write_folder(tmp_path / "out") as partial:
        (partial / "deeper").mkdir()
        (partial / "deeper" / "one").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "deeper", "one"]


@pytest.mark.slow
@pytest.mark.shared
def test_a_tiny_model_learns_from_real_expert_pairs(encoder: Path, shared: Path, tmp_path: Path) -> None:
    settings = ScorerTraining(
        encoder=str(encoder),
        train=str(shared / "data" / "expert_score_train.csv"),
        valid=str(shared / "data" / "expert_score_valid.csv"),
        output=str(tmp_path / "out"),
        hidden_sizes=[32],
        max_tokens=96,
        learning_rate=2e-3,
        encoder_learning_rate=2e-3,
        keep_embeddings_frozen=False,
        epochs=1,
        batch_size=32,
        accumulation=1,
        mixed_precision="no",
    )
    found = train_scorer(settings)["accuracy"]["cleaned"]
    assert found["pairs"]["low"] > 0.7
    assert found["auc"]["low"] > 0.6
    text = Text("Instruction: Name a colour.", "Response: Blue.")
    assert IQSModel.from_pretrained(settings.output).config.template == "clean-1"
    assert QualityScorer(settings.output).score_texts([text]).scores.shape == (1,)
