"""How many processes take a step together, and what they agree on: the one seam for more than one.

    rank     this process's number among ``world_size``; rank 0 is the main one, which alone writes files
    host     a machine; the first rank of each prepares what its ranks read (token caches)
    engine   adds tensors up over all ranks, and lets them decide together

The loss gives sums and the step divides them once by the global number of positions, so ranks add up as micro-batches
do: a step's ``grad_accum`` micro-batches are dealt out among them, and what each has is summed by the engine (what a
step exchanges: ``step_sums.py``). All that may import ``torch.distributed`` is here. One process is a world of 1, in
which nothing is exchanged.

No rank waits for one that has failed. While a run is made ready, ranks tell each other how it went (``together``)
before anyone goes on; later on, a rank that ends closes its connections, on which the others end as well. The first to
fail leaves its exit code in the store through which the ranks have met; it speaks, and the others end in silence with
the same code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from liquid_llm.device import device_error, is_out_of_memory
from liquid_llm.errors import LAST_WORDS_SECONDS, LiquidError, RankError, UsageError, first_line

if TYPE_CHECKING:
    from liquid_llm.distributed_link import TeacherLink, TrainingLink

T = TypeVar("T")
_log = logging.getLogger(__name__)

MEETING_TIME = timedelta(minutes=5)  # until all ranks are there
STEP_TIME = timedelta(minutes=30)  # the most that one rank may be behind another while training
START_TIME = timedelta(days=1)  # the same while the first of a host prepares data
_KNOWN_WITHIN_SECONDS = 5.0  # a rank that fails leaves its exit code before its connections close


class Engine:
    """One process, a world of 1; an engine of several overrides ``rank``, ``world_size`` and ``sum``.

    Each method but ``post`` and ``posted`` is called by all ranks, in the same order. A context manager: what a rank
    ends with is known to the others.

    Attributes:
        link: to the ranks that hold a teacher, or of such a one (a world of its own) to those that train.
        host_rank, host_size: this rank's number among those of its world that are on its host, and how many they are.
    """

    rank: int = 0
    world_size: int = 1
    host_rank: int = 0
    host_size: int = 1
    link: TrainingLink | TeacherLink | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """What all ranks give, of the same shape and dtype, added up: the same bits on all of them."""
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to replace a contiguous tensor by its sum over ranks; what comes back waits for it.

        On a GPU what is done with the tensor next waits, and not the host. Nothing touches it meanwhile.
        """
        tensor.copy_(self.sum(tensor))
        return lambda: None

    def gather(self, number: float) -> list[float]:
        """What each rank gives, by rank."""
        own = torch.zeros(self.world_size, dtype=torch.float64)
        own[self.rank] = number
        return cast("list[float]", self.sum(own).tolist())

    def collect(self, value: T) -> list[T]:
        """What each rank gives, by rank: plain values and tensors. A rank may come late, as to ``wait_for_all``."""
        self.wait_for_all()
        if self.world_size == 1:
            return [value]
        packed = pack(value)
        sizes = [int(one) for one in self.gather(len(packed))]
        whole = torch.zeros(sum(sizes), dtype=torch.uint8)
        torch.split(whole, sizes)[self.rank].copy_(packed)
        return [unpack(one) for one in torch.split(self.sum(whole).to(torch.uint8), sizes)]

    def smallest(self, number: int | None) -> int | None:
        """The smallest of what ranks give; None where all give None."""
        given = [int(one) for one in self.gather(-1 if number is None else number) if one >= 0]
        return min(given, default=None)

    def share(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on the main rank, where alone it runs, on every rank: plain values and tensors.

        Raises:
            LiquidError: whatever it raises; ``RankError`` on the other ranks.
        """
        return work()

    def together(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on this rank, when it has ended well on all of them; else raises as ``share``."""
        return work()

    def host_first(self, work: Callable[[], T]) -> T:
        """``work`` on the first rank of each host, then on the others, which find what it has made."""
        return work()

    def wait_for_all(self) -> None:
        """Return when every rank is here."""
        self.together(lambda: None)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors of the same shapes the main rank's very bits."""

    def post(self, name: str, note: str) -> None:
        """Leave a note for the ranks; by any thread, as nobody waits for it."""
        self.__dict__.setdefault("_notes", {})[name] = note

    def posted(self, name: str) -> str | None:
        """The note that a rank has left under a name, None while there is none; by any thread, without a wait."""
        found: str | None = self.__dict__.get("_notes", {}).get(name)
        return found

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """What fails inside because another rank has ended, in an exchange of torch's own, raises ``RankError``."""
        return contextlib.nullcontext()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def deal(works: Sequence[T], engine: Engine) -> Sequence[T]:
    """This rank's of what is dealt out among all of them in turn."""
    return works[engine.rank :: engine.world_size]


def deal_on_host(works: Sequence[T], engine: Engine) -> Sequence[T]:
    """This rank's of what each host does as a whole, dealt out among its ranks in turn.

    Hosts begin at other places, so that those that see each other's results meet few that nobody has begun.
    """
    own = works[engine.host_rank :: engine.host_size]
    start = len(own) * engine.rank // engine.world_size
    return [*own[start:], *own[:start]]


class ProcessEngine(Engine):
    """Processes that a launcher has started, over gloo; on GPUs what lies there goes over NCCL.

    Args:
        ranks: who this process is.
        device: what it computes on.
        teacher_ranks: how many of them, the last ones, are no part of the world: each is one of its own.

    Raises:
        RankError: the others are not there in time.
        UsageError: a device on which several processes cannot exchange anything.
    """

    def __init__(self, ranks: Ranks, device: torch.device, teacher_ranks: int = 0) -> None:
        if device.type not in ("cpu", "cuda"):
            raise UsageError(
                "several processes cannot train together on this device",
                where="--device",
                got=device,
                expected="cuda or cpu",
            )
        self.rank, self.world_size, group = ranks.rank, ranks.world_size - teacher_ranks, "ranks"
        if ranks.rank >= self.world_size:
            self.rank, self.world_size, group = 0, 1, f"teacher {ranks.rank}"
        self._named = f"rank {ranks.rank} of {ranks.world_size}"
        self._keeps_store, self._others = ranks.rank == 0, ranks.world_size - 1
        self._found_lost: RankError | None = None
        self._is_first_of_host = ranks.local_rank == 0
        self.host_rank, self.host_size = ranks.on_host(teacher_ranks)
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        try:
            store = next(iter(rendezvous("env://", timeout=MEETING_TIME)))[0]
            self.store = PrefixStore("liquid", store)
            dist.init_process_group(
                backend,
                store=PrefixStore(group, store),
                rank=self.rank,
                world_size=self.world_size,
                timeout=STEP_TIME,
                device_id=device if device.type == "cuda" else None,
            )
            self._control = dist.new_group(backend="gloo", timeout=START_TIME)
        except (RuntimeError, ValueError) as error:
            raise RankError(
                "the processes of this run do not find each other",
                where=f"{self._named}, rendezvous at {ranks.meeting_place}",
                got=first_line(error),
                remedy="start all of them, with one --rdzv-endpoint (or MASTER_ADDR and MASTER_PORT) that each can "
                "reach; on a host with several networks name one in GLOO_SOCKET_IFNAME",
            ) from error

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        with self.exchange():
            dist.all_reduce(total)
        return total

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        with self.exchange():
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with self.exchange():
                work.wait()

        return wait

    def share(self, work: Callable[[], T]) -> T:
        value, packed, failure = None, torch.empty(0, dtype=torch.uint8), None
        if self.is_main:
            try:
                value = work()
                packed = pack(value)
            except Exception as error:  # noqa: BLE001 whatever it is, the others hear of it
                failure = error
        size = self._tell(failure, len(packed))
        buffer = packed if self.is_main else torch.empty(size, dtype=torch.uint8)
        with self.exchange():
            dist.broadcast(buffer, 0, group=self._control)
        return cast("T", value if self.is_main else unpack(buffer))

    def together(self, work: Callable[[], T]) -> T:
        value, failure = None, None
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 whatever it is, the others hear of it
            failure = error
        self._tell(failure)
        return cast("T", value)

    def host_first(self, work: Callable[[], T]) -> T:
        first = self._is_first_of_host
        early = self.together(lambda: work() if first else None)
        late = self.together(lambda: None if first else work())
        return cast("T", early if first else late)

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            with self.exchange():
                dist.broadcast(whole, 0)
            tensor.detach().copy_(whole)

    def post(self, name: str, note: str) -> None:
        with self.exchange():
            self.store.set(name, note)

    def posted(self, name: str) -> str | None:
        with self.exchange():  # asked first: to get what is not there would keep other threads from the store
            return self.store.get(name).decode() if self.store.check([name]) else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.link is not None:
            self.link.close(0 if error is None else _exit_code(error))
        if error is None:
            dist.destroy_process_group()
            return
        # Connections close with the process: a rank that waits for this one finds its exit code by then.
        if not isinstance(error, LiquidError):
            self._leave(_exit_code(error))
            return
        if error.speaks is None:
            error.speaks = self._leave(error.exit_code)
            if error.speaks and self._keeps_store:
                self._stay_until_heard()
        if not error.speaks:
            # A launcher ends all ranks as soon as one has ended: the one that speaks comes first.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(LAST_WORDS_SECONDS)

    def _leave(self, exit_code: int) -> bool:
        """Tell whoever looks that this rank fails; whether it is the first."""
        try:
            if self.store.add("failures", 1) > 1:
                return False
            self.store.set("exit code", str(exit_code))
        except RuntimeError:  # the process that keeps the store is gone
            pass
        return True

    def _stay_until_heard(self) -> None:
        """Keep the store until the others have read there why they have to end; those that are gone never do."""
        until = time.monotonic() + 2 * LAST_WORDS_SECONDS
        time.sleep(LAST_WORDS_SECONDS / 2)
        while self.store.add("failures", 0) - 1 + self.store.add("heard", 0) < self._others:
            if time.monotonic() > until:
                return
            time.sleep(0.05)

    def _tell(self, failure: Exception | None, size: int = 0) -> int:
        """Exchange how it went; ends as all do when it went wrong anywhere. Returns the main rank's ``size``."""
        if isinstance(failure, RankError) or (isinstance(failure, LiquidError) and failure.speaks is not None):
            raise failure  # all ranks know already: it was told in an exchange inside this one
        own = torch.zeros(self.world_size, 2, dtype=torch.int64)
        own[self.rank, 0] = 0 if failure is None else _exit_code(failure)
        own[self.rank, 1] = size
        with self.exchange():
            dist.all_reduce(own, group=self._control)
        codes = own[:, 0].tolist()
        if not any(codes):
            return int(own[0, 1])
        first = next(rank for rank, code in enumerate(codes) if code)
        if failure is None:
            raise RankError(f"rank {first} has failed", exit_code=codes[first], speaks=False)
        if isinstance(failure, LiquidError):
            failure.speaks = self.rank == first
        raise failure

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not _is_of_exchange(error):
                raise
            raise self._lost(error) from error

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> RankError:
        """What to end with when an exchange fails: as the rank that failed, where it left word.

        What a thread found first stands: by the time another notices, the process that keeps the store may be gone.
        """
        if self._found_lost is None:
            self._found_lost = self._look_for_word(error)
        return self._found_lost

    def _look_for_word(self, error: RuntimeError) -> RankError:
        # Where nobody leaves word, the process that keeps the store is the first to say so: it ends, and the store too.
        until = time.monotonic() + _KNOWN_WITHIN_SECONDS + (0 if self._keeps_store else LAST_WORDS_SECONDS)
        try:
            while time.monotonic() < until:
                if self.store.check(["exit code"]):
                    code = int(self.store.get("exit code"))
                    self.store.add("heard", 1)
                    return RankError("another rank has failed", exit_code=code, speaks=False)
                time.sleep(0.05)
        except RuntimeError:  # the process that kept the store is gone
            pass
        return RankError(
            "another process of this run has ended, or cannot be reached any more",
            where=self._named,
            got=first_line(error),
            remedy="look at what that process said; run the same command again to go on from the last checkpoint",
        )


def _is_of_exchange(error: RuntimeError) -> bool:
    """Whether torch raised it for a connection: gloo has no class of its own for that."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _exit_code(error: BaseException) -> int:
    own = getattr(error, "exit_code", None)  # of a LiquidError, or of a signal
    if isinstance(own, int):
        return own
    found = device_error(error)
    return 1 if found is None else found.exit_code


def pack(value: object) -> Tensor:
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(stream.getbuffer(), dtype=torch.uint8)


def unpack(buffer: Tensor) -> Any:
    return torch.load(io.BytesIO(buffer.numpy().tobytes()), map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class Ranks:
    """What a launcher says in the environment.

    Attributes:
        local_rank: this process's number among those of its host.
        local_world_size: how many those are.
        meeting_place: where the ranks find each other; "" where none is named.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    meeting_place: str

    def on_host(self, teacher_ranks: int = 0) -> tuple[int, int]:
        """This process's number among the ranks on its host that train, and how many these are; ``(0, 1)`` of one that
        holds a teacher: those come last."""
        training = self.world_size - teacher_ranks
        if self.rank >= training:
            return 0, 1
        return self.local_rank, max(
            self.local_rank + 1, min(self.local_world_size, training - self.rank + self.local_rank)
        )

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Ranks:
        """As a launcher such as torchrun sets them; one process without one.

        Raises:
            UsageError: they are set to something else.
        """
        given = os.environ if environment is None else environment

        def number(name: str, default: str) -> str:
            return given.get(name, "").strip() or default

        rank, world_size = number("RANK", "0"), number("WORLD_SIZE", "1")
        local_rank, local_size = number("LOCAL_RANK", "0"), number("LOCAL_WORLD_SIZE", "1")
        numbers = all(one.isdigit() for one in (rank, world_size, local_rank, local_size))
        if not (numbers and int(rank) < int(world_size)):
            raise UsageError(
                "not a rank of a world",
                where="environment",
                got=f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} LOCAL_WORLD_SIZE={local_size}",
                expected="0 <= RANK < WORLD_SIZE",
                remedy="unset them, or use torchrun",
            )
        address, port = number("MASTER_ADDR", ""), number("MASTER_PORT", "")
        meeting_place = f"{address}:{port}" if address and port else ""
        return cls(int(rank), int(world_size), int(local_rank), int(local_size), meeting_place)


def read_rank() -> tuple[int, int]:
    """Rank and world size as a launcher such as torchrun sets them; (0, 1) without one. Raises as ``Ranks.read``."""
    ranks = Ranks.read()
    return ranks.rank, ranks.world_size


def join_engine(device: torch.device, teacher_ranks: int = 0) -> Engine:
    """The engine of the processes that a launcher has started, once all of them are there.

    Args:
        teacher_ranks: how many of the last ones are to be no part of it, see ``distributed_link.join_ranks``.

    Raises:
        UsageError: there are several, and nothing says where they find each other.
        RankError: they do not find each other.
    """
    ranks = Ranks.read()
    if ranks.world_size == 1:
        _say_if_meant_for_several(os.environ)
        return Engine()
    if not ranks.meeting_place:
        raise UsageError(
            "several processes, and nothing says where they find each other",
            where="environment",
            got=f"WORLD_SIZE={ranks.world_size} without MASTER_ADDR and MASTER_PORT",
            remedy="use torchrun, which sets them (torchrun --nproc-per-node 2 -m liquid_llm train ...), or unset "
            "WORLD_SIZE for one process",
        )
    return ProcessEngine(ranks, device, teacher_ranks)


def _say_if_meant_for_several(given: Mapping[str, str]) -> None:
    """Warn where a launcher has started several processes, or was asked to, and does not say which this one is."""
    if given.get("WORLD_SIZE"):
        return
    tasks = given.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdigit() and int(tasks) > 1:
        found, remedy = (
            f"srun has started {tasks} processes",
            "set RANK and its like as examples/slurm/train.sbatch does",
        )
    elif given.get("MASTER_ADDR"):
        found, remedy = f"MASTER_ADDR={given['MASTER_ADDR']}", "use torchrun, or accelerate launch with --multi_gpu"
    else:
        return
    _log.warning("%s, but WORLD_SIZE is not set: this process works alone. To work together, %s", found, remedy)


def start_engine(environment: Mapping[str, str] | None = None) -> Engine:
    """The engine of a job that is one process's.

    Raises:
        UsageError: a launcher has started several.
    """
    world_size = Ranks.read(environment).world_size
    if world_size > 1:
        raise UsageError(
            "this job is not done by several processes",
            where="WORLD_SIZE in the environment",
            got=world_size,
            expected="1",
            remedy="start one process, without torchrun",
        )
    return Engine()
