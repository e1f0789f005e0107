"""files.py: which files a path, a pattern, a folder, an address or standard input means, and that no other is read."""

from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from fsspec.registry import known_implementations

from car_datasets.loading import files
from car_datasets.loading.files import kind_of, shown_address
from car_datasets.loading.sources import Reading, find_origin, open_dataset, open_rows
from car_datasets.utils.revisions import hub_address

Write = Callable[[Path, str], None]


def lines(*answers: str) -> str:
    return "".join(json.dumps({"instruction": "Name a colour.", "output": answer}) + "\n" for answer in answers)


def table(*answers: str) -> str:
    return "instruction,output\n" + "".join(f"Name a colour.,{answer}\n" for answer in answers)


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write text files, and `.parquet` ones with the text as the only answer."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            Dataset.from_dict({"instruction": ["Name a colour."], "output": [text]}).to_parquet(path)
        else:
            path.write_text(text, encoding="utf-8")
    return folder


def answers(source: Any, **options: Any) -> list[str]:
    return list(open_dataset(source, **options)["output"][:])


# --- a path is a path


@pytest.mark.parametrize(
    ("name", "trap"),
    [
        ("x[1].jsonl", "x1.jsonl"),
        ("x[1].csv", "x1.csv"),
        ("x[1].parquet", "x1.parquet"),
        ("a*b.jsonl", "aXb.jsonl"),
        ("a?b.parquet", "aXb.parquet"),
        ("d[1]/rows.jsonl", "d1/rows.jsonl"),
        ("d[1]", "d1/rows.jsonl"),
        ("[ab]", "a/rows.jsonl"),
        ("saved[1]", "saved1/rows.jsonl"),
    ],
)
def test_a_path_that_looks_like_a_pattern_is_that_path(name: str, trap: str, tmp_path: Path) -> None:
    file = name if "." in name else f"{name}/rows.parquet"
    write(tmp_path, {file: "red" if file.endswith("parquet") else table("red") if "csv" in file else lines("red")})
    if name.startswith("saved"):
        (tmp_path / file).unlink()
        Dataset.from_dict({"output": ["red"]}).save_to_disk(tmp_path / name)
    write(tmp_path, {trap: table("OTHER") if "csv" in trap else "OTHER" if "parquet" in trap else lines("OTHER")})
    for glob in (False, True):  # asking for patterns does not make a pattern of an existing path
        assert answers(tmp_path / name, glob=glob) == ["red"]


def test_a_tilde_is_part_of_a_name_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"~rows.jsonl": lines("red"), "home/rows.jsonl": lines("blue")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert (answers("~rows.jsonl"), answers(["~rows.jsonl"]), answers("~/rows.jsonl")) == (["red"], ["red"], ["blue"])
    with pytest.raises(FileNotFoundError, match=r"~nobody\.jsonl.*no such file or folder"):
        answers("~nobody.jsonl")


def test_a_pattern_is_read_only_when_it_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"b.jsonl": lines("blue"), "a.jsonl": lines("red", "green"), "sub/c.jsonl": lines("grey")})
    with pytest.raises(FileNotFoundError, match=r"\*\.jsonl.*no such file or folder.*glob=True \(--glob\)"):
        answers(f"{tmp_path}/*.jsonl")
    assert answers(f"{tmp_path}/*.jsonl", glob=True) == ["red", "green", "blue"]  # sorted by name
    assert answers(f"{tmp_path}/**/[c].jsonl", glob=True) == ["grey"]
    with pytest.raises(FileNotFoundError, match="no file fits this pattern"):
        answers(f"{tmp_path}/*.csv", glob=True)


def test_a_list_of_paths_is_read_in_its_order(tmp_path: Path) -> None:
    write(tmp_path, {"x[1].jsonl": lines("red"), "a.jsonl": lines("blue"), "t.csv": table("grey"), "d/x.jsonl": "{}"})
    assert answers([tmp_path / "x[1].jsonl", str(tmp_path / "a.jsonl")]) == ["red", "blue"]
    with pytest.raises(ValueError, match=r"files of several formats: .*a\.jsonl.*t\.csv"):
        answers([tmp_path / "a.jsonl", tmp_path / "t.csv"])
    with pytest.raises(ValueError, match="in a list of 2, is not a file"):
        answers([tmp_path / "a.jsonl", tmp_path / "d"])


def test_a_readme_that_is_huge_in_memory_is_refused(tmp_path: Path) -> None:
    """Try YAML whose names stand for lists of names, which refers to itself or is nested deeply, at every place."""
    names = "a0: &a0 [" + "x, " * 10 + "]\n"
    names += "".join(f"a{i}: &a{i} [" + f"*a{i - 1}, " * 10 + "]\n" for i in range(1, 9))
    part = "configs:\n- config_name: {}\n  data_files: {}\n"
    headers = [
        names,
        names + "configs: *a8\n",
        names + "dataset_info: *a8\n",
        names + part.format("*a8", "a.jsonl"),
        names + part.format("a", "*a8"),
        "".join(f"a{i}: &a{i} {{<<: [" + f"*a{i - 1}, " * 9 * (i > 0) + "]}\n" for i in range(12)),
        "configs: &a\n- config_name: a\n  data_files: *a\n",
        "configs: " + "[" * 900 + "]" * 900 + "\n",
        "configs: " + "[" * 20_000 + "\n",
    ]
    write(tmp_path, {"a.jsonl": lines("red")})
    for header in headers:
        (tmp_path / "README.md").write_text(f"---\n{header}---\n")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"^source=.*the header of its README\.md (has more|cannot)") as error:
            answers(tmp_path)
        assert len(str(error.value)) < 500 and time.monotonic() - start < 10, header[:50]
    (tmp_path / "README.md").write_text("---\ntags: &t [a]\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n---\n")
    assert answers(tmp_path) == ["red"]


# --- compression and standard input


def zst(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_text_is_read_and_a_broken_file_is_named(ending: str, tmp_path: Path) -> None:
    whole = lines(*map(str, range(5_000))).encode()
    path = tmp_path / f"rows.jsonl{ending}"
    path.write_bytes(COMPRESS[ending](whole))
    assert answers(path) == [str(i) for i in range(5_000)]
    csv = tmp_path / f"ROWS.CSV{ending.upper()}"
    csv.write_bytes(COMPRESS[ending](table("red", "007").encode()))
    assert answers(csv) == ["red", "007"]
    for broken in (path.read_bytes()[:-30], whole):  # cut, and not compressed at all
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"source='.*rows\.jsonl{ending}' cannot be (decompressed|read)"):
            answers(path)


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_small_file_that_decompresses_to_a_huge_one_is_refused(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "FREE", 1 << 20)
    row = lines("red").encode()
    starts = {
        "a.jsonl": row,
        "b.jsonl": b"{",
        "c.json": b"[" + row + b",",
        "d.csv": table("red").encode(),
        "e.csv": b'"',
    }
    for name, start in starts.items():
        bomb = tmp_path / f"{name}{ending}"
        bomb.write_bytes(COMPRESS[ending](start + b" " * (1 << 22)))
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"{name}{ending}' decompresses to more than 200 times its size"):
            answers(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
        tracemalloc.stop()
    monkeypatch.setattr(files, "FREE", 1 << 25)
    assert answers(tmp_path / f"a.jsonl{ending}") == ["red"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.JSON", "json"),
        ("a.ndjson.gz", "json"),
        ("a.tsv.xz", "csv"),
        ("a.parquet", "parquet"),
        ("a.parquet.gz", None),  # Parquet is compressed inside
        ("a.gz", None),
        ("a.txt", None),
        ("json", None),
    ],
)
def test_kind_by_name(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


class Piped(io.StringIO):
    """What `sys.stdin` is when a program is fed by a pipe."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.buffer = io.BytesIO(content)


@pytest.mark.parametrize(
    "text", [lines("red", "007"), json.dumps([{"output": "red"}, {"output": "007"}]), "\ufeff" + table("red", "007")]
)
def test_standard_input_tells_its_format(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Piped(text.encode()))
    opened = open_rows("-", Reading(cache_dir=str(tmp_path)))
    assert opened.dataset["output"][:] == ["red", "007"]
    assert [name for name, _ in opened.origin.files] == ["-"] and opened.origin.kind == "file"


def test_standard_input_that_is_no_source_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content, message in ((b" \n", "is empty"), (gzip.compress(b"x"), "zcat")):
        monkeypatch.setattr(sys, "stdin", Piped(content))
        with pytest.raises(ValueError, match=message):
            open_dataset("-", cache_dir=str(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="several processes cannot share standard input"):
        open_dataset("-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_named_pipe_is_read_like_standard_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(lines("red"),))
    writer.start()
    assert answers(tmp_path / "pipe", cache_dir=str(tmp_path)) == ["red"]
    writer.join()


# --- addresses


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve `tmp_path/www` on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def end_headers(self) -> None:
            if "cut" in self.path:  # more bytes are promised than come
                self.headers_buffer = [line for line in self._headers_buffer if b"Content-Length" not in line]
                self._headers_buffer = [*self.headers_buffer, b"Content-Length: 9999\r\n"]
            super().end_headers()

    write(tmp_path / "www", {"a b.jsonl": lines("red"), "cut.jsonl": lines("red"), "page": "<html>"})
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_an_address_of_a_file_is_read_and_its_query_is_not_told(server: str, tmp_path: Path) -> None:
    opened = open_rows(f"{server}/a%20b.jsonl?token=hf_secret", Reading(cache_dir=str(tmp_path)))
    assert opened.dataset["output"][:] == ["red"]
    assert [name for name, _ in opened.origin.files] == [f"{server}/a%20b.jsonl"]
    assert answers(f"{server}/a%20b.jsonl", cache_dir=str(tmp_path)) == ["red"]  # kept under the digest of its bytes


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/none.jsonl?token=hf_secret", FileNotFoundError, "there is no such file"),
        ("/cut.jsonl", ConnectionError, "broke off"),
        ("/page", ValueError, "does not tell the format"),
    ],
)
def test_an_address_without_rows_is_said_to_have_none(
    server: str, path: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        open_dataset(server + path, cache_dir=str(tmp_path))
    assert "hf_secret" not in str(caught.value)


def test_other_schemes_are_those_of_fsspec(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    for name, answer in {"b.jsonl": "blue", "a.jsonl": "red"}.items():
        system.pipe(f"/rows/{name}", lines(answer).encode())
    assert answers("memory://rows/a.jsonl", cache_dir=str(tmp_path)) == ["red"]
    assert answers("memory://rows/*.jsonl", cache_dir=str(tmp_path), glob=True) == ["red", "blue"]
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        answers("memory://rows/c.jsonl")
    with pytest.raises(ValueError, match="nowhere:// is not known"):
        answers("nowhere://rows/c.jsonl")


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    far = {"class": "no_such.FileSystem", "err": "Install farfs to go far"}
    monkeypatch.setitem(known_implementations, "far", far)
    with pytest.raises(ValueError, match="far:// addresses need another package: Install farfs"):
        open_dataset("far://bucket/rows.jsonl")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("https://huggingface.co/datasets/you/rows", ("you/rows", None, "")),
        ("https://huggingface.co/datasets/you/rows/", ("you/rows", None, "")),
        ("https://huggingface.co/datasets/you/rows/tree/v1", ("you/rows", "v1", "")),
        ("https://huggingface.co/datasets/you/rows/resolve/v1/d/a.csv?download=true", ("you/rows", "v1", "d/a.csv")),
        ("https://huggingface.co/datasets/you/rows/blob/main/a.csv", ("you/rows", "main", "a.csv")),
        ("hf://datasets/you/rows", ("you/rows", None, "")),
        ("hf://datasets/you/rows@refs%2Fpr%2F1/a.csv", ("you/rows", "refs/pr/1", "a.csv")),
        ("https://example.com/datasets/you/rows", None),
        ("you/rows", None),
        ("/datasets/you/rows", None),
    ],
)
def test_addresses_of_the_hub(source: str, expected: tuple[str, str | None, str] | None) -> None:
    assert hub_address(source) == expected


@pytest.mark.parametrize("rest", ["viewer/default/train", "tree/main/data", "discussions"])
def test_a_page_about_a_dataset_asks_for_the_id(rest: str) -> None:
    with pytest.raises(ValueError, match="pass the id: 'you/rows'"):
        open_dataset(f"https://huggingface.co/datasets/you/rows/{rest}")


def test_an_address_is_shown_without_secrets() -> None:
    assert shown_address("https://me:pw@host:8/a.csv?sig=x#y") == "https://host:8/a.csv"
    assert shown_address("hf://datasets/a/b@main/c.csv") == "hf://datasets/a/b@main/c.csv"


# --- folders

CONFIGS = """---
configs:
- config_name: small
  data_files: [{split: train, path: s/*.jsonl}, {split: test, path: t.jsonl}]
- config_name: other
  data_dir: o
---
"""
CONFIGURED = {
    "README.md": CONFIGS,
    "s/a.jsonl": lines("red"),
    "t.jsonl": lines("blue"),
    "o/b.jsonl": lines("grey"),
}


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({"b.jsonl": lines("blue"), "a.jsonl": lines("red")}, {}, ["red", "blue"]),
        ({"b.json.gz": "", "x/y/a.jsonl": lines("red"), ".c.jsonl": "", ".git/d.jsonl": "", "__e/f.jsonl": ""}, {}, None),
        ({"train.jsonl": lines("red"), "test.jsonl": lines("blue")}, {"split": "test"}, ["blue"]),
        ({"data/train/1.csv": table("red"), "data/test/1.csv": table("blue")}, {"split": "train"}, ["red"]),
        ({"train-00000-of-00002.parquet": "red", "train-00001-of-00002.parquet": "blue"}, {}, ["red", "blue"]),
        ({"data/one-00000-of-00001.parquet": "red", "data/two-00000-of-00001.parquet": "blue"}, {"split": "two"}, ["blue"]),
        ({"a.jsonl": lines("red"), "README.md": "# Rows", "config.json": "{}", "instruction.md": "", "x.eval": ""}, {}, ["red"]),
        (CONFIGURED, {"name": "small", "split": "test"}, ["blue"]),
        (CONFIGURED, {"name": "other"}, ["grey"]),
    ],
)  # fmt: skip
def test_a_folder_is_its_own_files_by_the_splits_of_their_names(
    files: dict[str, str], options: dict[str, str], expected: list[str] | None, tmp_path: Path
) -> None:
    write(tmp_path / "rows[1]", files)
    write(tmp_path / "rows1", {"other.jsonl": lines("OTHER")})
    if expected is None:  # hidden files are none of it, and an empty one is named
        with pytest.raises(ValueError, match=r"b\.json\.gz' is an empty file"):
            answers(tmp_path / "rows[1]", **options)
        return
    assert answers(tmp_path / "rows[1]", **options) == expected


def test_a_stray_file_is_named_and_a_tie_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, {"train-0.parquet": "red", "train-1.parquet": "blue", "notes.csv": table("OTHER")})
    assert answers(tmp_path) == ["red", "blue"]
    assert "1 data files are not read: notes.csv." in caplog.text
    write(tmp_path, {"more.csv": table("OTHER")})
    with pytest.raises(
        ValueError, match=r"as many files of one format .*more\.csv, notes\.csv.*train-0\.parquet.*Pass one"
    ):
        answers(tmp_path)


@pytest.mark.parametrize(
    ("header", "name", "message"),
    [
        (CONFIGS, None, r"name=None is not a configuration; it has \['other', 'small'\]\. Say which"),
        (CONFIGS, "large", "name='large' is not a configuration"),
        ("", "large", r"name='large' is not a configuration; it has \[\]\. Leave name out"),
        ("---\nconfigs: [\n---\n", None, "the header of its README.md cannot be read"),
        ("---\nconfigs: [{config_name: a, data_files: no*.csv}]\n---\n", None, "no file fits what its README.md says"),
        (
            "---\nconfigs: [{config_name: a, data_files: '*.jsonl', field: data}]\n---\n",
            None,
            r"\['field'\], which are for",
        ),
    ],
)
def test_a_readme_that_does_not_fit_its_folder_is_refused(
    header: str, name: str | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path, {"README.md": header, "a.jsonl": lines("red")})
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, name)


# --- Parquet


def test_parquet_is_read_by_its_content(tmp_path: Path) -> None:
    """Read it without the cache of `datasets`, whose keys are path and time: it would give the old rows."""
    path = tmp_path / "rows.parquet"
    for answer in ("red", "tan"):
        pq.write_table(pa.table({"output": [answer]}), path)
        os.utime(path, ns=(10**18, 10**18))
        assert answers(path) == [answer]


def test_parquet_files_of_different_columns_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(pa.table({name: ["x"]}), tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet' has the columns \['b'\]; '.*a\.parquet' has \['a'\]"):
        open_dataset(tmp_path)


# --- what was read


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([1]), pa.array(["01"])),
        (pa.array(["01"]), pa.array([1])),
        (pa.array([True]), pa.array([2])),
        (pa.array([[1]]), pa.array([["01"]])),
        (pa.array([{"a": 1}]), pa.array([{"a": "01"}])),
        (pa.array([0.5], pa.float32()), pa.array([0.1])),
    ],
)
def test_parquet_files_whose_values_would_be_cast_are_refused(
    first: pa.Array, second: pa.Array, tmp_path: Path
) -> None:
    files = []
    for name, column in (("a", first), ("b", second)):
        files.append(tmp_path / f"{name}.parquet")
        pq.write_table(pa.table({"output": ["red"], "n": column}), files[-1])
    with pytest.raises(ValueError, match=r"b\.parquet' cannot be read as parquet: .*columns of different types.*'n'"):
        open_dataset(files, cache_dir=str(tmp_path / "cache"))


def test_the_origin_names_every_file_with_its_digest(tmp_path: Path) -> None:
    write(tmp_path, {"train/b.jsonl": lines("blue"), "train/a.jsonl": lines("red"), "test/c.jsonl": lines("grey")})
    opened = open_rows(tmp_path, Reading(split="train[1:]"))
    assert [Path(name).name for name, _ in opened.origin.files] == ["a.jsonl", "b.jsonl"]
    assert len({digest for _, digest in opened.origin.files}) == 2
    assert find_origin(str(tmp_path), Reading(split="train")) == opened.origin
