"""judge.py: a stage like any other, whose answers are paid for once, by whichever process, also after SIGKILL."""

from __future__ import annotations

import json
import pickle
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.fingerprint import Hasher
from typer.testing import CliRunner

from car_datasets import JudgeScorer, score_in_shards
from car_datasets.cli import app
from car_datasets.scoring.batching import watching
from car_datasets.scoring.judges import endpoint as endpoint_module
from car_datasets.scoring.judges import judge as judge_module
from car_datasets.scoring.stage import Stage, add_columns
from tests.judge_server import ANSWER, KEY, MODEL, PROMPT, JudgeServer, error, judge_server, rating
from tests.scoring.tiny_models import rated_rows
from tests.workers import WORKERS

COLUMNS = [
    "judge_score",
    "judge_reason",
    "judge_fault",
    "judge_soundness",
    "judge_worth",
    "judge_tokens",
    "judge_status",
]
TOKENS = PROMPT + ANSWER


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint_module, "LONGEST_WAIT", 0.02)
    monkeypatch.setattr(endpoint_module, "_seen", {})
    monkeypatch.setattr(judge_module, "_keys", {})
    for name in ("OPENAI_API_KEY", "JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server() as found:
        yield found


def judge(server: JudgeServer, tmp_path: Path, **options: Any) -> JudgeScorer:
    return JudgeScorer(server.url, MODEL, **{"cache": str(tmp_path / "judge.sqlite"), "retries": 2, **options})


def score(row: str) -> float:
    found = rating(row)
    return found["soundness"] * found["worth"] / 10


def rows(count: int) -> Dataset:
    return Dataset.from_list([{"instruction": f"Say {i}.", "output": str(i)} for i in range(count)])


def test_it_is_a_stage(server: JudgeServer, tmp_path: Path, pairs: Dataset) -> None:
    stage = judge(server, tmp_path, concurrency=4)
    assert isinstance(stage, Stage)
    assert stage.output_columns == tuple(COLUMNS)
    assert sorted(stage.read_columns(["id", *pairs.column_names])) == ["input", "instruction", "output"]
    found = add_columns(pairs, stage, "Judging")
    assert found.column_names == [*pairs.column_names, *COLUMNS]
    assert found.data.column("judge_score").type == pa.float32()
    asked = server.rows()
    assert len(asked) == 6
    by_answer = {str(row["output"]): row for row in found}
    for text in asked:
        said = text.split("assistant]\n")[1].split("\n\n[")[0]
        row = by_answer[said]
        assert row["judge_score"] == pytest.approx(score(text))
        assert {name: row[f"judge_{name}"] for name in ("soundness", "worth", "reason")}.items() <= rating(text).items()
        assert row["judge_tokens"] == TOKENS
        assert row["judge_status"] == ("ok" if said else "empty_response")
    assert "user]\nSum the list.\n\n1, 2, 3\n" in "".join(asked)
    # The same numbers by `.map`, in another order, from the cache alone.
    mapped = pairs.map(replace(stage, concurrency=1), batched=True, batch_size=2)
    assert mapped.to_dict() == found.to_dict()
    assert mapped.features["judge_score"] == found.features["judge_score"]
    assert score_in_shards(pairs, stage, tmp_path / "shards").to_dict() == found.to_dict()
    assert len(server.requests) == 6
    assert stage.spent() == (6, 6 * TOKENS, 0.0)
    # A run is resumed with another cap, pace and key: its answers are the same.
    other = replace(stage, max_tokens=10**6, concurrency=2, key_variable="OTHER")
    assert score_in_shards(pairs, other, tmp_path / "shards").to_dict() == found.to_dict()
    with pytest.raises(ValueError, match="belongs to another run: model"):
        score_in_shards(pairs, replace(stage, model="other"), tmp_path / "shards")


def test_a_chat_is_one_call_with_its_turns(server: JudgeServer, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>Hm.</think>1"},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "2"},
    ]
    chats = Dataset.from_list([{"messages": turns}, {"messages": turns[:2]}, {"messages": turns}])
    with pytest.raises(ValueError, match="1 of 3 rows of this batch cannot be scored: 1 no_assistant_turn"):
        judge(server, tmp_path)(chats[:])
    assert server.requests == []
    found = judge(server, tmp_path, on_invalid="mark")(chats[:])
    assert found["judge_status"] == ["ok", "no_assistant_turn", "ok"]
    assert [value is None for value in found["judge_score"]] == [False, True, False]
    (text,) = server.rows()  # equal rows are asked about once
    mark = text.split()[0]
    heads = [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]
    assert heads == [" system]", " user]", " assistant]", " user]", " assistant]", " end]"]
    assert "Hm." not in text
    judge(server, tmp_path, score_thoughts=True)(chats[:1])
    assert "Hm.\n1" in server.rows()[1]


BROKEN = '{"reason": "half'


@pytest.mark.parametrize(
    ("answers", "status", "calls"),
    [
        ([("Sure! ```json\nGOOD\n```", "stop", {})], "ok", 1),
        ([(BROKEN, "stop", {}), ("GOOD", "stop", {})], "ok", 2),
        ([('{"soundness": 11}', "stop", {}), ("", "stop", {})], "invalid_answer: it has no JSON object", 2),
        ([(None, "stop", {}), ('{"soundness": 11}', "stop", {})], "invalid_answer: the field 'reason' is missing", 2),
        ([(BROKEN, "length", {})], "cut_off: the answer has reached answer_tokens, and is not complete", 1),
        ([("", "content_filter", {})], "refused: by the filter of the endpoint", 1),
        ([(None, "stop", {"refusal": "I cannot."})], "refused: I cannot.", 1),
    ],
)
def test_an_answer_is_repaired_once_or_the_status_says_why(
    server: JudgeServer, tmp_path: Path, answers: list[Any], status: str, calls: int
) -> None:
    good = json.dumps({"reason": "r", "fault": "none", "soundness": 8, "worth": 5})

    def answering(content: str | None, finish: str, more: dict[str, str]) -> Any:
        text = None if content is None else content.replace("GOOD", good)
        return lambda handler, request: handler.answer(text, finish, **more)

    server.faults = [answering(*answer) for answer in answers]
    stage, batch = judge(server, tmp_path), rows(1)[:]
    found = stage(batch)
    assert found["judge_status"] == [status]
    assert found["judge_score"] == [4.0 if status == "ok" else None]
    assert found["judge_tokens"] == [calls * TOKENS]
    # Paid for and kept, valid or not.
    assert stage(batch) == found
    assert len(server.requests) == calls
    if calls == 2:
        first, second = (request["messages"] for request in server.requests)
        assert second[:2] == first
        assert [message["role"] for message in second[2:]] == ["assistant", "user"]


def test_rows_that_are_not_answered_end_the_run_or_are_null(server: JudgeServer, tmp_path: Path) -> None:
    def refuse_seven(handler: Any, request: Any) -> bool:
        if found := "Say 7." in request["messages"][1]["content"]:
            handler.send(500, error("overloaded"))
        return found

    server.always = refuse_seven
    batch = {**rows(20)[:], "source_index": list(range(100, 120))}
    with pytest.raises(ConnectionError, match=r"rows \[107\]: overloaded.*on_failure='mark'"):
        judge(server, tmp_path)(batch)
    found = judge(server, tmp_path, on_failure="mark")(batch)
    assert [i for i, value in enumerate(found["judge_score"]) if value is None] == [7]
    assert found["judge_status"][7] == "no_answer: overloaded"
    assert found["judge_tokens"][7] is None
    assert server.answered == 19
    server.always = lambda handler, request: False
    assert None not in judge(server, tmp_path)(batch)["judge_score"]
    assert server.answered == 20


def test_the_cap_is_never_passed(server: JudgeServer, tmp_path: Path) -> None:
    capped = judge(server, tmp_path, max_tokens=12_000, concurrency=8)
    batch = rows(60)[:]
    with pytest.raises(ValueError, match=r"max_tokens=12,000 \(so far .*one more call can take .*or raise the cap"):
        capped(batch)
    found = replace(capped, on_failure="mark")(batch)
    scored = sum(value is not None for value in found["judge_score"])
    assert server.answered == scored
    assert 12_000 - 5_000 < scored * TOKENS <= 12_000
    assert {status.partition(":")[0] for status in found["judge_status"]} == {"ok", "cap_reached"}
    found = judge(server, tmp_path, max_cost=1.0, prices=(1.0, 3.0))(batch)
    assert None not in found["judge_score"]
    assert server.answered == 60
    with pytest.raises(ValueError, match=r"max_cost=0.001 \(so far 0"):
        judge(server, tmp_path, max_cost=0.001, prices=(1.0, 3.0))(rows(61)[60:])


def test_a_run_that_is_interrupted_waits_for_calls_that_are_on_their_way(server: JudgeServer, tmp_path: Path) -> None:
    def interrupt(done: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(interrupt):
        judge(server, tmp_path, concurrency=4)(rows(200)[:])
    assert 20 <= kept(tmp_path) == server.answered == len(server.requests) < 200


def test_the_key_is_sent_and_never_kept(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    without, given = judge(server, tmp_path), judge(server, tmp_path, api_key=KEY)
    assert without == given
    assert Hasher.hash(without) == Hasher.hash(given)
    given(rows(2)[:])
    copied = pickle.loads(pickle.dumps(given))
    assert copied == given
    score_in_shards(rows(2), given, tmp_path / "shards")
    assert server.keys == [f"Bearer {KEY}"] * 2
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for content in (repr(given), pickle.dumps(given).decode("latin-1"), kept.decode("latin-1"), caplog.text):
        assert KEY not in content
    # From the environment, where the key of one vendor is not meant for all servers.
    judge_module._keys.clear()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    without(rows(3)[2:])
    assert server.keys[-1] == "Bearer none"
    replace(without, key_variable="OPENAI_API_KEY")(rows(4)[3:])
    assert server.keys[-1] == f"Bearer {KEY}"
    assert JudgeScorer("https://api.openai.com/v1", MODEL)._key() == (KEY, "OPENAI_API_KEY")
    assert JudgeScorer("https://api.openai.com.evil.org/v1", MODEL)._key() == (None, "JUDGE_API_KEY")
    with pytest.raises(ValueError, match="api_key is not an API key"):
        judge(server, tmp_path, api_key="two words")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "base_url='localhost:8000' has no scheme"),
        ({"model": " "}, "must be the name of a model"),
        ({"rubric": "no.yaml"}, "rubric='no.yaml' cannot be read"),
        ({"max_tokens": 0}, "max_tokens=0 must be above 0, or no call could be made"),
        ({"max_tokens": 1.5}, "max_tokens=1.5 must be above 0"),
        ({"max_cost": 0.0, "prices": (1, 1)}, "max_cost=0.0 must be above 0"),
        ({"max_cost": 1}, r"max_cost=1 needs prices=\(0.15, 0.6\)"),
        ({"prices": (1,)}, r"prices=\(1,\) must be two numbers"),
        ({"prices": (-1, 1)}, "must be two numbers of at least 0"),
        ({"concurrency": 0}, "concurrency=0 must be an integer of at least 1"),
        ({"retries": -1}, "retries=-1"),
        ({"answer_tokens": True}, "answer_tokens=True"),
        ({"timeout": 0}, "timeout=0 must be a number of seconds above 0"),
        ({"on_failure": "skip"}, "on_failure='skip' is not known"),
        ({"on_invalid": "skip"}, "on_invalid='skip' is not known"),
        ({"schema": "nope"}, "schema='nope'"),
    ],
)
def test_bad_options_are_refused_before_a_call(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeScorer(**{"base_url": "http://localhost:1/v1", "model": MODEL, "cache": str(tmp_path / "no"), **options})
    assert not list(tmp_path.iterdir())


def test_a_rubric_is_held_by_its_content(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("instructions: Rate.\nschema: {type: object}\nscore: good\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rubric='.*mine.yaml' cannot be used: schema must .*shows a complete rubric"):
        judge(server, tmp_path, rubric=path)
    text = "instructions: Rate.\nscore: good\nschema:\n  type: object\n  required: [good]\n  properties: {good: {type: boolean}}"
    path.write_text(text.replace("boolean", "integer"), encoding="utf-8")
    stage = judge(server, tmp_path, rubric=path, output_column="mine_score")
    assert stage.output_columns == ("mine_score", "mine_good", "mine_tokens", "mine_status")
    before = Hasher.hash(stage)
    path.write_text(text.replace("boolean", "number"), encoding="utf-8")
    assert Hasher.hash(judge(server, tmp_path, rubric=path, output_column="mine_score")) != before
    server.faults = [lambda handler, request: handler.answer('{"good": 3}')]
    path.unlink()
    assert pickle.loads(pickle.dumps(stage))(rows(1)[:])["mine_score"] == [3.0]
    assert "judges/" in str(judge(server, tmp_path, cache=None).cache_file)


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"JudgeScorer needs openai: pip install 'car-datasets\[judge\]'"):
        JudgeScorer("http://localhost:1/v1", MODEL)


def test_on_the_command_line(server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(rows(9).to_list()), encoding="utf-8")
    at = [
        str(tmp_path / "rows.json"),
        "--base-url",
        server.url,
        "--model",
        MODEL,
        "--cache",
        str(tmp_path / "c.sqlite"),
    ]

    def run(*more: str) -> Any:
        return CliRunner().invoke(app, ["judge", *at, *more], env={"JUDGE_API_KEY": KEY})

    output = ("--output", str(tmp_path / "judged.parquet"))
    done = run(*output, "--max-cost", "1", "--prices", "1,2")
    assert done.exit_code == 0, done.output
    assert "9 rows are in" in done.output
    assert "9 ok." in done.output
    assert f"9 calls of {9 * TOKENS:,} tokens, which cost 0.00342." in done.output
    assert KEY not in done.output
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert set(COLUMNS) < set(Dataset.from_parquet(output[1], cache_dir=str(tmp_path)).column_names)
    for arguments, message in (
        (output, "is there already"),
        (("--output", "a.json"), "name a .parquet file"),
        (("--output", "a.parquet", "--prices", "1"), "--prices 1: pass the prices"),
        (("--output", "a.parquet", "--max-tokens", "0"), "--max-tokens=0 must be above 0"),
        (("--output", "a.parquet", "--max-tokens", "3100", "--answer-tokens", "9"), "or raise the cap"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
        assert message in done.output
    assert len(server.requests) == 9


# --- killed


def run_judge(url: str, folder: Path, count: int, options: dict[str, Any]) -> None:
    """Judge rows in shards, in a process of its own; note what came out, or the error."""
    stage = JudgeScorer(url, MODEL, cache=str(folder / "judge.sqlite"), **options)
    found = score_in_shards(rows(count), stage, folder / "shards", shard_rows=100, expiry=1.0)
    (folder / "scores.json").write_text(json.dumps(found["judge_score"][:]), encoding="utf-8")


def kept(folder: Path) -> int:
    """Return the number of answers in the cache."""
    if not (folder / "judge.sqlite").exists():
        return 0
    with closing(sqlite3.connect(folder / "judge.sqlite", timeout=10)) as file:
        try:
            return int(file.execute("SELECT count(*) FROM answers").fetchone()[0])
        except sqlite3.OperationalError:  # the tables are not made yet
            return 0


@pytest.mark.slow
def test_killed_three_times_every_row_is_answered_once(server: JudgeServer, tmp_path: Path) -> None:
    """Kill the run while eight calls are on their way: they are the only ones that are made again."""
    most = 6_000  # more than one call can take
    options = {"concurrency": 8, "max_tokens": 500 * TOKENS + 3 * 8 * most + most}
    for hold_at in (70, 249, 493, None):
        server.hold_at = hold_at
        worker = WORKERS.Process(target=run_judge, args=(server.url, tmp_path, 500, options))
        worker.start()
        if hold_at is None:
            worker.join(120)
            assert worker.exitcode == 0
            break
        # All that were answered are kept, and the others wait for an answer that they will not get.
        deadline = time.monotonic() + 60
        while kept(tmp_path) < hold_at and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.answered == kept(tmp_path) == hold_at
        worker.kill()
        worker.join(60)
    assert server.answered == 500
    assert len(server.requests) <= 500 + 3 * 8
    found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    asked = {text.split("assistant]\n")[1].split("\n")[0]: text for text in server.rows()}
    assert found == [pytest.approx(score(asked[str(i)]), abs=1e-5) for i in range(500)]
    spent = judge(server, tmp_path).spent()
    # A call that was reserved at a kill may not have reached the server.
    assert len(server.requests) <= spent.calls <= 500 + 3 * 8
    assert spent.tokens <= options["max_tokens"]


@pytest.mark.slow
def test_two_processes_that_are_killed_at_any_time_share_a_cap(server: JudgeServer, tmp_path: Path) -> None:
    options = {"concurrency": 4, "max_tokens": 60_000, "on_failure": "mark"}
    for pause in (2.0, 2.5, None):
        workers = [
            WORKERS.Process(target=run_judge, args=(server.url, tmp_path, 400, options | {"retries": i}))
            for i in (1, 2)
        ]
        for worker in workers:
            worker.start()
        if pause is not None:
            time.sleep(pause)
            for worker in workers:
                worker.kill()
        for worker in workers:
            worker.join(120)
            assert worker.exitcode in (0, -9)
    # What the server has counted: more than the cache knows, if a killed process did not read an answer.
    assert 0 < server.answered * TOKENS <= 60_000
    found = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert sum(value is not None for value in found) == kept(tmp_path) <= server.answered


def test_a_judge_is_compared_with_other_scorers_within_its_cap(
    server: JudgeServer, tiny_iqs: str, tmp_path: Path
) -> None:
    rated = rated_rows(20)
    (tmp_path / "rated.jsonl").write_text("\n".join(map(json.dumps, rated)))
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"prompt": "Name a tide.", "chosen": "It is the spring tide.", "rejected": "No."})
    )
    files = ["--ratings", str(tmp_path / "rated.jsonl"), "--pairs", str(tmp_path / "pairs.jsonl"), "--samples", "2"]
    cache, cap = tmp_path / "judge.sqlite", 6_500

    def compared(name: str, *options: str, run: int) -> dict[str, Any]:
        place = tmp_path / f"{run}.json"
        done = CliRunner().invoke(app, ["evaluate", tiny_iqs, name, *files, "--json", str(place), *options])
        assert done.exit_code == 0, done.output
        assert f"{cache} has recorded {len(server.requests)} calls" in " ".join(done.output.replace("\n", "").split())
        assert "car-datasets judge SOURCE --output judged.parquet --model judge-1" in done.output
        found: dict[str, Any] = json.loads(place.read_text())
        return found

    name = f"judge:{MODEL},base_url={server.url},rubric=soundness_worth,cache={cache},retries=0"
    shown = f"judge:{MODEL},rubric=soundness_worth"
    first = compared(f"{name},max_tokens={cap}", run=1)
    asked = len(server.requests)
    assert 2 <= asked < 22 and judge(server, tmp_path).spent().tokens == asked * TOKENS <= cap
    assert list(first["scorers"]) == [tiny_iqs, shown] and first["scorers"][shown]["unscored"] == 22 - asked
    assert first["rows"] + 2 * first["pairs"] <= asked and first["scorers"][tiny_iqs]["unscored"] == 0
    # A higher cap pays for the rows that are left, and for none twice; copies are not sent.
    for run in (2, 3):
        found = compared(f"{name},max_tokens=1000000", run=run)
        assert (found["rows"], found["pairs"], found["corruptions"]) == (20, 1, {})
        assert found["scorers"][shown]["unscored"] == 0 and len(set(server.rows())) == len(server.requests) == 22
    assert set(found["between"]) >= {f"{tiny_iqs}, {shown}", f"{shown}, length"}
    # The command `judge` and this one share their answers.
    assert judge(server, tmp_path)(Dataset.from_list(rated[:3])[:])["judge_status"] == ["ok"] * 3
    assert len(server.requests) == 22
    assert compared(name, "--corruptions", run=4)["corruptions"] and len(server.requests) > 100
    for wrong, message in (
        (f"judge:{MODEL}", "names no server; write judge:judge-1,base_url="),
        (f"{name},timeout=soon", "timeout='soon' must be a number of seconds"),
        (f"judge:{MODEL},api_key={KEY}", "has the option 'api_key'"),
    ):
        failed = CliRunner().invoke(app, ["evaluate", wrong, *files])
        assert failed.exit_code == 2 and message in failed.stderr and KEY not in failed.stderr, failed.stderr
    refused = CliRunner().invoke(
        app, ["curate", str(tmp_path / "rated.jsonl"), "-o", str(tmp_path / "o"), "--scorer", name]
    )
    assert refused.exit_code == 2 and "`car-datasets cluster judged.parquet --output" in refused.stderr, refused.stderr
