"""The report in a real browser: plots have size at every width, values can be read out, nothing else is loaded."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from dataclasses import dataclass, field
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tests.support.runs import make_run, write_rows

from liquid_llm.cli.main import main
from liquid_llm.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

# Loads the report in a frame of a given width, measures every plot, moves the pointer and presses keys over each.
PROBE = """<!doctype html><body><iframe id="frame" src="report.html" width="WIDTH" height="900"></iframe><script>
addEventListener("load", () => {
  const page = document.getElementById("frame").contentDocument, view = page.defaultView;
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.width, r.height]; };
  const plots = [...page.querySelectorAll("svg.plot")].map((plot) => {
    const area = plot.getBoundingClientRect(), figure = plot.closest("figure"), before = area.top;
    const shown = () => [...figure.querySelectorAll(".tip")].filter((tip) => tip.style.display !== "none");
    const said = () => shown().map((tip) => tip.innerText).join();
    const point = (share) => plot.dispatchEvent(new view.PointerEvent("pointermove",
      { clientX: area.left + share * area.width, clientY: area.top + 5, bubbles: true }));
    point(0.5);
    const middle = said();
    const bullets = new Set([...figure.querySelectorAll(".tip svg.key")].map((i) => view.getComputedStyle(i).color));
    const tip = figure.querySelector(".tip").getBoundingClientRect(), card = figure.getBoundingClientRect();
    const inside = tip.left >= card.left - 1 && tip.right <= card.right + 1;
    plot.dispatchEvent(new view.PointerEvent("pointerleave"));
    const left = said();
    plot.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowLeft" }));
    const last = said();
    plot.dispatchEvent(new view.KeyboardEvent("keydown", { key: "Escape" }));
    plot.focus();
    const around = view.getComputedStyle(figure), ring = [around.outlineStyle, around.outlineWidth,
      view.getComputedStyle(plot).outlineStyle].join();
    const cut = [...plot.querySelectorAll(".grid text")].filter((label) => {
      const at = label.getBoundingClientRect();
      return at.width && (at.left < card.left || at.right > card.right || at.bottom > card.bottom);
    }).map((label) => label.textContent);
    const labels = [...plot.querySelectorAll(".grid text")].map((label) => label.getBoundingClientRect());
    const rows = labels.filter((r) => r.width);
    const overlaps = rows.filter((a, i) => rows.some((b, j) => j > i && a.left < b.right - 1 && b.left < a.right - 1
      && a.top < b.bottom - 3 && b.top < a.bottom - 3)).length;
    const look = (path) => [view.getComputedStyle(path).stroke, view.getComputedStyle(path).strokeDasharray].join();
    return {
      name: plot.dataset.plot, area: box(plot), lines: [...plot.querySelectorAll("path.line, path.faint")].map(box),
      strokes: new Set([...plot.querySelectorAll("path.line")].map(look)).size,
      numLines: plot.querySelectorAll("path.line").length,
      outside: [...plot.querySelectorAll("path.line")].filter((path) => {
        const drawn = path.getBBox(), map = path.getScreenCTM();  // without the stroke's width
        const corner = (x, y) => view.DOMPoint.fromPoint({ x, y }).matrixTransform(map);
        const a = corner(drawn.x, drawn.y), b = corner(drawn.x + drawn.width, drawn.y + drawn.height);
        return a.x < area.left - 1 || b.x > area.right + 1 || a.y < area.top - 1 || b.y > area.bottom + 1;
      }).length, middle, left, last, inside, ring, cut, overlaps,
      bullets: bullets.size, moved: Math.abs(plot.getBoundingClientRect().top - before),
    };
  });
  const root = page.documentElement;
  const result = { plots, overflow: root.scrollWidth - root.clientWidth,
    tiles: page.querySelectorAll(".tiles > div").length, paper: view.getComputedStyle(page.body).backgroundColor };
  document.body.appendChild(document.createElement("pre")).textContent = "RESULT" + JSON.stringify(result) + "END";
});
</script></body>
"""


@dataclass
class Visit:
    """What came of opening a page."""

    dom: str
    console: list[str]
    requested: list[str] = field(default_factory=list)

    @property
    def result(self) -> dict[str, Any]:
        found = re.search(r"RESULT(\{.*\})END", self.dom, flags=re.DOTALL)
        assert found, f"the probe wrote nothing: {self.dom[-500:]}"
        values: dict[str, Any] = json.loads(unescape(found[1]))
        return values


def visit(url: str, profile: Path, *options: str) -> Visit:
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={profile}", "--enable-logging=stderr", "--window-size=1400,1000", *options),
            *("--dump-dom", url),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return Visit(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    requested: list[str]

    def do_GET(self) -> None:
        self.requested.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None: ...


def serve_and_visit(folder: Path, profile: Path, width: int, *options: str) -> Visit:
    """Open ``folder/report.html`` in a frame of ``width`` pixels, over a local server that notes what is asked for."""
    (folder / "probe.html").write_text(PROBE.replace("WIDTH", str(width)), encoding="utf-8")
    handler = type("Handler", (_Quiet,), {"requested": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            visited = visit(f"http://127.0.0.1:{server.server_port}/probe.html", profile, *options)
        finally:
            server.shutdown()
            thread.join()
    return Visit(visited.dom, visited.console, handler.requested)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("runs") / "liquid-16m-browser")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del next(row for row in rows if row["kind"] == "train" and row["step"] == 600)["by_type"]["code"]
    write_rows(run, rows)
    return build_report(run).parent


@pytest.mark.parametrize(
    ("width", "options"), [(1280, ()), (400, ()), (1280, ("--blink-settings=preferredColorScheme=0",))]
)
def test_plots_are_drawn_and_the_console_stays_empty(
    run_dir: Path, tmp_path: Path, width: int, options: tuple[str, ...]
) -> None:
    visited = serve_and_visit(run_dir, tmp_path, width, *options)
    assert visited.console == []
    assert set(visited.requested) <= {"/probe.html", "/report.html", "/favicon.ico"}  # the probe's own icon, if any
    result = visited.result
    assert result["overflow"] <= 0, "the page is wider than its window"
    assert result["tiles"] == 7
    assert len(result["plots"]) == 19
    for plot in result["plots"]:
        name = plot["name"]
        assert plot["area"][0] > 180, name
        assert plot["area"][1] > 150, name
        assert plot["outside"] == 0, f"{name}: a line leaves its plot"
        assert plot["strokes"] == plot["numLines"], f"{name}: two lines look the same"
        for size in plot["lines"]:
            assert size[0] > (0.35 if name == "loss-log" else 0.9) * plot["area"][0], name
        assert plot["inside"], f"{name}: the read-out leaves its card"
        assert re.match(r"step [\d,]+\n", plot["middle"]), name
        assert plot["left"] == ""
        assert plot["moved"] < 0.5, f"{name}: reading values out moves the page"
        assert "step 600\n" in plot["last"], name
        assert plot["ring"] == "solid,2px,none", f"{name}: the focus is shown around the card, labels and all"
        assert plot["cut"] == [], name
        assert plot["overlaps"] == 0, f"{name}: labels run into one another"
    by_name = {plot["name"]: plot for plot in result["plots"]}
    assert max(size[1] for size in by_name["loss"]["lines"]) > 0.5 * by_name["loss"]["area"][1]
    assert "math_tool" in by_name["kd-by-type"]["middle"]
    assert by_name["kd-by-type"]["bullets"] == 3
    lm, math_tool, code = by_name["ce-by-type"]["last"].splitlines()[-3:]
    assert re.match(r"lm\t[\d.]+$", lm)
    assert re.match(r"math_tool\t[\d.]+$", math_tool)
    assert re.match(r"code \(step 598\)\t[\d.]+$", code), "a value of another step says so"
    light = [int(value) for value in re.findall(r"\d+", result["paper"])[:3]]
    assert (min(light) > 200) != bool(options), "the colour scheme follows the reader's"


def test_it_opens_from_the_disk_as_a_reader_opens_it(run_dir: Path, tmp_path: Path) -> None:
    visited = visit((run_dir / "report.html").as_uri(), tmp_path)
    assert visited.console == []
    assert "liquid-16m-browser" in visited.dom
    assert visited.dom.count('<svg class="plot"') == 19


@pytest.mark.parametrize("changes", [{"steps": 1, "every": 1, "eval_every": 0}, {"eval_every": 600, "types": ("lm",)}])
def test_short_runs_draw_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run", with_summary=False, with_provenance=False, **changes)
    build_report(run)
    visited = serve_and_visit(run, tmp_path / "profile", 1280)
    assert visited.console == []
    assert visited.result["plots"]
    for plot in visited.result["plots"]:
        assert plot["lines"][0][0] > 100 or changes["steps"] == 1, plot["name"]
        assert plot["outside"] == 0


def test_several_runs_on_a_page_are_drawn_and_read_out(run_dir: Path, tmp_path: Path) -> None:
    shorter = make_run(tmp_path / "shorter", steps=300, types=("lm", "math_tool", "code"), seed=1)
    (tmp_path / "page").mkdir()
    assert main(["compare", str(run_dir), str(shorter), f"--output={tmp_path / 'page' / 'report.html'}"]) == 0
    visited = serve_and_visit(tmp_path / "page", tmp_path / "profile", 400)
    assert visited.console == []
    assert set(visited.requested) <= {"/probe.html", "/report.html", "/favicon.ico"}
    result = visited.result
    assert result["overflow"] <= 0
    assert len(result["plots"]) >= 14
    for plot in result["plots"]:
        name = plot["name"]
        assert plot["outside"] == plot["overlaps"] == 0, name
        assert plot["strokes"] == plot["numLines"], name
        assert plot["inside"], name
        assert plot["cut"] == [], name
    by_name = {plot["name"]: plot for plot in result["plots"]}
    assert re.match(r"step 300\nliquid-16m-browser\t[\d.]+\nshorter\t[\d.]+$", by_name["loss"]["middle"])
    assert re.match(r"step 600\nliquid-16m-browser\t[\d.]+$", by_name["loss"]["last"]), "the other ended before"
    assert re.match(r"token [\d,]+\n", by_name["loss-tokens"]["middle"])
    assert re.match(r"second [\d,]+\n", by_name["loss-seconds"]["middle"])


def test_hostile_strings_stay_text_in_a_browser(tmp_path: Path) -> None:
    hostile = "</script><img src=//example.invalid/x onerror=\"document.title='x'\"><script>document.title='x'</script>"
    run = make_run(tmp_path / "run", types=("lm", hostile), steps=40, eval_every=20)
    build_report(run)
    visited = serve_and_visit(run, tmp_path / "profile", 1280)
    assert visited.console == []
    assert set(visited.requested) <= {"/probe.html", "/report.html", "/favicon.ico"}
    assert hostile in visited.result["plots"][2]["middle"]


def test_this_test_would_notice_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<script>console.error('seen'); missing()</script>")
    console = visit((tmp_path / "bad.html").as_uri(), tmp_path / "profile").console
    assert any("seen" in line for line in console)
    assert any("missing is not defined" in line for line in console)
