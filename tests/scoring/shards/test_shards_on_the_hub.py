"""Scoring in shards that are kept in a dataset repository: by processes with nothing in common but a Hub."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hub_server import Hub
from tests.workers import at_home, run, start

WORK = "hf://datasets/me/work/run-1"
SCORE = """
import json, os, signal, sys, time
from datasets import Dataset
from car_datasets import QualityScorer, score_in_shards
from car_datasets.utils import hub
hub.WAITS = (0.2,) * 6
model, place, kill_at = sys.argv[1:4]
words = ["Red, green and blue.", "The sea is wide.", "6", "a, b, c", "Bad."]
rows = Dataset.from_dict({"instruction": [f"Write a list of {i} colours." for i in range(23)],
                          "output": [words[i % 5] * (1 + i % 3) for i in range(23)]})
ordinary, calls = QualityScorer.__call__, []
def noted(self, batch, rank=None):
    calls.append(len(batch["output"]))
    if len(calls) == int(kill_at):
        os.kill(os.getpid(), signal.SIGKILL)
    return ordinary(self, batch, rank)
QualityScorer.__call__ = noted
try:
    found = score_in_shards(rows, QualityScorer(model), place or None, shard_rows=4, expiry=1.0)
    print(json.dumps([len(calls), found["iqs_score"][:]]))
except (ValueError, OSError) as error:
    print(json.dumps([len(calls), f"{type(error).__name__}: {error}"]))
"""
PARTS = {f"run-1/part-{i:05d}.arrow" for i in range(6)}


def score(hub: Hub, model: str, place: str = WORK, kill_at: int = 0, machine: str = "one", **options: Any) -> Any:
    """Return the shards that were scored, and the scores; another machine is another cache."""
    options["env"] = {"HF_HOME": str(hub.folder.parent / machine), **options.get("env", {})}
    done = hub.run(SCORE, model, place, kill_at, **options)
    return json.loads(done.stdout) if done.returncode == 0 else [done.returncode, done.stderr]


@pytest.fixture(scope="module")
def expected(tiny_iqs: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the scores, from shards in a folder of this machine."""
    done = run(["-c", SCORE, tiny_iqs, str(tmp_path_factory.mktemp("shards")), "0"], at_home())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)[1]


@pytest.mark.slow
def test_another_machine_goes_on_where_one_was_killed(hub: Hub, tiny_iqs: str, expected: list[float]) -> None:
    assert score(hub, tiny_iqs, kill_at=4)[0] == -9
    stored = hub.repo("me/work")
    assert stored is not None and stored.private
    assert len(PARTS & stored.files().keys()) == 3
    assert score(hub, tiny_iqs, machine="two") == [3, expected]
    stored = hub.repo("me/work")
    assert stored is not None and stored.files().keys() == PARTS | {".gitattributes", "run-1/manifest.json"}
    assert len(stored.commits) == 1 + 1 + 6  # the repository, the manifest, and one for each shard
    assert score(hub, tiny_iqs, machine="three", token=hub.read_token) == [0, expected]  # finished: to be read


STREAM = SCORE.replace("score_in_shards(rows,", "score_in_shards(rows.to_iterable_dataset(),")


@pytest.mark.slow
def test_a_stream_goes_on_on_another_machine(hub: Hub, tiny_iqs: str, expected: list[float]) -> None:
    environment = {"HF_HOME": str(hub.folder.parent / "one")}
    assert hub.run(STREAM, tiny_iqs, WORK, 4, env=environment).returncode == -9
    again = hub.run(STREAM, tiny_iqs, WORK, 0, env={"HF_HOME": str(hub.folder.parent / "two")})
    assert json.loads(again.stdout) == [3, expected]
    stored = hub.repo("me/work")
    assert stored is not None and stored.files().keys() == PARTS | {".gitattributes", "run-1/manifest.json"}


OTHER = SCORE.replace(
    "    return ordinary(self, batch, rank)",
    """    found = ordinary(self, batch, rank)
    return {**found, "iqs_score": [score + 1 for score in found["iqs_score"]]}""",
)


@pytest.mark.slow
def test_the_numbers_of_the_machine_that_came_first_are_everyones(
    hub: Hub, tiny_iqs: str, expected: list[float]
) -> None:
    """Let one machine die before its first upload, another with other numbers finish, and the first come back."""
    hub.fault("POST", "/commit/", times=-1, status=403, skip=1)
    assert score(hub, tiny_iqs)[0] == 1
    hub.mend()
    other = hub.run(OTHER, tiny_iqs, WORK, 0, env={"HF_HOME": str(hub.folder.parent / "two")})
    assert json.loads(other.stdout)[1] == pytest.approx([s + 1 for s in expected])
    assert score(hub, tiny_iqs) == [0, json.loads(other.stdout)[1]]


@pytest.mark.slow
def test_two_machines_at_once(hub: Hub, tiny_iqs: str, expected: list[float]) -> None:
    runs = [
        start(["-c", SCORE, tiny_iqs, WORK, "0"], {**hub.env, "HF_HOME": str(hub.folder.parent / machine)})
        for machine in ("one", "two")
    ]
    found = []
    for child in runs:
        output, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors[-3000:]
        found.append(json.loads(output))
    assert found[0][1] == found[1][1] == expected
    stored = hub.repo("me/work")
    assert stored is not None
    assert sorted(title for title in stored.titles if "part" in title) == sorted(f"Add {part}" for part in PARTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param({"status": 412}, id="412"),
        pytest.param({"kind": "lost"}, id="lost"),
        pytest.param({"status": 409}, id="409"),
        pytest.param({"status": 429, "headers": {"ratelimit": '"api";r=0;t=1'}}, id="429"),
        pytest.param({"status": 503}, id="503"),
        pytest.param({"kind": "drop"}, id="drop"),
    ],
)
def test_commits_that_fail_are_made_again_and_once(
    hub: Hub, tiny_iqs: str, expected: list[float], fault: dict[str, Any]
) -> None:
    hub.fault("POST", "/commit/", times=2, skip=2, **fault)
    assert score(hub, tiny_iqs) == [6, expected]
    assert sum(row["fault"] is not None for row in hub.log()) == 2
    stored = hub.repo("me/work")
    assert stored is not None and len(stored.commits) == 8


@pytest.mark.slow
def test_what_was_scored_when_the_hub_went_away_is_not_scored_again(
    hub: Hub, tiny_iqs: str, expected: list[float]
) -> None:
    hub.fault("GET|POST|HEAD", "/api/datasets/", times=-1, kind="drop", skip=25)
    calls, message = score(hub, tiny_iqs)
    assert 0 < calls < 6
    assert message.startswith(f"OSError: shard_dir={WORK!r}: ")
    assert "the Hub could not be asked" in message and "Finished shards are kept" in message
    hub.mend()
    assert score(hub, tiny_iqs) == [6 - calls, expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "token", "message"),
    [
        (WORK, "hf_me_reads", f"shard_dir={WORK!r}: the token may only read"),
        (WORK, None, "Log in with `hf auth login`, or set HF_TOKEN"),
        (WORK, "hf_wrong", "(401). HF_TOKEN wins over `hf auth login`"),
        ("hf://datasets/you/work/run-1", "hf_me_writes", "may not write to repositories of 'you'"),
        ("hf://datasets/company/work", "hf_me_writes", "may not write to repositories of 'company'"),
        (
            "hf://datasets/work",
            "hf_me_writes",
            "is not the address of a dataset repository. Pass hf://datasets/you/name",
        ),
    ],
)
def test_where_nothing_may_be_written_nothing_is_scored(
    hub: Hub, tiny_iqs: str, place: str, token: str | None, message: str
) -> None:
    calls, said = score(hub, tiny_iqs, place, token=token)
    assert calls == 0 and said.startswith("ValueError: ") and message in said
    assert hub.count("POST", "/commit/") == 0


@pytest.mark.slow
def test_an_unfinished_run_is_refused_to_a_token_that_only_reads(hub: Hub, tiny_iqs: str) -> None:
    assert score(hub, tiny_iqs, kill_at=2)[0] == -9
    calls, said = score(hub, tiny_iqs, token=hub.read_token, machine="two")
    assert calls == 0 and "the token may only read" in said


@pytest.mark.slow
def test_shards_of_another_run_and_other_content_are_refused(hub: Hub, tiny_iqs: str, make_tiny_iqs: Any) -> None:
    score(hub, tiny_iqs)
    calls, said = score(hub, make_tiny_iqs(seed=21))
    assert calls == 0 and "belongs to another run: revision" in said
    hub.commit("me/notes", {"thesis.tex": b"mine"})
    calls, said = score(hub, tiny_iqs, "hf://datasets/me/notes")
    assert calls == 0 and "holds ['thesis.tex'] and no manifest.json" in said


@pytest.mark.slow
def test_curate_on_the_command_line(hub: Hub, tiny_iqs: str, tiny_embedder: str) -> None:
    code = "import sys; from car_datasets.cli import app; app(sys.argv[1:])"
    rows = [{"instruction": f"Write a list of {i} colours.", "output": f"a, b, c{i}"} for i in range(30)]
    source = hub.folder.parent / "rows.json"
    source.write_text(json.dumps(rows), encoding="utf-8")
    place = ("--scorer", tiny_iqs, "--embedder", tiny_embedder, "--shards", "hf://datasets/me/work@dev/run")
    for number, (given, known) in enumerate([(("--token", hub.token), None), ((), hub.token)]):
        output = hub.folder.parent / f"out-{number}"
        hub.run(code, "curate", source, "--output", output, "--n1", "5", *place, *given, token=known, check=True)
    stored = hub.repo("me/work")
    assert stored is not None and stored.private and set(stored.files()) == {".gitattributes"}
    assert sorted(name for name in stored.files("dev") if "part" in name) == [
        f"run/{stage}/part-00000.arrow" for stage in ("embeddings", "scores")
    ]
    assert hub.count("POST", "/commit/") == 4
