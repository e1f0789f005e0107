"""Scorers pushed, loaded and pinned, and the errors where that fails: real clients, and a Hub on this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub

START = """
import json, sys
from car_datasets import IQSModel, QualityScorer
from car_datasets.utils import revisions
revisions.READING_WAITS = (0.1, 0.1)
def caught(call, *arguments, **options):
    try:
        return call(*arguments, **options)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
"""


def said(hub: Hub, code: str, *arguments: object, **options: Any) -> Any:
    """Run the code, and return what it prints last, as JSON."""
    return json.loads(hub.run(START + code, *arguments, check=True, **options).stdout.splitlines()[-1])


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.slow
def test_a_model_comes_back_as_it_went(hub: Hub, tiny_iqs: str) -> None:
    code = """
import torch
model = IQSModel.from_pretrained(sys.argv[1])
model.push_to_hub("me/iqs")
again = IQSModel.from_pretrained("me/iqs")
pairs = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
from transformers import AutoModel
equal = all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
print(json.dumps([equal, type(AutoModel.from_pretrained("me/iqs")).__name__]))
"""
    assert said(hub, code, tiny_iqs) == [True, "IQSModel"]
    stored = hub.repo("me/iqs", kind="models")
    assert stored is not None and stored.private
    assert {name for name in stored.files() if name.split(".")[-1] in ("bin", "pt", "safetensors")} == {
        "model.safetensors"
    }
    assert stored.files()["model.safetensors"] == (Path(tiny_iqs) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_embedded_head_alone_can_be_pushed(hub: Hub) -> None:
    from car_datasets.utils.revisions import default_scorer_folder

    hub.commit("me/head", files_of(default_scorer_folder()), kind="models")
    code = """
row = {"instruction": ["Name a colour."], "output": ["Red."]}
model = IQSModel.from_pretrained("me/head")
print(json.dumps([float(s(row)["iqs_score"][0]) for s in (QualityScorer("me/head"), QualityScorer())]))
"""
    pushed, embedded = said(hub, code)
    assert pushed == pytest.approx(embedded, abs=1e-6)


@pytest.mark.slow
def test_a_scorer_is_pinned_to_the_commit_that_it_found(hub: Hub, make_tiny_iqs: Any) -> None:
    first = hub.commit("team/iqs", files_of(make_tiny_iqs(seed=11)), kind="models", private=True)
    code = """
from datasets import Dataset
rows = Dataset.from_dict({"instruction": ["Name a colour."] * 3, "output": ["Red.", "the sea", "a list"]})
def score(revision):
    scorer = QualityScorer("team/iqs", revision)
    assert QualityScorer("team/iqs", scorer.revision) == scorer
    return [scorer.revision, rows.map(scorer, batched=True)["iqs_score"][:]]
print(json.dumps([caught(score, revision or None) for revision in sys.argv[1:]]))
"""
    [[revision, scores]] = said(hub, code, "")
    assert revision == first
    second = hub.commit("team/iqs", files_of(make_tiny_iqs(seed=12)), kind="models")
    third = hub.commit("team/iqs", files_of(make_tiny_iqs(seed=11)), kind="models", branch="v1")
    newest, pinned, branch = said(hub, code, "", first, "v1")
    assert newest[0] == second and newest[1] != scores  # not what the cache held
    assert pinned == [first, scores] and branch == [third, scores]
    # Without the Hub a commit that is here already is enough; a name is not.
    hub.fault("GET|HEAD", "/", times=-1, kind="drop")
    pinned, message = said(hub, code, first, "main")
    assert pinned == [first, scores]
    assert message.startswith("ConnectionError: model_id='team/iqs': the Hub could not be asked")
    assert "revision=<its 40-digit commit>" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "revision", "token", "message"),
    [
        ("you/hidden", None, "hf_me_writes", "ValueError: model_id='you/hidden' is neither a local folder nor a model on"),
        ("you/hidden", None, None, "log in with `hf auth login`"),
        ("me/nothing", None, "hf_me_writes", "Check the spelling; for a private model pass token=... or log in"),
        ("you/open", "v9", "hf_me_writes", "model_id='you/open' has no revision 'v9'. Name a branch, a tag or a commit"),
        ("you/open", "0" * 40, "hf_me_writes", "has no revision"),
        ("you/open", None, "hf_wrong", "ValueError: model_id='you/open': the Hub does not know your token (401). HF_TOKEN"),
        ("you/pickled", None, "hf_me_writes", "has no safetensors (it has ['.gitattributes', 'config.json', 'pytorch"),
        ("you/x y", None, "hf_me_writes", "nor a Hub id of the form 'owner/name'"),
    ],
)  # fmt: skip
def test_what_cannot_be_loaded_says_what_to_do(
    hub: Hub, tiny_iqs: str, name: str, revision: str | None, token: str | None, message: str
) -> None:
    hub.commit("you/hidden", files_of(tiny_iqs), kind="models", private=True)
    hub.commit("you/open", files_of(tiny_iqs), kind="models")
    pickled = {"config.json": (Path(tiny_iqs) / "config.json").read_bytes(), "pytorch_model.bin": b"cos\nsystem\n."}
    hub.commit("you/pickled", pickled, kind="models")
    code = """
name, revision = json.loads(sys.argv[1])
print(json.dumps([caught(QualityScorer, name, revision), caught(IQSModel.from_pretrained, name, revision=revision)]))
"""
    for seen in said(hub, code, json.dumps([name, revision]), token=token):
        assert message in seen


@pytest.mark.slow
def test_no_code_of_a_repository_is_fetched(hub: Hub, tiny_embedder: str) -> None:
    root = Path(tiny_embedder)
    files = {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}
    code = {"evil.py": b"raise SystemExit(7)", "1_Pooling/evil.py": b"raise SystemExit(7)"}
    hub.commit("you/plain", {**files, **code}, kind="models")
    hub.commit("you/evil", {**files, **code, "modules.json": b'[{"type": "evil.Module", "path": ""}]'}, kind="models")
    script = """
from car_datasets import TextEmbedder
found = [caught(lambda: TextEmbedder(name).embed_texts(["a list"]).shape) for name in ("you/plain", "you/evil")]
print(json.dumps(found))
"""
    shape, message = said(hub, script)
    assert shape == [1, 32]
    assert "modules.json names Python code" in message
    assert not [row for row in hub.log() if row["path"].endswith(".py")]


@pytest.mark.slow
def test_a_hub_that_goes_down_in_the_middle(hub: Hub, tiny_iqs: str) -> None:
    commit = hub.commit("you/open", files_of(tiny_iqs), kind="models")
    hub.fault("GET", f"/api/models/you/open/revision/{commit}", times=-1, status=503)
    hub.fault("GET", f"/api/models/you/open/tree/{commit}", times=-1, status=503)
    hub.fault("GET", "/large/", times=-1, kind="drop")
    code = """
import time
time.sleep = lambda seconds: None  # the client's own waits
print(json.dumps(caught(QualityScorer, "you/open")))
"""
    message = said(hub, code)
    assert message.startswith("ConnectionError: model_id='you/open': the Hub could not be asked")
    assert "Run the same again" in message
    hub.mend()
    assert said(hub, "print(json.dumps(QualityScorer('you/open').revision))") == commit


@pytest.mark.slow
def test_a_token_that_is_passed_is_used_and_kept_nowhere(hub: Hub, tiny_iqs: str, tmp_path: Path) -> None:
    hub.commit("you/hidden", files_of(tiny_iqs), kind="models", private=True)
    shutil.copytree(tiny_iqs, tmp_path / "copy")
    code = """
import logging, pickle, traceback
logging.basicConfig(level=logging.DEBUG)
from huggingface_hub.utils import logging as hub_logging
hub_logging.set_verbosity_debug()
token = "".join(reversed(sys.argv[1]))  # else the traceback would show it in its source lines
scorer = QualityScorer("you/hidden", token=token)
assert token not in repr(scorer) and token.encode() not in pickle.dumps(scorer)
try:
    QualityScorer("you/nothing", token=token)
except ValueError:
    traceback.print_exc()
IQSModel.from_pretrained("you/hidden", token=token).save_pretrained(sys.argv[2])
print(json.dumps(scorer.revision))
"""
    done = hub.run(START + code, hub.other_token[::-1], tmp_path / "saved", token=None, check=True)
    assert "you/nothing" in done.stderr  # the fixture looks for tokens in all that was written and printed
    assert any(row["user"] == "you" for row in hub.log())
