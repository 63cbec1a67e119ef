"""What holds for every tool that is not ours: it may fail, and it knows a run by a name."""

from liquid_llm.metrics import MetricsWriter, read_metrics
from liquid_llm.trackers import RUNS_FILE, earlier_run, open_trackers, remember_run


def test_a_tool_that_fails_is_said_once_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    """When it is made, in the middle, at the end: rows are all there, and what the disk refuses still counts."""
    got: list[tuple[str, object]] = []

    class Tool:
        fails_at = ""

        def __init__(self, run_dir, resume_step):
            self._do("made", None)

        def log(self, row):
            self._do("row", row["step"])

        def log_sample(self, row):
            self._do("sample", row["step"])

        def close(self):
            self._do("closed", None)

        def _do(self, what, step):
            if self.fails_at == what:
                raise ValueError("no such project at http://me:s3cr3tPassw0rd@host")
            got.append((what, step))

    monkeypatch.setattr("liquid_llm.registry.load", lambda table, name: Tool)
    for fails_at, expected in (
        ("made", []),
        ("row", ["made"]),
        ("sample", ["made", "row", "row"]),
        ("closed", ["made", "row", "row", "sample"]),
        ("", ["made", "row", "row", "sample", "closed"]),
    ):
        Tool.fails_at = fails_at
        got.clear()
        caplog.clear()
        with MetricsWriter(tmp_path, resume_step=None, trackers=open_trackers(["one"], tmp_path, None)) as writer:
            writer.write("train", 1, {"loss": 1.0})
            writer.write("train", 2, {"loss": 1.0})
            writer.log_sample({"step": 2, "prompt": "a", "text": "b"})
        assert [what for what, _ in got] == expected
        assert len(read_metrics(tmp_path)) == 2
        assert caplog.text.count("the tracker one failed and gets nothing more") == (fails_at != "")
        assert "s3cr3t" not in caplog.text


def test_the_name_a_tool_knows_a_run_by_is_kept_until_it_begins_afresh(tmp_path):
    assert earlier_run(tmp_path, "wandb", 4) is None
    remember_run(tmp_path, "wandb", "one")
    remember_run(tmp_path, "mlflow", "two")
    assert (earlier_run(tmp_path, "wandb", 4), earlier_run(tmp_path, "mlflow", 4)) == ("one", "two")
    assert earlier_run(tmp_path, "wandb", None) is None
    (tmp_path / RUNS_FILE).write_text("[")
    assert earlier_run(tmp_path, "wandb", 4) is None
    remember_run(tmp_path, "wandb", "three")
    assert earlier_run(tmp_path, "wandb", 4) == "three"
