import io
import os
import random
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from tests.support import forked

from liquid_llm import runtime
from liquid_llm.errors import UsageError


@pytest.fixture(autouse=True)
def _keep_generators():
    before = runtime.random_state()
    yield
    runtime.set_random_state(before)


def draw() -> tuple:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(3).tolist(),
        float(np.random.standard_normal()),
        torch.randn(3).tolist(),
    )


def test_seeding_repeats_every_generator():
    runtime.seed_everything(2**40 + 7)
    first = draw()
    runtime.seed_everything(2**40 + 7)
    assert draw() == first
    runtime.seed_everything(8)
    assert draw() != first


@pytest.mark.parametrize("draws_before", [0, 1, 2, 3])
def test_random_state_goes_on_exactly_after_a_weights_only_round_trip(draws_before):
    runtime.seed_everything(3)
    for _ in range(draws_before):  # odd counts leave a cached gaussian in Python and NumPy
        random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)
    file = io.BytesIO()
    torch.save(runtime.random_state(), file)
    expected = [draw() for _ in range(3)]
    runtime.seed_everything(99)
    file.seek(0)
    runtime.set_random_state(torch.load(file, weights_only=True))
    assert [draw() for _ in range(3)] == expected


@pytest.mark.parametrize(
    ("requested", "problem"),
    [
        ("cuda", "no cuda device can be used here"),
        ("cuda:1", "no cuda device can be used here"),
        ("meta", "torch cannot compute on a device of this name"),
        ("gpu", "torch cannot compute on a device of this name"),
        ("cpu:3", "this machine has 1 cpu device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_is_there(monkeypatch, requested, problem):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match=problem) as caught:
        runtime.choose_device(requested)
    assert caught.value.got == repr(requested)
    assert str(caught.value.expected).startswith("auto, ")
    assert "cpu" in str(caught.value.expected)


def test_a_gpu_is_taken_where_one_can_be_used_and_another_one_by_its_index(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert runtime.choose_device() == runtime.Choice("cuda", "found a card")
    assert runtime.choose_device("cuda:1").value == "cuda:1"
    assert runtime.choose_device("cpu").value == "cpu"
    with pytest.raises(UsageError, match="has 2 cuda devices"):
        runtime.choose_device("cuda:2")


@pytest.mark.parametrize(("amx", "value"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_cpu_follows_amx_and_says_so(monkeypatch, amx, value):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    choice = runtime.choose_dtype("auto", "cpu")
    assert choice.value == value
    assert "AMX" in choice.reason


@pytest.mark.parametrize(
    ("name", "newest", "uses"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", False),
        ("DNNL_MAX_CPU_ISA", "avx2", False),
        ("ONEDNN_MAX_CPU_ISA", "avx512_core_amx", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("ONEDNN_MAX_CPU_ISA", "", True),
    ],
)
def test_tiles_that_onednn_is_told_to_leave_alone_are_not_there(monkeypatch, name, newest, uses):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(name, newest)
    assert runtime.has_amx() == uses


def test_auto_dtype_survives_a_torch_without_the_amx_probe(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert runtime.choose_dtype("auto", "cpu").value == "float32"


@pytest.mark.parametrize(("supported", "value"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_on_cuda_never_takes_emulated_bfloat16(monkeypatch, supported, value):
    def probe(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", probe)
    assert runtime.choose_dtype("auto", torch.device("cuda", 0)).value == value


@pytest.mark.parametrize("name", list(runtime.DTYPES))
def test_a_requested_dtype_is_taken_as_it_is(name):
    assert runtime.choose_dtype(name, "cpu") == runtime.Choice(name, "requested")
    assert str(runtime.torch_dtype(name)) == f"torch.{name}"


def test_unknown_names_are_usage_errors_listing_the_known_ones():
    with pytest.raises(UsageError, match="bfloat16, float16, float32"):
        runtime.choose_dtype("int8", "cpu")


def test_attention_on_cpu_is_sdpa_with_a_reason():
    choice = runtime.choose_attention("cpu")
    assert choice.value == "sdpa"
    assert "CUDA" in choice.reason


@pytest.mark.parametrize(
    ("installed", "dtype", "value", "word"),
    [
        (True, "bfloat16", "flash_attention_2", "flash_attn"),
        (True, "float32", "sdpa", "float32"),
        (False, "bfloat16", "sdpa", "not installed"),
    ],
)
def test_flash_attention_needs_cuda_the_package_and_16_bits(monkeypatch, tmp_path, installed, dtype, value, word):
    if installed:  # a package whose import would fail proves that it is only looked for
        (tmp_path / "flash_attn.py").write_text("raise RuntimeError('imported')")
        monkeypatch.syspath_prepend(tmp_path)
    choice = runtime.choose_attention("cuda", dtype=dtype)
    assert choice.value == value
    assert word in choice.reason


def test_stop_signal_turns_sigterm_into_a_flag_and_gives_the_handlers_back():
    before = [signal.getsignal(number) for number in runtime.StopSignal.SIGNALS]
    with runtime.StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert [signal.getsignal(number) for number in runtime.StopSignal.SIGNALS] == before


def test_a_signal_that_came_while_an_inner_one_listened_reaches_the_outer():
    with runtime.StopSignal() as outer:
        with runtime.StopSignal():
            pass
        assert not outer.requested
        with runtime.StopSignal() as inner:
            os.kill(os.getpid(), signal.SIGTERM)
            assert inner.requested
        assert outer.requested, "a study whose run had just ended stops too"
        with runtime.StopSignal() as inner:
            assert inner.requested, "and a run that was getting ready when it came"


def test_a_second_interrupt_is_immediate_and_handlers_still_return():
    before = signal.getsignal(signal.SIGINT)
    stop = runtime.StopSignal()

    def interrupted_twice():
        with stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.requested
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted_twice()
    assert signal.getsignal(signal.SIGINT) is before
    with stop:  # entering again lowers the flag
        assert not stop.requested


def test_a_closed_terminal_asks_for_a_stop_but_not_of_what_was_started_to_outlive_it():
    with runtime.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with runtime.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_time_left_is_counted_from_the_first_request():
    now = [100.0]
    with runtime.StopSignal(clock=lambda: now[0]) as stop:
        assert stop.deadline(20) == float("inf")
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] = 107.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.deadline(20) == 120.0


def test_work_that_saves_nothing_is_left_at_once():
    with runtime.StopSignal() as stop:

        def judge():
            with stop.raising(lambda: UsageError("stopped")):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

        began = time.monotonic()
        for _ in range(2):  # the second time before it begins
            with pytest.raises(UsageError, match="stopped"):
                judge()
        assert time.monotonic() - began < 4
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested, "after the work the flag alone is set"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 7), (signal.SIGHUP, 7)]
)
def test_a_forked_worker_leaves_to_its_owner_what_a_terminal_sends_to_all(number, status):
    code = """
import os, signal, sys, time
from liquid_llm.runtime import StopSignal
with StopSignal() as stop:
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(say, b".")
        time.sleep(1)
        os._exit(7)
    os.read(ready, 1)
    os.kill(pid, int(sys.argv[1]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), stop.requested)
"""
    done = forked.run(["-c", code, str(int(number))])
    assert (done.stdout, done.stderr) == (f"{int(status)} False\n", "")


def test_stop_signal_outside_the_main_thread_leaves_handlers_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with runtime.StopSignal() as stop:
            seen.append(signal.getsignal(signal.SIGTERM))
            stop.request()
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, True]


def test_peak_memory_is_in_bytes_and_grows_with_use():
    before = runtime.process_peak_memory_bytes()
    assert before is not None
    assert 20e6 < before < 200e9
    block = np.ones(before // 8 + 8_000_000)  # more than the process has ever had
    after = runtime.process_peak_memory_bytes()
    assert after - before > 30e6, block.nbytes


TOUCH = """
import resource, sys, torch
from liquid_llm.runtime import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
turns = int(sys.argv[2])
for turn in range(turns + 3):
    if turn == turns:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 * 2**18)  # 64 MiB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a matter of glibc")
def test_freed_memory_is_used_again():
    """In the long run: glibc looks for a little more than it needs, so a gap has to grow before it is taken again."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name and "GLIBC" not in name}

    def faults(word: str, turns: int, **more: str) -> tuple[str, int]:
        done = forked.run(["-c", TOUCH, word, str(turns)], env={**environment, **more}, check=True)
        kept, count = done.stdout.split()
        return kept, int(count)

    kept, count = faults("keep", 40)
    assert kept == "True"
    assert count < 0.2 * faults("leave", 0)[1]  # 49,155 where pages are small
    assert faults("keep", 0, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_each_process_of_a_machine_takes_the_gpu_of_its_number(requested: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert runtime.choose_device(requested).value == "cuda", "one process alone"
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert runtime.choose_device(requested).value == "cuda:2"
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UsageError, match=r"LOCAL_RANK=4.*got 4 GPUs.*--nproc-per-node"):
        runtime.choose_device(requested)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert runtime.choose_device(requested).value == "cuda:0", "the only one that this process is shown"
