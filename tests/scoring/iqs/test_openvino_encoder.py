"""openvino_encoder.py: int8 hidden states equal the encoder's but for rounding, and serve its own weights only."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher

from car_datasets import IQSModel, QualityScorer
from car_datasets.scoring.inference import TextScores, Weights, load_scorer
from car_datasets.scoring.iqs import openvino_encoder
from car_datasets.scoring.iqs.openvino_encoder import OpenVINOEncoder, pin_engine

pytestmark = pytest.mark.usefixtures("on_cpu")  # the int8 encoder refuses a GPU

COMPANY_TOLERANCE = 1e-5  # as in float32


def batch(rows: int, tokens: int, padded: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 29, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, tokens - padded :] = 0
    return ids, mask


def test_hidden_states_are_the_encoders_but_for_rounding(tiny_iqs: str, tiny_engine: str) -> None:
    encoder = IQSModel.from_pretrained(tiny_iqs).eval().encoder
    for shape in ((1, 7), (4, 30, 5), (2, 48, 40)):
        ids, mask = batch(*shape)
        with torch.inference_mode():
            expected = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = OpenVINOEncoder(tiny_engine)(ids, mask, output_hidden_states=True)
        assert found.last_hidden_state is found.hidden_states[-1]
        assert len(found.hidden_states) == len(expected) == 3
        for ours, theirs in zip(found.hidden_states, expected, strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == torch.float32
            alike = torch.cosine_similarity(ours, theirs, dim=-1)[mask.bool()]
            assert alike.min() > 0.98, alike.min()
        assert not torch.equal(found.hidden_states[-1], expected[-1])  # else nothing was rounded


def test_hidden_states_outlive_the_next_call(tiny_engine: str) -> None:
    encoder = OpenVINOEncoder(tiny_engine)
    first = encoder(*batch(2, 9)).hidden_states[-1]
    kept = first.clone()
    encoder(*batch(2, 9, padded=4))
    assert torch.equal(first, kept)


def score(folder: str, texts: list[str], **options: Any) -> TextScores:
    return QualityScorer(folder, **options).score_texts(texts)


def test_a_score_does_not_depend_on_its_company(tiny_iqs: str, tiny_engine: str) -> None:
    texts = [f"Instruction: write {'the sea ' * (i % 5)} Response: {'good and bad ' * (i * i % 13)}" for i in range(24)]
    alone = score(tiny_iqs, texts, engine=tiny_engine, batch_tokens=1).scores
    for budget in (30, 100, 5000):
        together = score(tiny_iqs, texts, engine=tiny_engine, batch_tokens=budget).scores
        assert np.abs(together - alone).max() < COMPANY_TOLERANCE
    assert np.ptp(alone) > 1000 * COMPANY_TOLERANCE  # else the comparison says nothing


def test_the_engine_is_part_of_the_fingerprint_by_content(tiny_iqs: str, tiny_engine: str, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(tiny_engine, copy)
    plain, before = QualityScorer(tiny_iqs), QualityScorer(tiny_iqs, engine=str(copy))
    assert before.engine_revision == QualityScorer(tiny_iqs, engine=tiny_engine).engine_revision
    assert Hasher.hash(before) != Hasher.hash(plain)
    with (copy / "encoder.bin").open("ab") as file:
        file.write(b"\0")
    after = QualityScorer(tiny_iqs, engine=str(copy))
    assert after.engine_revision != before.engine_revision
    assert Hasher.hash(after) != Hasher.hash(before)


def test_an_engine_for_other_weights_is_refused(make_tiny_iqs: Any, tiny_engine: str) -> None:
    other = make_tiny_iqs(seed=5)
    with pytest.raises(ValueError, match=rf"engine='.*' was made for .* not for {other}.*car-datasets quantise"):
        QualityScorer(other, engine=tiny_engine)


def test_a_folder_that_holds_no_engine_is_refused(tiny_iqs: str, tmp_path: Path) -> None:
    (tmp_path / "encoder.xml").touch()
    with pytest.raises(ValueError, match=r"no encoder\.bin, engine\.json\. Make one"):
        QualityScorer(tiny_iqs, engine=str(tmp_path))


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"model": "x"', "\x00"])
def test_a_damaged_record_is_refused(record: str, tiny_iqs: str, tiny_engine: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_engine, tmp_path / "engine")
    (tmp_path / "engine" / "engine.json").write_text(record)
    with pytest.raises(ValueError, match=r"engine\.json is damaged\. Make the folder again"):
        QualityScorer(tiny_iqs, engine=str(tmp_path / "engine"))


@pytest.mark.parametrize("name", ["encoder.xml", "encoder.bin"])
def test_a_damaged_encoder_is_refused(name: str, tiny_iqs: str, tiny_engine: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_engine, tmp_path / "engine")
    file = tmp_path / "engine" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"encoder\.xml or encoder\.bin is damaged"):
        score(tiny_iqs, ["Instruction: a Response: b"], engine=str(tmp_path / "engine"))


def test_half_precision_with_an_engine_is_refused(tiny_iqs: str, tiny_engine: str) -> None:
    with pytest.raises(ValueError, match="leave out dtype='bfloat16'"):
        QualityScorer(tiny_iqs, engine=tiny_engine, dtype="bfloat16")


def test_compiling_with_an_engine_is_refused(tiny_iqs: str, tiny_engine: str) -> None:
    with pytest.raises(ValueError, match="compile=True"):
        QualityScorer(tiny_iqs, engine=tiny_engine, compile=True)


def test_a_gpu_is_refused_before_weights_are_read() -> None:
    with pytest.raises(ValueError, match=r"engine='int8' runs on the CPU only.*cuda:1"):
        load_scorer(Weights("no/such-model", "", engine="int8", engine_pin=""), torch.device("cuda", 1))


def test_without_the_extra_the_way_to_it_is_named(
    tiny_iqs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = str(QualityScorer(tiny_iqs).revision)
    for name in openvino_encoder.ENGINE_FILES:
        (tmp_path / name).touch()
    (tmp_path / "engine.json").write_text(json.dumps({"revision": revision}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"The int8 encoder needs openvino: pip install 'car-datasets\[openvino\]'"):
        pin_engine(str(tmp_path), tiny_iqs, revision, "float32")


def test_nothing_is_reported_to_anybody(needs_openvino: None) -> None:
    code = """
import socket, sys
from car_datasets.scoring.iqs.openvino_encoder import import_openvino
def refuse(*arguments):
    raise SystemExit(f"a connection: {arguments}")
socket.socket.connect = socket.getaddrinfo = refuse
import_openvino("nncf").convert_model
import nncf
print([name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stderr
