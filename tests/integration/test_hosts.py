"""Ranks on hosts of their own: two network namespaces with nothing but a cable between them, and no disk in common."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_data_parallel import assert_equal_runs, hybrid_words
from tests.support.processes import launch, run, wait
from tests.support.tiny import Tiny

pytestmark = pytest.mark.slow
HYBRID = "stage1_hybrid.cli"
CABLE, ADDRESSES = "liquid0", ("10.231.7.1", "10.231.7.2")
NEW_NETWORK, NEW_MOUNTS, RECURSIVE, PRIVATE = 0x40000000, 0x00020000, 0x4000, 0x40000  # of Linux


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def networks() -> Iterator[list[str]]:
    """Names of two network namespaces, each with one end of a cable under the name ``CABLE``."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces are made by root, with ip (Debian: iproute2)")
    names = [f"liquid-{os.getpid()}-{end}" for end in (0, 1)]
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        except OSError as error:
            pytest.skip(f"this system makes no network namespaces: {error}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def move_to_a_host() -> None:
    """Into the network of this rank's number; what the other host has on its disk is out of sight."""
    system, rank = ctypes.CDLL(None, use_errno=True), int(os.environ["RANK"])

    def require(result: int) -> None:
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    network = os.open(f"/run/netns/{os.environ['NETWORKS'].split(',')[rank]}", os.O_RDONLY)
    require(system.setns(network, NEW_NETWORK))
    require(system.unshare(NEW_MOUNTS))
    require(system.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
    other = Path.cwd().with_name(f"host-{1 - rank}")
    require(system.mount(b"tmpfs", str(other).encode(), b"tmpfs", 0, None))
    assert not list(other.iterdir())


def test_two_hosts_without_a_disk_in_common_take_the_steps_of_one_process(
    scored: Tiny, networks: list[str], tmp_path: Path
) -> None:
    """The first host alone has the checkpoint that is gone on from, and writes; each tokenises and reads the stores."""
    few = {"draw_group": 2, "grad_accum": 2, "max_steps": 4, "eval_every": 2, "save_every": 2, "data_cache": None}
    before = tmp_path / "before"
    run(HYBRID, hybrid_words(scored, before, **{**few, "max_steps": 2}), tmp_path / "said-before", 1)
    for host in ("host-0", "host-1"):
        (tmp_path / "apart" / host).mkdir(parents=True)
    shutil.copytree(before, tmp_path / "apart" / "host-0" / "before")
    given = {**few, "student": None, "run_id": "after"}
    words = hybrid_words(scored, "out", resume_gcs_uri="before/run/last.pt", **given)
    env = {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": CABLE, "NETWORKS": ",".join(networks)}
    ranks = launch(HYBRID, words, tmp_path / "apart", apart=True, env=env, fault=(None, move_to_a_host))
    assert wait(ranks) == [0, 0], "\n".join(rank.said for rank in ranks)
    alone = hybrid_words(scored, tmp_path / "one", resume_gcs_uri=before / "run" / "last.pt", **given)
    run(HYBRID, alone, tmp_path / "said-alone", 1)
    assert_equal_runs(tmp_path / "apart" / "host-0" / "out" / "after", tmp_path / "one" / "after")
    assert [one.name for one in (tmp_path / "apart" / "host-1").iterdir()] == ["cache"]
