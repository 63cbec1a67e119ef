"""examples/slurm as a whole, on a pretended Slurm: stopped, back in the queue, run again. And `accelerate launch`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import forked
from tests.support.launchers import run_script
from tests.support.pythons import Pythons, add_program
from tests.support.readme import REPOSITORY
from tests.support.tiny import Tiny, build

from liquid_llm.checkpoint.discovery import latest_checkpoint
from liquid_llm.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# As srun: a process a task, each told its number; a signal goes on to them; the highest of their codes.
SRUN = """
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
for number in range(count):
    env = {**os.environ, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    tasks.append(subprocess.Popen(words, env=env))
open(os.environ["SRUN_PID"], "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1")
else:
    open(os.environ["QUEUE"], "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


SLURM = REPOSITORY / "examples" / "slurm"


def make_job(folder: Path, bucket: Path, tasks: int, **more: str) -> dict[str, str]:
    """The environment of a job on a pretended Slurm, whose programs are in ``folder / "bin"``."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
        add_program(folder / "bin", name, body)
    return {
        "BUCKET": str(bucket),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node-1",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SRUN_PID": str(folder / "srun.pid"),
        "QUEUE": str(folder / "queue"),
        "HF_HUB_OFFLINE": "1",
        **more,
    }


@pytest.fixture(scope="module", autouse=True)
def pythons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a script calls ``python``, in a folder, has the libraries already."""
    with Pythons(tmp_path_factory.mktemp("bin")) as programs, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs.folder}:{os.environ['PATH']}")
        yield programs.folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """With a store that capture.sbatch has made, as an array of one."""
    tiny, folder = build(tmp_path_factory.mktemp("tiny")), tmp_path_factory.mktemp("capture")
    array = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3"}
    job = make_job(folder, tiny.root, 1, **array, SLURM_ARRAY_TASK_COUNT="1")
    words = [f"--mc_teacher_id={tiny.teacher}", "--seq_len=64", f"--data_cache={tiny.root / 'tokens'}"]
    done = run_script([str(SLURM / "capture.sbatch"), *words], folder / "bin", **job)
    try:
        said, _ = done.communicate(timeout=400)
    finally:
        end(done)
    assert done.returncode == 0, said
    assert '"written": 80' in said
    assert not Path(job["QUEUE"]).exists()
    return tiny


def small(tiny: Tiny, **options: object) -> list[str]:
    """What makes an example's training small; its places and all else are the example's."""
    given = {
        "student": tiny.student,
        "lm_teacher_id": tiny.teacher,
        "data_cache": tiny.root / "tokens",
        "block_size": 64,
        "batch_size": 2,
        "grad_accum": 2,
        "warmup_steps": 0,
        "metrics_interval": 1,
        "eval_every": 0,
        "val_fraction": 0.2,
        **options,
    }
    return [f"--{name}={value}" for name, value in given.items()]


def test_a_job_of_slurm_that_is_stopped_goes_back_into_the_queue_and_on(tiny: Tiny, tmp_path: Path) -> None:
    slurm = make_job(tmp_path, tiny.root, 2)
    script, run = str(SLURM / "train.sbatch"), tiny.root / "runs" / "liquid-350m"
    job = run_script([script, *small(tiny, max_steps=100000)], tmp_path / "bin", **slurm)
    try:
        wait_for_rows(run, 3, job)
        os.kill(int(Path(slurm["SRUN_PID"]).read_text()), signal.SIGTERM)
        said, _ = job.communicate(timeout=400)
    finally:
        end(job)
    assert job.returncode == 75, said
    assert Path(slurm["QUEUE"]).read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n"
    found = latest_checkpoint(run)
    assert found is not None
    assert found.metadata.run["group_size"] == 2, "two processes have trained"
    step = found.metadata.step
    again = run_script([script, *small(tiny, max_steps=step + 2)], tmp_path / "bin", **{**slurm, "SLURM_NTASKS": "1"})
    try:
        said, _ = again.communicate(timeout=400)
    finally:
        end(again)
    assert again.returncode == 0, said
    assert Path(slurm["QUEUE"]).read_text().count("requeue") == 1, "a job that is done stays out of the queue"
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == list(range(1, step + 3))


def end(job: subprocess.Popen[str]) -> None:
    """End what a failed test left of a script: it leads a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.communicate()


def wait_for_rows(run: Path, count: int, job: subprocess.Popen[str], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count('"train"') < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)


def test_accelerate_launch_starts_processes_that_train_together(tiny: Tiny, pythons: Path, tmp_path: Path) -> None:
    """Its --multi_gpu is torchrun, GPUs or not; without it, it starts one process, whatever --num_processes says."""
    launch = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    words = [f"--signal=math_tool={tiny.root}/signal/math", f"--signal=code={tiny.root}/signal/code"]
    words += [f"--dataset_manifest={tiny.manifest}", f"--output_gcs_uri={tmp_path}", "--run_id=run", "--device=cpu"]
    module = ["-m", "--", "liquid_llm", "train", *words, *small(tiny, max_steps=2)]
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", *launch, "--main_process_port=0", *module]
    # torchrun takes the interpreter of the processes from this variable.
    place = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON_EXEC": str(pythons / "python")}
    done = forked.run(accelerate, env={**os.environ, **place}, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = latest_checkpoint(tmp_path / "run")
    assert found is not None
    assert (found.metadata.step, found.metadata.run["group_size"]) == (2, 2)
