"""What a command prints: plain lines to a pipe; on a terminal, bold sentences and tables within its width."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from car_datasets.cli import printing

SENTENCE = "The rows are in a/long/path/that/is/wider/than/forty/columns/of/a/terminal.parquet, and so are the scores."
ROWS = [["mean length (tokens)", "87.8", "121.1", "80.2", "120.4"], ["rows", "384", "60", "60", "60"]]
HEADS = ["", "pool", "selected", "random control", "length-matched control"]


def table() -> Table:
    made = Table(*HEADS, title="A title that is much wider than the table below it is, by far", caption="A caption.")
    for row in ROWS:
        made.add_row(*row)
    return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], io.StringIO]:
    """Return a function that makes the output a terminal of a width, and returns what is printed."""

    def start(width: int) -> io.StringIO:
        shown = io.StringIO()
        for name in ("NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        console = Console(
            file=shown, width=width, force_terminal=True, _environ={"TERM": "xterm"}, markup=False, highlight=False
        )
        monkeypatch.setattr(printing, "_console", lambda err=False: console)
        return shown

    return start


def test_to_a_pipe_each_row_and_sentence_is_a_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    printing.announce("It takes a second.")
    printing.print_table(table())
    printing.tell(SENTENCE)
    printing.tell_each([SENTENCE])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert printed.err == ""
    assert [line.split() for line in lines[2:4]] == [" ".join(row).split() for row in ROWS]
    assert lines[0].startswith("A title") and lines[0].endswith("by far")
    assert lines[4:] == ["A caption.", SENTENCE, f"- {SENTENCE}"]
    assert all(line.isascii() and line == line.rstrip() and "\x1b" not in line for line in lines)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_on_a_terminal_nothing_is_cut_or_wider_than_it_is(width: int, terminal: Callable[[int], io.StringIO]) -> None:
    shown = terminal(width)
    printing.print_table(table())
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()).splitlines()
    assert "…" not in shown.getvalue() and "\x1b[1m" in shown.getvalue()
    assert not re.search(r"\x1b\[(?!0m|1m)", shown.getvalue())  # bold alone, which suits light and dark terminals
    assert max(map(cell_len, lines)) <= max(width, len("length-matched control: 120.4") if width < 40 else 0)
    words = " ".join(lines).split()
    assert all(word in words for row in ROWS for cell in row for word in cell.split())
    assert ("length-matched control: 120.4" in " ".join(words)) == (width < 80)  # as a list where it does not fit
    if width >= 80:
        assert any(all(cell in line for cell in ROWS[0]) for line in lines)


def test_a_sentence_is_broken_between_words_and_a_path_stays_in_one_piece(
    terminal: Callable[[int], io.StringIO],
) -> None:
    shown = terminal(40)
    printing.announce("It takes a second.")
    printing.tell(SENTENCE)
    printing.suggest([printing.Step("Load them:", (f"car-datasets verify {'x' * 60} --rescore 3",))])
    lines = re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue()).splitlines()
    assert lines[:4] == ["It takes a second.", "The rows are in", SENTENCE.split()[4], "and so are the scores."]
    assert lines[-1] == f"    car-datasets verify {'x' * 60} --rescore 3"
