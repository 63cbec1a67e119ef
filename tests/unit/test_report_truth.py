"""The report says what is so, at the step where it is so, and nothing of whose machine it was."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.runs import eval_row, make_run, write_rows
from tests.unit.test_report import Page, page_of

from liquid_llm.errors import UsageError
from liquid_llm.report import build_report
from liquid_llm.report.charts import choose_figures
from liquid_llm.report.compare import label_runs
from liquid_llm.report.data import read_run
from liquid_llm.report.private import shorten, without_places
from liquid_llm.report.runs import find_runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


def rows_of(html: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, its head first."""
    part = html.partition(f'<h2 id="{heading}">')[2].partition("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", part)
    return [
        [unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------- figures


def test_no_plot_lays_divergence_of_training_over_that_of_validation(run: Path, html: str) -> None:
    figures = [one for group in choose_figures(read_run(run)).values() for one in group.figures]
    by_key = {one.key: one for one in figures}
    for key, side in (("kd", "Training"), ("kd-by-type", "Training"), ("val-kd", "Validation")):
        assert by_key[key].title.startswith(side)
    assert len(by_key["kd"].lines) == len(by_key["val-kd"].lines) == 1
    assert "before the factor T²" in by_key["kd"].caption, "what the objective makes of it is another figure"
    assert "at temperature 1" in by_key["val-kd"].caption


def test_a_checkpoint_has_the_rate_and_loss_of_its_own_step(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    head, *table = rows_of(build_report(folder).read_text(), "checkpoints")
    assert (head[0], head[6], head[7]) == ("file", "learning rate", "validation loss")
    for cells in table:
        step = int(cells[1])
        rate = next(row["lr"] for row in rows if row["kind"] == "train" and row["step"] == step)
        loss = next(row["val_loss_student"] for row in rows if row["kind"] == "eval" and row["step"] == step)
        assert float(cells[6]) == pytest.approx(rate, rel=0.01), "not the highest of the run"
        assert float(cells[7]) == pytest.approx(loss, rel=0.01), "not the best so far"


def test_a_checkpoint_between_evaluations_has_no_loss_and_the_last_rate_before_it(tmp_path: Path) -> None:
    rows = [{"kind": "train", "step": step, "lr": 0.1 * step} for step in (1, 3)]
    write_rows(tmp_path, [*rows, {"kind": "eval", "step": 3, "val_loss_student": 5.0}])
    (tmp_path / "last.meta.json").write_text(json.dumps({"step": 4, "sha256": "a", "lr": 9.0, "best_val_loss": 1.0}))
    cells = rows_of(build_report(tmp_path).read_text(), "checkpoints")[1]
    assert (float(cells[6]), cells[7]) == (pytest.approx(0.3, rel=0.01), "–")


def test_names_of_one_content_are_one_row(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    same = (folder / "final.meta.json").read_text()
    for name in ("last", "step-00000600"):
        (folder / f"{name}.meta.json").write_text(same)
    names = [cells[0] for cells in rows_of(build_report(folder).read_text(), "checkpoints")[1:]]
    assert names == ["step-00000300.pt", "best.pt", "final.pt, last.pt, step-00000600.pt (not here)"]


def test_the_result_has_the_teacher_the_gap_and_what_compares_between_tokenizers(tmp_path: Path) -> None:
    def row(step: int, loss: float) -> dict[str, Any]:
        one = eval_row(step, 10, ("lm",), ())
        both = {"val_loss_teacher": 2.0, "val_bits_per_byte": 0.25 * loss, "val_bits_per_byte_teacher": 0.5}
        one |= {"val_loss_student": loss, **both}
        one["by_type"]["lm"] |= {"val_loss": loss, **both}
        return one

    write_rows(tmp_path, [row(0, 6.0), row(10, 3.0)])
    head, *table = rows_of(build_report(tmp_path).read_text(), "result")
    assert [cells[0] for cells in table] == ["all", "lm"]
    for cells in table:
        found = dict(zip(head, cells, strict=True))
        assert found["gap to the teacher closed"] == "75 %"
        assert float(found["perplexity"]) == pytest.approx(math.e**3, abs=0.1)
        assert (found["bits a byte"], found["the teacher's"]) == ("0.750", "0.500")


def test_level_lines_are_a_sentence_and_a_gap_keeps_its_plot(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"kind": "train", "step": step, "kd_temperature": 2.0, "grad_norm": 1.5, "lr": 0.1 * step}
        | {"by_type": {"lm": {"kd_coverage": 1.0}, "code": {"kd_coverage": 1.0}}}
        for step in (1, 2, 3)
    ]
    write_rows(tmp_path, rows)
    page = page_of(tmp_path)
    assert page.plots == {"lr"}
    for words in (
        "KD temperature T: 2 at every step.",
        "Positions with a teacher signal: 100 % of labelled (lm, code) at every step.",
        "Gradient norm: 1.5 before clipping at every step.",
    ):
        assert words in page.words
    rows[1]["kd_temperature"], rows[1]["not_finite"] = None, {"kd_temperature": "nan"}
    write_rows(tmp_path, rows)
    assert page_of(tmp_path).plots == {"lr", "temperature"}


@pytest.mark.parametrize(("clip", "drawn"), [(1.0, True), (1000.0, False), (0.0, False), (None, False)])
def test_gradients_are_shown_with_the_line_that_they_are_clipped_at(tmp_path: Path, clip: Any, drawn: bool) -> None:
    folder = make_run(tmp_path / "run", steps=40)
    config = json.loads((folder / "provenance" / "config.json").read_text())
    config["optimizer"]["grad_clip"] = clip
    (folder / "provenance" / "config.json").write_text(json.dumps(config))
    figures = [one for group in choose_figures(read_run(folder)).values() for one in group.figures]
    norm = next(one for one in figures if one.key == "grad-norm")
    limits = [line for line in norm.lines if "clipped" in line.label]
    assert bool(limits) == drawn
    if drawn:
        assert set(limits[0].series.values) == {clip}
        assert "<desc" in build_report(folder).read_text()
    assert ("far below 1000" in norm.caption) == (clip == 1000.0)


# ---------------------------------------------------------------------------------------------------------------- axes


def test_every_horizontal_axis_has_its_name_and_large_plots_have_tokens_below(html: str) -> None:
    figures = re.findall(r"<figure.*?</figure>", html, flags=re.DOTALL)
    assert figures
    for figure in figures:
        assert re.search(r'<text class="name" [^>]*>step</text>', figure)
        tokens = re.search(r'<text class="name" [^>]*>tokens</text>(.*?)<line', figure)
        assert (tokens is not None) == ("small" not in figure[:40] and "loss-log" not in figure[:60])
        if tokens is not None:  # 2,304 a step
            steps = re.findall(r'y="100%" dy="1.5em" text-anchor="middle">([^<]*)<', figure)
            assert steps == ["0", "200", "400", "600"]
            assert re.findall(r">([^<]+)</text>", tokens[1]) == ["0", "461k", "922k", "1.38M"]


def test_a_first_number_that_would_run_into_the_name_of_its_axis_is_left_out(tmp_path: Path) -> None:
    write_rows(
        tmp_path, [{"kind": "train", "step": step, "loss": 1e-4 * step} for step in range(20_000, 40_001, 5_000)]
    )
    figure = re.findall(r"<figure.*?</figure>", build_report(tmp_path).read_text(), flags=re.DOTALL)[0]
    shown = re.findall(r'y="100%" dy="1.5em" text-anchor="middle">([^<]*)<', figure)
    assert shown == ["25k", "30k", "35k", "40k"]


def test_a_logarithmic_axis_leaves_step_0_out_and_keeps_the_rest(html: str) -> None:
    data = json.loads(re.findall(r'id="loss-log-data">(.*?)</script>', html)[0])
    assert data["log"] is True
    assert data["x"] == [2, 600]
    assert all(step > 0 for line in data["lines"] for step in line["steps"])


# --------------------------------------------------------------------------------------------------- keyboard and folds


def test_boxes_that_scroll_are_reached_by_keyboard_and_no_head_is_empty(html: str) -> None:
    page = Page(html)
    boxes = [attrs for _, attrs in page.elements if "scroll" in str(attrs.get("class"))]
    assert boxes
    for box in boxes:
        assert box["tabindex"] == "0"
        assert box["role"] == "group", "no landmark: there are too many"
        assert box["aria-label"]
    assert not re.search(r"<th[^>]*></th>", html)


def test_configuration_and_software_are_folded(html: str) -> None:
    for heading, words in (("configuration", "anneal_share"), ("provenance", "transformers")):
        section = html.partition(f'<h2 id="{heading}">')[2].partition("<h2")[0]
        assert re.search(rf"<details><summary>[^<]+</summary>.*{words}.*</details>", section)
    assert " open" not in " ".join(re.findall(r"<details[^>]*>", html))


# -------------------------------------------------------------------------------------------------------------- private


def test_a_page_that_is_passed_on_tells_no_path_and_no_machine(tmp_path: Path) -> None:
    home = "/home/ada.l/very private"
    folder = make_run(tmp_path / "run")
    place = folder / "provenance"
    environment = json.loads((place / "environment.json").read_text())
    environment["hardware"]["host"] = "ada-laptop"
    environment["variables"] |= {"HF_HOME": f"{home}/hf", "MASTER_ADDR": "10.1.2.3", "SLURM_NODELIST": "node[1-4]"}
    environment["choices"]["fa"] = {"value": "no", "reason": "wheel /home/ada.l/wheels/fa.whl is for ada-laptop alone"}
    environment["command"] += [f"--data_cache={home}/tokens", "/home/ada.l/bin/liquid", "--signal=x=store:gs://b/sig"]
    environment["teachers"] = {"online": {"id": "SmolLM2-135M", "types": ["lm"], "spec": f"online:{home}/teacher"}}
    environment["earlier_sessions"] = [
        {"started_at": "2026-11-20T01:00:00Z", "hardware": {"host": host}} for host in ("spot-77", "ada-laptop")
    ]
    (place / "environment.json").write_text(json.dumps(environment))
    config = json.loads((place / "config.json").read_text())
    config["student"]["spec"], config["teacher"]["online_id"] = f"{home}/mine", f"{home}/teacher"
    config["data"]["manifest"] = "file:///home/ada.l/data/m.jsonl"
    (place / "config.json").write_text(json.dumps(config))
    html = build_report(folder).read_text(encoding="utf-8")
    for secret in ("ada", "private", "10.1.2.3", "node[1-4]", "spot-77"):
        assert secret not in html, secret
    words = re.sub(r"<[^>]*>", " ", html)
    for kept in ("…/m.jsonl", "gs://b/sig", "--data_cache=…/tokens", "…/fa.whl is for"):
        assert kept in words, kept
    assert re.search(r"Student <b>mine</b>.*Taught by <b>SmolLM2-135M</b> \(lm\)", html)
    assert re.findall(r"<td[^>]*>(1|this one, 2)</td>", html) == ["1", "this one, 2"], "machines by number"


names = st.text(st.characters(categories=["L", "N"], include_characters="._-"), min_size=1, max_size=8).filter(
    lambda name: name.strip(".") != ""
)


@given(st.lists(names, min_size=2, max_size=5), st.sampled_from(["{}", "--x={}", "store:{}", "see {} there", "({})"]))
def test_of_a_path_the_last_part_stays(parts: list[str], frame: str) -> None:
    path = "/" + "/".join(parts)
    shown = shorten(frame.format(path))
    kept = parts[-1] if frame != "see {} there" else parts[-1].rstrip(".,;:")
    assert shown.startswith(frame.partition("{}")[0] + "…/" + kept.rstrip("."))
    assert path not in shown


@given(st.sampled_from(["gs", "s3", "https", "hf"]), st.lists(names, min_size=1, max_size=4))
def test_urls_and_plain_words_stay_as_they_are(scheme: str, parts: list[str]) -> None:
    for text in (f"{scheme}://{'/'.join(parts)}", f"a {scheme}://{'/'.join(parts)} b", f"org/{parts[0]}", "1/2 and/or"):
        assert shorten(text) == text
    value = {"list": ["gs://x/y", 3, None], "nested": {"z": True}}
    assert without_places(value) == value


# ---------------------------------------------------------------------------------------------------------------- place


def test_a_folder_of_runs_is_refused_with_their_names(tmp_path: Path) -> None:
    for name in ("one", "deep/er/two"):
        write_rows(_made(tmp_path / name), [{"kind": "train", "step": 1, "loss": 1.0}])
    (_made(tmp_path / "store") / "store.json").write_text("{}")
    _made(tmp_path / "store" / "provenance")
    assert find_runs(str(tmp_path)) == [str(tmp_path / "deep/er/two"), str(tmp_path / "one")]
    with pytest.raises(UsageError, match=r"2 below it: .*two, .*one\. .*liquid compare"):
        build_report(tmp_path)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=2, max_size=6))
def test_each_run_has_a_label_of_its_own_that_is_the_end_of_its_path(places: set[tuple[str, ...]]) -> None:
    found = label_runs(["/" + "/".join(parts) for parts in places])
    assert len(set(found.values())) == len(places)
    assert all(f"/{place}".endswith(f"/{label}") for place, label in found.items())
