"""The report: every file optional, no string trusted, no spike lost, the same bytes from the same files."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.runs import eval_row, make_run, train_row, write_checkpoints, write_rows

from liquid_llm.errors import StorageError, UsageError
from liquid_llm.report import build_report
from liquid_llm.report.data import Series, read_run
from liquid_llm.report.plot import downsample, label, nice_step, path_data, short_number, smooth, step_axis, value_axis

RELEASE = Path(__file__).parents[1] / "fixtures" / "release-0.1.0"
VOID = {"meta", "link", "path", "line", "use"}


class Page(HTMLParser):
    """A page's elements, checked to be properly nested, with what may run or load set apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str, **having: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag and having.items() <= attrs.items()]

    @property
    def plots(self) -> set[str | None]:
        return {one["data-plot"] for one in self.all("svg", **{"class": "plot"})}

    @property
    def words(self) -> str:
        shown = [part for tag, parts in self.text.items() if tag not in ("script", "style") for part in parts]
        return " ".join(shown)


def page_of(run_dir: Path) -> Page:
    return Page(build_report(run_dir).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------------- the page


def test_a_whole_run_shows_everything(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "liquid-16m-0011223344"))
    assert page.plots == {
        *(
            "loss",
            "loss-by-length",
            "ce-by-type",
            "val-by-type",
            "val-kd",
            "kd",
            "kd-by-type",
            "val-kd-by-type",
            "coverage",
            "l2",
            "loss-log",
        ),
        *("alpha", "lr", "gamma", "throughput", "memory", "grad-norm", "waiting", "padding"),
    }
    for words in (
        "liquid-16m-0011223344",
        "Finished.",
        "15.8M parameters",
        "1.38M",  # tokens trained on
        "student, 512 tokens",
        "math_tool",
        "98,312",  # bytes a token, of a demo's summary
        "<<12*7=84>>84",
        "…/code-*.jsonl",
        "104,201",
        "anneal_share",
        "this CPU has no AMX: float32 is the faster",
        "liquid train --student=liquid-16m",
        "step-00000300.pt",
        "2026-11-22 10:20 UTC",
        "OMP_NUM_THREADS",
    ):
        assert words in page.words, words
    assert "None" not in page.words
    assert "nan" not in re.findall(r"\w+", page.words)
    assert not re.search(r"class=\"notices\"", build_report(tmp_path / "liquid-16m-0011223344").read_text())


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(html)
    policy = str(page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"])
    assert {"default-src 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert "style" not in attributes  # the policy forbids it
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:,"))
    assert "url(" not in html
    assert "@import" not in html
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:  # every reference has its target
        for target in str(attributes.get("aria-labelledby") or "").split():
            assert target in ids
        if str(attributes.get("href") or "").startswith("#"):
            assert str(attributes["href"])[1:] in ids


def test_the_policy_names_the_very_script_and_style(tmp_path: Path) -> None:
    import base64
    import hashlib

    html = build_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for tag in ("style", "script"):
        source = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        assert len(source) == 1
        digest = base64.b64encode(hashlib.sha256(source[0].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in html


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = build_report(run).read_bytes()
    assert build_report(run).read_bytes() == first
    assert build_report(str(run) + "/").read_bytes() == first


def test_every_plot_has_a_sentence_for_those_who_cannot_see_it(tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.all("figure")) == len(page.plots) == len(page.all("svg", **{"class": "plot"}))
    for plot in page.all("svg", **{"class": "plot"}):
        assert plot["role"] == "img"
        assert plot["tabindex"] == "0"
        words = re.search(rf'<desc id="{plot["data-plot"]}-words">(.*?)</desc>', html)
        assert words is not None
        assert re.fullmatch(r"(.*\d;? ?)+\.", words[1])
    words = re.search(r'<desc id="kd-by-type-words">(.*?)</desc>', html)
    assert words is not None
    for type in ("lm", "math_tool", "code"):
        line = (
            rf"{type}: from [\d.]+ at step 2 to [\d.]+ at step 600, lowest [\d.]+ at step \d+, highest [\d.]+ at step"
        )
        assert re.search(line, words[1])


def test_a_sentence_says_where_a_line_begins_and_ends_and_its_extremes(tmp_path: Path) -> None:
    losses = [(1, 3.0), (2, 5.25), (2, 5.5), (3, 0.5), (4, 2.0)]  # a step written twice: the later row counts
    write_rows(tmp_path, [{"kind": "train", "step": step, "loss": loss, "ce": 0.0, "l2": 0} for step, loss in losses])
    page = page_of(tmp_path)
    said = "training objective: from 3 at step 1 to 2 at step 4, lowest 0.5 at step 3, highest 5.5 at step 2; "
    assert f"{said}training cross-entropy: from 0 at step 1 to 0 at step 4" in page.words
    assert page.plots == {"loss"}, "nothing but zeros is no plot"


def test_lines_of_a_plot_have_colours_of_their_own_and_a_legend(tmp_path: Path) -> None:
    html = build_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    for figure in re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL):
        drawn = re.findall(r'<path class="line (c\d(?: d\d)?)"', figure.partition('<svg class="plot"')[2])
        assert len(set(drawn)) == len(drawn)
        keys = re.findall(r'<li><svg class="key (c\d)".*?<path class="line (c\d d\d)" .*?href="(#mark-\d)"', figure)
        assert [style for _, style, _ in keys] == (drawn if len(drawn) > 1 else [])
        assert len({(style[3:], mark) for _, style, mark in keys}) == len(keys), "two differ in their colour alone"
        for colour, style, mark in keys:  # what the legend shows stands on the line
            assert style.startswith(colour)
            assert f'<use class="mark {colour}" href="{mark}" x=' in figure


# ------------------------------------------------------------------------------------------------------ missing parts


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"eval_every": 0}, {"loss-by-length", "val-by-type", "val-kd-by-type"}),
        ({"types": ("lm",)}, set()),
        ({"context_lengths": ()}, {"loss-by-length"}),
        ({"steps": 1, "every": 1, "eval_every": 0}, {"val-by-type"}),
        ({"with_provenance": False, "with_summary": False, "finished": False}, set()),
    ],
)
def test_what_a_run_lacks_is_left_out(tmp_path: Path, changes: dict[str, Any], absent: set[str]) -> None:
    page = page_of(make_run(tmp_path / "run", **changes))
    assert "loss" in page.plots
    assert not absent & page.plots
    assert "None" not in page.words
    headings = page.text["h2"]
    assert ("Provenance" in headings) == ("Configuration" in headings) == changes.get("with_provenance", True)
    assert "Result" in headings, "worked out from the rows where there is no summary"
    if changes.get("finished") is False:
        assert "not finished" in page.words


@pytest.mark.parametrize("name", ["anneal", "anneal-bfloat16", "train/start-ddf2e218cb"])
def test_runs_of_an_earlier_release_are_shown(tmp_path: Path, name: str) -> None:
    run = shutil.copytree(RELEASE / "runs" / name, tmp_path / "run")
    page = page_of(run)
    assert {"loss", "kd", "val-by-type", "lr", "throughput"} <= page.plots
    assert "Memory" in page.words
    assert "best.pt" in page.words
    assert "unreadable" not in page.words


def test_provenance_alone_is_a_run_and_so_is_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "no metrics yet" in page_of(run).words
    (tmp_path / "other").mkdir()
    write_checkpoints(tmp_path / "other", 600, finished=False)
    assert "step-00000300.pt" in page_of(tmp_path / "other").words


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UsageError, match="director") as caught:
            build_report(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_report_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=4)
    (run / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"report\.html"):
        build_report(run)


def test_torn_and_broken_files_become_notices(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=20)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind":"train","step":21')
    assert "torn" in page_of(run).words
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(
        b"".join([*lines[:3], b"\xff{oops\n", b'{"kind":"train","step":1e99}\n', *lines[3:-1]])
    )
    (run / "provenance" / "config.json").write_text("{")
    (run / "provenance" / "manifest_snapshot.jsonl").write_text('{"path": "a"}\nnot json\n[3]\n')
    (run / "provenance" / "datasets_snapshot.yaml").write_text("a: [b")
    (run / "last.meta.json").write_text("[]")
    (run / "best.meta.json").write_text("{")
    (run / "summary.json").write_text('{"rows": [3, {"type": null}], "bytes_per_token": "many", "sample": 4}')
    page = page_of(run)
    for words in ("2 unreadable line(s)", "line 4", "config.json is not valid", "manifest_snapshot.jsonl is not valid"):
        assert words in page.words
    assert "datasets_snapshot.yaml is not valid" in page.words
    assert "best.meta.json is not valid" in page.words
    assert "loss" in page.plots


def test_values_that_are_not_finite_are_gaps_and_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    rows = [train_row(step, 30, ("lm", "a.b"), noise) for step in range(1, 31)]
    rows[9]["loss"], rows[9]["not_finite"] = None, {"loss": "nan", "by_type.a.b.kd": "inf"}
    rows[9]["by_type"]["a.b"]["kd"] = None
    rows[12]["ce"] = math.nan  # an older writer's literal
    rows[15]["kd"] = None  # no signal in that row
    rows[17]["grad_norm"] = 10**400
    write_rows(tmp_path, rows)
    run = read_run(tmp_path)
    for column, step in (("loss", 10), ("a.b/kd", 10), ("ce", 13), ("grad_norm", 18)):
        series = run.train.series[column]
        assert np.isnan(series.values[series.steps == step]).tolist() == [True]
        assert len(series.finite) == 29
    assert 16 not in run.train.series["kd"].steps
    html = build_report(tmp_path).read_text()
    assert "first at step 10: loss = nan, by_type.a.b.kd = inf" in html
    plot = re.search(r'data-plot="grad-norm".*?class="line c0" d="(.*?)"', html, flags=re.DOTALL)
    assert plot is not None
    assert plot[1].count("M") == 2
    assert "NaN" not in html
    assert "Infinity" not in html.replace("Infinity)", "")  # the script's own constant


def test_only_values_that_are_not_finite_still_make_a_page(tmp_path: Path) -> None:
    write_rows(tmp_path, [{"kind": "train", "step": 1, "loss": None, "not_finite": {"loss": "nan"}}])
    assert page_of(tmp_path).plots == set()


def test_rows_of_strange_shapes_do_no_harm(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": 1, "loss": 1.0, "by_type": [1], "ce": "text", "kd": True, "not_finite": 3},
        {"kind": "train", "step": 2, "loss": {"deep": 1}, "by_type": {"lm": 4, "code": {"ce": 2.0, "kd": [1]}}},
        {"kind": ["list"], "step": 3},
        {"kind": "train", "step": -4, "loss": 1.0},
        {"kind": "eval", "step": 4, "val_loss_student": 2.0, "val_loss_student@x": 3.0, "val_loss_student@64": 2.5},
        {"kind": "other", "step": 5},
    ]
    write_rows(tmp_path, rows)
    assert page_of(tmp_path).plots == {"loss", "ce-by-type", "loss-by-length"}


# ----------------------------------------------------------------------------------------------------------- hostile

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    "</title></svg>\"'><b onmouseover=alert(1)>",
    "<!--",
    "&lt;b&gt; & &amp;",
    "]]>",
    "\0\x1b[31m\u202e",
    "\ud800",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_string_of_a_run_can_become_markup(tmp_path: Path, hostile: str) -> None:
    run = tmp_path / hostile.replace("/", "_").replace("\0", "_").encode("utf-8", "replace").decode()
    run.mkdir()
    noise = np.random.default_rng(0)
    types = ("lm", hostile)
    rows = [train_row(step, 9, types, noise) for step in range(1, 9)] + [eval_row(9, 9, types, (128,))]
    rows[0]["not_finite"] = {hostile: hostile}
    rows[1][hostile] = 1.0
    write_rows(run, rows)
    nested = {hostile: {hostile: hostile, "list": [hostile, {hostile: [hostile]}]}, "student": {"spec": hostile}}
    provenance = run / "provenance"
    provenance.mkdir()
    environment = {
        **nested,
        "command": [hostile, "--x"],
        "choices": {hostile: {"value": hostile, "reason": hostile}, "bad": hostile},
        "started_at": hostile,
        "hardware": {"cpu": hostile},
        "earlier_sessions": [{"started_at": hostile, "git": {"commit": hostile}}, hostile],
    }
    (provenance / "config.json").write_text(json.dumps(nested | {"teacher": {"online_id": hostile}}))
    (provenance / "environment.json").write_text(json.dumps(environment))
    (provenance / "data_readiness.json").write_text(json.dumps({"types": {hostile: {hostile: hostile}}, hostile: 1}))
    (provenance / "manifest_snapshot.jsonl").write_text(
        json.dumps({"path": hostile, "type": hostile, "weight": hostile})
    )
    (provenance / "datasets_snapshot.yaml").write_text(
        json.dumps({"name": hostile.encode("utf-8", "replace").decode()})
    )
    (run / "last.meta.json").write_text(
        json.dumps({"step": hostile, "sha256": hostile, "created": hostile, "lr": hostile})
    )
    row = {"type": hostile, "val_loss_before": hostile, "val_kd_after": hostile}
    sample = {"prompt": hostile, "text": hostile}
    of_student = {"student": hostile, "prompt": hostile, "text": hostile}
    told = {"rows": [row, {"student": hostile, "ce": hostile}], "sentences": [hostile], "samples": [of_student]}
    (run / "summary.json").write_text(
        json.dumps({**told, "bytes_per_token": hostile, "sample": sample, "seconds": hostile})
    )
    page = page_of(run)
    plain = page_of(make_run(tmp_path / "plain"))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"ul"}
    names = {name for _, attributes in plain.elements for name in attributes}
    assert {name for _, attributes in page.elements for name in attributes} <= names
    assert len(page.all("script")) == 1 + len(page.plots)
    for data in re.findall(
        r'<script type="application/json" id="[\w-]+">(.*?)</script>', build_report(run).read_text()
    ):
        assert json.loads(data)["lines"]
    if "\0" not in hostile and "\ud800" not in hostile:
        assert page.words.count(hostile) > 10  # shown as the text it is


# ---------------------------------------------------------------------------------------------------------- long runs


@pytest.mark.slow
def test_a_long_run_is_quick_small_and_keeps_its_spikes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    kinds = ("lm", "math_tool", "code")
    rest = [json.dumps(train_row(step, 400, kinds, noise)).partition('"ce"')[2] for step in range(1, 401)]
    spikes = {23_001: 77.5, 39_999: -3.25}
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 40_001):
            loss = spikes.get(step, 5.0 + (step % 7) * 0.01)
            file.write(f'{{"kind": "train", "step": {step}, "loss": {loss}, "ce"{rest[step % 400]}\n')
            if step % 400 == 0:
                file.write(json.dumps(eval_row(step, 40_000, kinds, (256, 512))) + "\n")
    reference = _seconds(lambda: _parse_every_line(tmp_path / "metrics.jsonl"))
    seconds = _seconds(lambda: build_report(tmp_path))
    # A second on a quiet machine; here measured against the least any reader needs, parsing each line.
    assert seconds < max(1.5, 3.0 * reference), (seconds, reference)
    page = (tmp_path / "report.html").read_text()
    assert len(page) < 1_000_000
    assert "highest 77.5 at step 23,001" in page
    assert "lowest −3.25 at step 39,999" in page
    faint = re.search(r'data-plot="loss".*?class="faint c\d" d="(.*?)"', page, flags=re.DOTALL)
    assert faint is not None
    heights = _heights(faint[1])
    assert max(heights) - min(heights) > 8500  # both spikes are drawn, nearly the whole height of the plot


def _parse_every_line(path: Path) -> None:
    with path.open("rb") as lines:
        for line in lines:
            json.loads(line)


def _seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _heights(path: str) -> list[int]:
    heights: list[int] = []
    for command, down in re.findall(r"([Ml])-?\d+ (-?\d+)", path):
        heights.append(int(down) + (heights[-1] if command == "l" else 0))
    return heights


# ------------------------------------------------------------------------------------------------- series and scales

values_with_gaps = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=3000)


@settings(deadline=None)
@given(values_with_gaps, st.integers(10, 400))
def test_downsampling_keeps_extremes_ends_and_order(values: list[float], max_points: int) -> None:
    series = Series(np.arange(len(values), dtype=np.float64), np.array(values))
    thin = downsample(series, max_points)
    assert len(thin) <= max_points
    assert (np.diff(thin.steps) > 0).all()
    assert thin.steps[0] == 0
    assert thin.steps[-1] == len(values) - 1
    assert np.array_equal(thin.values, series.values[thin.steps.astype(int)], equal_nan=True)
    if len(series.finite):
        assert thin.finite.values.min() == series.finite.values.min()
        assert thin.finite.values.max() == series.finite.values.max()


@settings(deadline=None)
@given(values_with_gaps)
def test_smoothing_stays_within_the_values_and_leaves_lines_straight(values: list[float]) -> None:
    series = Series(np.arange(len(values), dtype=np.float64), np.array(values))
    soft = smooth(series, 300)
    if soft is None:
        assert len(values) < 120, "few rows are readable as they are"
        return
    assert len(soft) <= 300
    if len(series.finite):
        room = 1e-6 * (1 + np.abs(series.finite.values).max())
        assert series.finite.values.min() - room <= soft.finite.values.min()
        assert soft.finite.values.max() <= series.finite.values.max() + room
    flat = smooth(Series(series.steps, np.full(len(values), 3.5)), 300)
    assert flat is not None
    assert flat.values == pytest.approx(3.5)


def test_smoothing_is_centred_and_evens_out_noise() -> None:
    steps = np.arange(4000, dtype=np.float64)
    soft = smooth(Series(steps, 2 * steps), 300)
    assert soft is not None
    assert soft.values[2:-2] == pytest.approx(2 * soft.steps[2:-2])  # the window never shrinks to a single noisy row
    noise = smooth(Series(steps, np.random.default_rng(0).normal(size=4000)))
    assert noise is not None
    assert noise.values.std() < 0.15


reals = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(reals, st.floats(0, 1e9).filter(lambda value: value == 0 or value > 1e-9), st.booleans())
def test_axes_hold_their_values_and_have_sensible_ticks(low: float, room: float, from_zero: bool) -> None:
    high = low + room
    axis = value_axis(low, high, from_zero=from_zero)
    assert axis.low < axis.high
    positions = axis.position(np.array([low, high, 0.0 if from_zero else low]))
    assert (positions >= -1e-9).all()
    assert (positions <= 1 + 1e-9).all()
    assert 1 <= len(axis.ticks) <= 13
    assert all(axis.low - 1e-9 * abs(axis.low) <= tick <= axis.high + 1e-9 * abs(axis.high) for tick in axis.ticks)


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_steps_have_whole_distinct_ticks(first: int, count: int) -> None:
    axis = step_axis(first, first + count)
    assert all(float(tick).is_integer() for tick in axis.ticks)
    assert 1 <= len(axis.ticks) <= 8
    assert len(set(map(label, axis.ticks))) == len(axis.ticks)


@given(st.floats(1e-12, 1e12))
def test_nice_steps(rough: float) -> None:
    step = nice_step(rough)
    assert rough * (1 - 1e-6) <= step <= rough * 2.01
    digits = step / 10.0 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(digits - good) for good in (1, 2, 2.5, 5)) < 1e-6


@pytest.mark.parametrize(
    ("tick", "text"),
    [
        *[
            (0.0, "0"),
            (2.5, "2.5"),
            (5.0, "5"),
            (0.75, "0.75"),
            (1000.0, "1000"),
            (40_000.0, "40k"),
            (12_500.0, "12.5k"),
        ],
        *[(1.5e6, "1.5M"), (2e-4, "2e−4"), (2.5e-4, "2.5e−4"), (-0.5, "−0.5"), (3 * 0.1, "0.3"), (0.005, "0.005")],
    ],
)
def test_labels_of_ticks(tick: float, text: str) -> None:
    assert label(tick) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (2.34567, "2.346"), (10.8, "10.8"), (12345.6, "12,346"), (2e-4, "2e−4"), (1.2345e-7, "1.235e−7")],
        *[(123456789.0, "1.235e8"), (-3.25, "−3.25"), (0.00123, "0.00123"), (600.0, "600")],
    ],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short_number(value) == text


def test_paths_break_at_gaps() -> None:
    across = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    assert path_data(across, np.array([1.0, 0.5, math.nan, 0.5, 0.0])) == "M0 0h0l2500 5000M7500 5000h0l2500 5000"
    assert path_data(across[:1], np.array([math.nan])) == ""
