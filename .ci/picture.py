"""Draw the pictures of README and pages anew: `python .ci/picture.py docs/images`.

Runs the demo, and writes strip.png (the terminal, the map and the head of report.html in one picture) and map.png. It needs
the extras `plots` and `test`, and a browser: playwright's, or `chromium` on the path.
"""

from __future__ import annotations

import base64
import html
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

WIDTH, SCALE = 900, 2  # of the strip as it is shown, and pixels per point of the file
COLUMNS = 80
MOST_BYTES = 400_000
COMMAND = "car-datasets demo --output demo-result"
ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "car_datasets" / "assets" / "instructions.json"

PAGE = """<!doctype html><meta charset="utf-8"><style>
* {{ box-sizing: border-box; }}
body {{ margin: 0; width: {width}px; background: transparent; font: 13px "DejaVu Sans", sans-serif; }}
#strip {{ display: grid; grid-template-columns: 548px 1fr; grid-template-rows: 1fr 1fr; gap: 12px; padding: 2px; }}
.card {{ border: 1px solid #8c959f; border-radius: 8px; overflow: hidden; background: #fff; min-height: 0;
  display: flex; flex-direction: column; }}
.card h1 {{ margin: 0; padding: 5px 10px; font-size: 12px; font-weight: 600; color: #24292f; background: #e6eaef; }}
.card img {{ width: 100%; display: block; }}
#terminal {{ grid-row: 1 / 3; background: #14191f; }}
#terminal h1 {{ color: #d0d7de; background: #2b323b; }}
pre {{ margin: 0; padding: 8px 10px; color: #d9e0e8; font: 10.9px/1.32 "DejaVu Sans Mono", monospace; }}
.shown {{ flex: 1; min-height: 0; overflow: hidden; position: relative; }}
.shown img {{ position: absolute; inset: 0; }}
#map img {{ height: 100%; object-fit: contain; }}
</style><div id="strip">
<div class="card" id="terminal"><h1>One command</h1><pre>{terminal}</pre></div>
<div class="card" id="map"><h1>The map: selected rows are ringed</h1><div class="shown"><img src="{map}"></div></div>
<div class="card"><h1>report.html</h1><div class="shown"><img src="{report}"></div></div>
</div>"""


def run(folder: Path, line: str) -> str:
    """Return what a command prints in a folder, to a terminal of 80 columns, with its colours."""
    terminal = {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "car_datasets", *shlex.split(line)[1:]],
        cwd=folder,
        env={**os.environ, **terminal},
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        check=True,
    )
    return done.stdout


def as_html(printed: str) -> str:
    """Return a terminal's text as HTML, in its colours."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(printed.rstrip()))
    return console.export_html(inline_styles=True, code_format="{code}")


def as_address(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def draw_strip(browser: Browser, folder: Path, printed: str, drawn_map: bytes) -> bytes:
    """Return the strip as a PNG with a transparent background."""
    # The report as on a telephone, so that its text can be read when the picture is small.
    report = browser.new_page(viewport={"width": 500, "height": 700}, device_scale_factor=SCALE)
    report.goto((folder / "report.html").resolve().as_uri())
    report.wait_for_timeout(1_000)  # the map of the page is drawn by a script
    seen = report.screenshot()
    terminal = f'<b style="color:#7ee787">$</b> <b>{html.escape(COMMAND)}</b>\n{as_html(printed)}'
    page = browser.new_page(viewport={"width": WIDTH, "height": 1_000}, device_scale_factor=SCALE)
    page.set_content(
        PAGE.format(width=WIDTH, terminal=terminal, map=as_address(drawn_map), report=as_address(seen)),
        wait_until="load",
    )
    return page.locator("#strip").screenshot(omit_background=True)


def write_small(data: bytes, path: Path) -> None:
    """Write a picture with as many colours as fit into the most bytes that a visitor should load."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    for colours in (256, 128, 64, 32):
        picture.quantize(colours, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size:,} bytes, {colours} colours")
            return
    sys.exit(f"{path} has {path.stat().st_size:,} bytes with 32 colours; the most is {MOST_BYTES:,}.")


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as play:
        folder = Path(temporary)
        printed = run(folder, COMMAND)
        run(folder, f"car-datasets curate {shlex.quote(str(SAMPLE))} --output map --budget 60 --projection tsne")
        drawn_map = (folder / "map" / "plots" / "plot_map.png").read_bytes()
        browser = play.chromium.launch(executable_path=shutil.which("chromium"))
        strip = draw_strip(browser, folder / "demo-result", printed, drawn_map)
        browser.close()
        write_small(drawn_map, target / "map.png")
        write_small(strip, target / "strip.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
