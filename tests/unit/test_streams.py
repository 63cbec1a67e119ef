"""Work on a stream of its own, on the pretend accelerator, which refuses what a real one would compute wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.accelerator import install

from liquid_llm.streams import SideStream, has_streams


@pytest.fixture(scope="module")
def device() -> torch.device:
    return install().device


def test_what_is_made_beside_is_used_behind_a_wait(device: torch.device) -> None:
    side, base = SideStream(device), torch.ones(4, device=device)
    for _ in range(3):
        with side.beside(lambda: base * 2) as take:
            own = base + 1
            both = own + take()
        assert both.tolist() == [4.0] * 4
        del own, both, take
    assert len(install().streams.ticks) > 1


def test_memory_of_both_streams_is_safe_after_an_error(device: torch.device) -> None:
    side, held = SideStream(device), [torch.ones(4, device=device)]
    with pytest.raises(ValueError, match="of the student"), side.beside(lambda: held[0] * 2):
        raise ValueError("of the student")
    held.clear()
    assert torch.zeros(4, device=device).sum() == 0


def test_a_read_without_a_wait_is_refused(device: torch.device) -> None:
    pretend: Any = torch.get_device_module(device)
    stream, base = pretend.Stream(device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="without waiting"), pretend.stream(stream):
        base * 2
    stream.wait_stream(pretend.current_stream(device))
    with pretend.stream(stream):
        made = base * 2
    with pytest.raises(RuntimeError, match="without waiting"):
        made + 1
    with pytest.raises(RuntimeError, match="without waiting"):
        made.tolist()
    for take in (torch.stack, torch._foreach_norm):  # in a list too
        with pytest.raises(RuntimeError, match="without waiting"):
            take([made])
    pretend.current_stream(device).wait_stream(stream)
    assert (made + 1).tolist() == [3.0] * 4


def test_memory_that_another_stream_still_reads_is_not_taken_anew(device: torch.device) -> None:
    pretend: Any = torch.get_device_module(device)
    stream, main = pretend.Stream(device=device), pretend.current_stream(device)
    base = torch.ones(4, device=device)
    stream.wait_stream(main)
    with pretend.stream(stream):
        kept = base * 2
    del base
    with pytest.raises(RuntimeError, match="may still be using"):
        torch.zeros(4, device=device)
    main.wait_stream(stream)
    torch.zeros(4, device=device)
    del kept
    torch.zeros(4, device=device)


def race(device: torch.device) -> torch.Tensor:
    """What a program that is wrong leaves: memory that a stream still reads was given back, and a result unread."""
    pretend: Any = torch.get_device_module(device)
    stream, base = pretend.Stream(device=device), torch.ones(4, device=device)
    stream.wait_stream(pretend.current_stream(device))
    with pretend.stream(stream):
        return base * 2


left: list[torch.Tensor] = []


@pytest.mark.parametrize("time", ["first", "again"])
def test_what_a_failed_test_leaves_fails_none_after_it(device: torch.device, time: str) -> None:
    """The second time the first has left what it has: as a test does that fails between the two."""
    torch.zeros(4, device=device)
    for one in left:
        assert (one + 1).tolist() == [3.0] * 4
    left.append(race(device))
    with pytest.raises(RuntimeError, match="may still be using"):
        torch.zeros(4, device=device)
    with pytest.raises(RuntimeError, match="without waiting"):
        left[-1].tolist()


def test_a_cpu_has_no_streams(device: torch.device) -> None:
    assert has_streams(device)
    assert not has_streams(torch.device("cpu"))
