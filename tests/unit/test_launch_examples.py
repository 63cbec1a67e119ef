"""examples/slurm, vertex, skypilot.yaml and docs/scaling.md: read as launchers read them, and as `liquid` does."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from tests.support.launchers import check_liquid, read_torchrun, record
from tests.support.readme import REPOSITORY, commands
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser

from liquid_llm.errors import UsageError
from liquid_llm.options import OPTIONS

EXAMPLES = REPOSITORY / "examples"
SLURM, VERTEX = EXAMPLES / "slurm", EXAMPLES / "vertex"
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_CPUS_PER_TASK": "8"}
ARRAY = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4"}


def sbatch(name: str) -> dict[str, str]:
    """The options of a script's ``#SBATCH`` lines, which stand before its first command, as sbatch wants them."""
    head, _, rest = (SLURM / name).read_text().partition("\nset ")
    assert "#SBATCH" not in rest
    assert head.startswith("#!/bin/bash\n")
    lines = [line for line in head.splitlines() if line.startswith("#SBATCH")]
    return dict(re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line).groups(default="") for line in lines)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["train.sbatch", "capture.sbatch"])
def test_a_job_of_slurm_is_stopped_ahead_of_its_limit_and_may_go_back_into_the_queue(name: str) -> None:
    options = sbatch(name)
    known = {"job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "array", "time"}
    assert set(options) <= known | {"signal", "requeue", "open-mode", "output"}
    assert re.fullmatch(r"TERM@\d+", options["signal"]), "without B: it is for the processes, not for the script"
    assert int(options["signal"][5:]) >= 60
    assert options["requeue"] == ""
    assert options["open-mode"] == "append", "or what was said before a requeue is lost"
    tasks = options.get("ntasks-per-node", options.get("ntasks"))
    assert tasks == options["gpus-per-node"], "a process a GPU"


def test_slurm_starts_a_training_process_a_task(tmp_path: Path) -> None:
    calls = record([str(SLURM / "train.sbatch"), "--max_steps=3"], tmp_path, "srun", "scontrol", **JOB)
    assert calls[0] == ["scontrol", "show", "hostnames", "node-[1-2]"]
    ((_, *words),) = [call for call in calls if call[0] == "srun"]
    words = words[words.index("bash") :]
    assert words[:2] == ["bash", "-c"]
    assert words[4:7] == ["python", "-m", "liquid_llm"]
    check_liquid(words[7:])
    assert words[-1] == "--max_steps=3"
    with pytest.raises(UsageError, match="grad_acum"):
        check_liquid([word.replace("grad_accum", "grad_acum") for word in words[7:]])


def test_slurm_starts_a_capture_a_member_of_the_array(tmp_path: Path) -> None:
    array = {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "5"}
    (words,) = record([str(SLURM / "capture.sbatch")], tmp_path, "srun", "scontrol", **JOB, **array)
    assert words[:4] == ["srun", "python", "-m", "liquid_llm"]
    assert "--unit=3/5" in words
    check_liquid(words[4:])


def test_skypilots_task_runs_a_command_that_liquid_understands(tmp_path: Path) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    assert set(task) == {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "use_spot", "job_recovery"}
    assert task["resources"]["use_spot"] is True
    assert set(task["resources"]["job_recovery"]) == {"max_restarts_on_errors"}
    places = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_RANK": "1"}
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    calls = record(["-ec", task["run"]], tmp_path, "torchrun", **places, **nodes, **task["envs"])
    ((_, *words),) = calls
    read, liquid = read_torchrun(words)
    assert (read["nnodes"], read["nproc_per_node"], read["node_rank"]) == ("2", "8", 1)
    assert (read["master_addr"], read["master_port"]) == ("10.0.0.1", 29500)
    check_liquid(liquid)
    (install,) = record(["-ec", task["setup"]], tmp_path / "setup", "pip")
    assert_installs(install[1:], REPOSITORY)


def assert_installs(words: list[str], folder: Path) -> None:
    """``pip``'s words install this package from ``folder``, with the versions that are known to work together."""
    assert words[0] == "install"
    assert words[-1] == "."
    assert (folder / "pyproject.toml").is_file()
    assert (folder / words[words.index("--constraint") + 1]).is_file()


def vertex_jobs() -> list[Path]:
    found = sorted(VERTEX.glob("*.yaml"))
    assert len(found) == 2
    return found


# Fields of CustomJobSpec, https://cloud.google.com/vertex-ai/docs/reference/rest/v1/CustomJobSpec
POOL = {
    "machineSpec": {"machineType": str, "acceleratorType": str, "acceleratorCount": int},
    "replicaCount": int,
    "diskSpec": {"bootDiskType": str, "bootDiskSizeGb": int},
    "containerSpec": {"imageUri": str, "args": list},
}
SPEC = {
    "scheduling": {"strategy": str, "restartJobOnWorkerRestart": bool, "timeout": str},
    "baseOutputDirectory": {"outputUriPrefix": str},
}


def assert_fields(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert set(found) == set(expected)
    for name, kind in expected.items():
        if isinstance(kind, dict):
            assert_fields(found[name], kind)
        else:
            assert isinstance(found[name], kind), name


@pytest.mark.parametrize("path", vertex_jobs(), ids=lambda path: path.stem)
def test_a_job_of_vertex_says_what_vertex_and_liquid_understand(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())
    pools = spec.pop("workerPoolSpecs")
    assert_fields(spec, SPEC)
    for pool in pools:
        assert_fields(pool, POOL)
        assert pool["containerSpec"] == pools[0]["containerSpec"]
        check_liquid(pool["containerSpec"]["args"])
    assert pools[0]["replicaCount"] == 1, "the first pool is the one main machine"
    assert len(pools) == 1 + (path.stem == "several-workers")
    assert f"--config=examples/vertex/{path.name}" in path.read_text()


def test_jobs_of_vertex_are_the_same_training() -> None:
    several, one = (yaml.safe_load(path.read_text()) for path in reversed(vertex_jobs()))
    assert several["workerPoolSpecs"][0]["containerSpec"] == one["workerPoolSpecs"][0]["containerSpec"]


def start(words: list[str], cluster: dict[str, list[str]] | None, task: tuple[str, int] = ("workerpool0", 0)) -> Any:
    """What the container's first process has torchrun do, as Vertex describes the job's machines."""
    spec = None if cluster is None else {"cluster": cluster, "task": {"type": task[0], "index": task[1]}}
    names = runpy.run_path(str(VERTEX / "start.py"))
    return read_torchrun(names["torchrun_words"](words, None if spec is None else json.dumps(spec)))


@pytest.mark.parametrize("cluster", [None, {"workerpool0": ["main-0:2222"]}])
def test_a_container_alone_needs_no_other(cluster: dict[str, list[str]] | None) -> None:
    read, liquid = start(["train", "--signal=lm=a"], cluster)
    assert (read["standalone"], read["nproc_per_node"], liquid) == (True, "gpu", ["train", "--signal=lm=a"])


def test_containers_of_a_job_meet_at_the_first_under_numbers_of_their_own() -> None:
    cluster = {"workerpool0": ["main-0:2222"], "workerpool1": ["more-0:2222", "more-1:2222"]}
    numbers = []
    for task in (("workerpool0", 0), ("workerpool1", 0), ("workerpool1", 1)):
        read, liquid = start(["train"], cluster, task)
        assert (read["nnodes"], read["master_addr"], read["master_port"]) == ("3", "main-0", 2222)
        assert (read["standalone"], read["rdzv_backend"], liquid) == (False, "static", ["train"])
        numbers.append(read["node_rank"])
    assert numbers == [0, 1, 2]


def test_a_container_ends_with_the_code_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun ends with 1, and 75 would not be seen."""

    def stopped(words: list[str]) -> None:
        raise ChildFailedError("liquid_llm", {0: ProcessFailure(0, 1, 75, "")})

    monkeypatch.setattr("torch.distributed.run.main", stopped)
    monkeypatch.setattr(sys, "argv", ["start.py", "train"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(VERTEX / "start.py"), run_name="__main__")
    assert ended.value.code == 75


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions and their words, comments left out and continued lines joined."""
    text = (VERTEX / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def test_the_image_holds_what_it_starts_with() -> None:
    steps = instructions()
    assert steps[0][0] == "FROM"
    assert {name for name, _ in steps} == {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT"}
    there: list[str] = []
    for name, words in steps:
        if name == "COPY":
            *sources, target = words.split()
            assert all((REPOSITORY / source).exists() for source in sources), words
            assert target.startswith("./")
            there += sources
        if name == "RUN":
            assert_installs(shlex.split(words)[1:], REPOSITORY)
            assert {"pyproject.toml", "constraints.txt", "src"} <= set(there), "what pip reads is copied before"
    project = (REPOSITORY / "pyproject.toml").read_text()
    for name in ("README.md", "LICENSE"):
        assert name in project
        assert name in there, "the package's own description asks for it"
    folder, program = dict(steps)["WORKDIR"], json.loads(dict(steps)["ENTRYPOINT"])
    assert program == ["python", f"{folder}/start.py"]
    assert "examples/vertex/start.py" in there


PAGE = (REPOSITORY / "docs" / "scaling.md").read_text()
FILES = {"sbatch": r"\S+\.sbatch", "sky": r"\S+\.yaml", "gcloud": r"(?<=--config=)\S+"}


@pytest.mark.parametrize("command", commands(PAGE))
def test_the_commands_of_the_page_on_scaling_are_understood(command: str, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1])  # type: ignore[index]
    words = shlex.split(command.replace("--config=job.yaml", f"--config={job}"))
    while "=" in words[0]:
        assert words.pop(0).partition("=")[0] in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
    program, *rest = words
    if program in FILES:
        assert (REPOSITORY / re.search(FILES[program], command)[0]).is_file()  # type: ignore[index]
    elif program == "torchrun":
        check_liquid(read_torchrun(rest)[1])
    elif program == "accelerate":
        read = launch_command_parser().parse_args(rest[1:])
        assert (rest[0], read.module, read.training_script, read.multi_gpu) == ("launch", True, "liquid_llm", True)
        check_liquid(read.training_script_args)
    else:
        assert program == "liquid"
        check_liquid(rest)


def test_the_page_has_a_command_of_each_launcher() -> None:
    assert {"torchrun", "accelerate", *FILES} <= {command.split()[0] for command in commands(PAGE)}


def test_what_torchrun_takes_for_its_own_is_what_the_page_says() -> None:
    """An option of liquid's that begins several of torchrun's is refused before liquid sees it."""
    own = [name for action in get_args_parser()._actions for name in action.option_strings]
    begun = {option.name for option in OPTIONS if sum(name.startswith(f"--{option.name}") for name in own) > 1}
    assert begun == {"signal"}
    assert all(" -- liquid_llm " in line for line in commands(PAGE) if " --signal" in line)
