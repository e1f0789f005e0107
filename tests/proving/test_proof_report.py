"""proof_report.py: what a proof found, in the folder of its selection, on its page, in its receipt and on its card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from car_datasets import verify
from car_datasets.proving.arms import ARMS
from car_datasets.proving.proof_report import ROWS, TOKENS, Proof, Table, sentences, to_markdown, write_proof
from car_datasets.proving.statistics import SHARE, compare
from car_datasets.publishing.card import Target, render_section
from car_datasets.reporting.page import PROOF_BEGIN, with_proof
from car_datasets.results import read_result

KINDS = ("code", "maths", "lists", "writing")


def planted_proof(control: float = -0.3) -> Proof:
    """Return a proof whose selection wins by some .08 nats, with an arm that a user has given a difficult name."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 99, 80).astype(float)
    gains = {**dict.fromkeys(ARMS, 0.0), "selection": 0.08, "control": control, "a | b": -0.08}
    losses = {
        arm: {seed: tokens * (2 - gain + rng.normal(scale=0.02, size=80)) for seed in range(3)}
        for arm, gain in gains.items()
    }
    nats = compare(losses, tokens, [KINDS[i % 4] for i in range(80)]).to_dict()
    shares = {
        arm: {seed: (rng.random(40) < 0.5 + gain).astype(float) for seed in range(3)} for arm, gain in gains.items()
    }
    kept = compare(shares, np.ones(40), ["words"] * 40, unit=SHARE).to_dict()
    arms = {arm: {"rows": 40.0, "tokens": 2000.0} for arm in gains}
    return Proof(
        format=1,
        model={"name": "a model", "revision": "1", "template": "plain"},
        training={"learning_rate": 0.001},
        seeds=[0, 1, 2],
        pool={
            "rows": 900,
            "selected": 60,
            "grouped_by": "kind of task",
            "left_out": {},
            "held_out": {"equal": 1, "near": 2, "asked": 3, "selected": 4},
        },
        probes={"shipped": {"rows": 80, "tokens": 4000, "left_out": 0, "domains_by": "kind", "domains": {}}},
        before={"shipped": 2.5},
        tables={
            TOKENS: Table(budget=2000, arms=arms, probes={"shipped": nats}, instructions=kept),
            ROWS: Table(budget=40, arms=arms, probes={"shipped": nats}, instructions=None),
        },
        runs=[{"arm": arm, "seed": seed} for arm in gains for seed in range(3)],
        seconds={"selecting": None, "training": 500.0, "evaluating": 30.0},
        versions={"torch": "2"},
        call="sha256:0",
    )


@pytest.fixture(scope="module")
def proved(result: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proved") / "out"
    shutil.copytree(result, folder)
    write_proof(folder, planted_proof(control=0.0))
    write_proof(folder, planted_proof())  # replaces the first
    return folder


def test_a_proof_is_told_in_sentences() -> None:
    told = " ".join(sentences(planted_proof()))
    assert "On shipped, at 2,000 answer tokens per arm, the selection is better than random by .0" in told
    assert "a | b: worse than random by .0" in told
    assert "The control is worse than random by .3" in told
    assert "at 40 rows per arm" in told
    assert "The smallest difference that this run could have shown on shipped is .0" in told
    assert "6 rows of the pool, 4 of them selected, were not trained on" in told
    assert "as the scorer is not at hand; training all 24 runs of a model took 8 min" in told
    costly = planted_proof()
    costly["seconds"]["selecting"] = 9.0
    assert "takes about 9 s on this machine; training" in " ".join(sentences(costly))
    silent = sentences(planted_proof(control=0.0))
    assert "this experiment cannot tell" in silent[0]
    assert "--tokens" in silent[0]


def test_everything_of_a_result_carries_the_proof(proved: Path) -> None:
    result = read_result(proved)
    assert json.loads((proved / "proof.json").read_text())["before"] == {"shipped": 2.5}
    markdown = (proved / "proof.md").read_text()
    assert "| selection | 40 | 2,000 |" in markdown
    assert "| a \\| b |" in markdown
    assert (proved / "plots" / "proof.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result.plots[-1].name == "proof.png"
    page = (proved / "report.html").read_text()
    assert page.count(PROOF_BEGIN) == page.count("Does it train a better model?") == 1
    assert page.index("Does it train a better model?") < page.index("Why rows were selected")
    assert result.receipt is not None
    numbers = result.receipt.proof["tables"][TOKENS]["shipped"]["selection"]
    assert numbers["low"] < 0.08 < numbers["high"]
    assert numbers["verdict"] in markdown


def test_a_result_with_a_proof_is_verified_and_its_card_has_the_section(result: Path, proved: Path) -> None:
    assert verify(proved, source=result.with_name("rows.json")).matches
    read = read_result(proved)
    plots = [f"plots/{plot.name}" for plot in read.plots]
    target = Target("me/x", "default", "selected")
    section = render_section(target, {"selected": 3}, ["output"], read.report, read.receipt, {}, plots)
    proof = section[section.index("## Does it train a better model?") : section.index("## How to reproduce")]
    assert "- On shipped, at 2,000 answer tokens per arm, the selection is better than random" in proof
    assert section.count("plots/proof.png") == proof.count("plots/proof.png") == 2  # its name and its address


def test_markdown_without_a_plot_and_a_page_of_before() -> None:
    assert "proof.png" not in to_markdown(planted_proof(), has_plot=False)
    old = "<main><p>rows</p></main>"
    page = with_proof(old, "<p>one</p>")
    assert page.startswith("<main><p>rows</p>")
    assert page.endswith("</main>")
    assert "<p>one</p>" not in with_proof(page, "<p>two</p>")
