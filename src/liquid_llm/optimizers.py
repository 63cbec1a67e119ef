"""The optimizers of a run, what each keeps of a parameter, and how a new one takes over what was saved.

    moments     what an optimizer remembers of a parameter's gradients
    adamw       AdamW as torch has it (Loshchilov and Hutter, arXiv 1711.05101): two moments in float32, 8 bytes a
                parameter
    adamw8bit   the same update with both moments in 8 bits and a scale for each 256 of them (Dettmers et al. 2021,
                arXiv 2110.02861), in torchao's arithmetic: 2.03 bytes a parameter
    muon        Muon as torch has it (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for hidden matrices: one
                moment in float32, 4 bytes a parameter; AdamW for all others

Each takes the scheduled learning rate of its groups, decays matrices alone, and keeps plain tensors, so that
checkpoints hold them as they hold AdamW's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from liquid_llm.errors import CheckpointError
from liquid_llm.options import ADAMW, ADAMW8BIT, MUON
from liquid_llm.verbosity import CHATTY

_BLOCK = 256  # moments that share a scale: torchao's own
_LEAST_IN_8_BITS = 4096  # fewer values than that are kept whole: bitsandbytes' rule, and torchao's
_SCALE = "_scale"
_PIECE = 2**20  # values updated at a time: what is worked out meanwhile takes some 60 bytes for each


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    kind: str = ADAMW,
    device_type: str | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of the parameters that ``model`` trains, with decay on matrices only.

    Norms, biases and every other one-dimensional parameter are not decayed. AdamW's ``fused`` is used on CPUs and CUDA,
    and on other devices its list kernels, where torch has those.

    Args:
        kind: ``adamw``, ``adamw8bit`` (needs the package torchao) or ``muon``.
        device_type: of the device whose way is gone; None is that of the parameters.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    device_type = device_type or (trained[0].device.type if trained else "")
    fused = device_type in ("cpu", "cuda")
    hidden = _hidden_matrices(model) if kind == MUON else []
    known = {id(p) for p in hidden}
    others = [p for p in trained if id(p) not in known]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if kind == ADAMW8BIT:
        return AdamW8Bit(groups, lr=lr, betas=betas)
    # Said, and not left to torch to choose, so that what is predicted without the device is what a run does there.
    lists = not fused and device_type in _foreach_devices()
    adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused, foreach=lists)
    return adamw if kind == ADAMW else MuonAndAdamW(hidden, adamw, lr=lr, weight_decay=weight_decay)


def _foreach_devices() -> list[str]:
    """Kinds of devices that take a whole list of tensors through one kernel."""
    return list(torch.utils._foreach_utils._get_foreach_kernels_supported_devices())


def _hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: matrices that turn hidden states into hidden states.

    Jordan et al. leave embeddings and the output head to AdamW, and Liu et al. (arXiv 2502.16982, section 2) do too: a
    row of those is a token's alone, and making rows orthogonal to one another says nothing of tokens. Convolutions and
    the stacked matrices of experts have three dimensions, which torch's Muon does not take.
    """
    apart = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    if (head := find_head()) is not None:
        apart |= {id(one) for one in head.parameters()}
    return [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and id(p) not in apart]


class MuonAndAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` for hidden matrices and AdamW for all others, as one optimizer.

    A matrix moves by its orthogonalised momentum times the rate times ``0.2 * sqrt(max(rows, columns))``, which is
    about the size of an AdamW update (Liu et al. 2025, arXiv 2502.16982, equation 4; ``match_rms_adamw`` in torch): one
    learning rate and one decay fit both, and those found for AdamW can be kept.

    Args:
        hidden: what Muon updates, all of it decayed.
        adamw: of the other parameters; this takes its groups and its place.
    """

    def __init__(
        self, hidden: Sequence[nn.Parameter], adamw: torch.optim.AdamW, *, lr: float, weight_decay: float
    ) -> None:
        self._adamw = adamw
        self._muon = torch.optim.Muon(
            [{"params": list(hidden)}], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        super().__init__([*adamw.param_groups, *self._muon.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the two have these groups and moments, which loading makes anew."""
        self._adamw.param_groups, self._muon.param_groups = self.param_groups[:-1], self.param_groups[-1:]
        self._adamw.state = self._muon.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        self._adamw.step()
        self._muon.step()  # type: ignore[no-untyped-call]


class AdamW8Bit(torch.optim.Optimizer):
    """AdamW whose moments are kept in 8 bits, in torchao's arithmetic, bit for bit that of its ``AdamW8bit``.

    That one compiles its update on the first step of every process, for each shape, which takes a compiler that many
    machines lack, and its moments are tensors of a class without which a checkpoint could not be read. So its parts are
    used: moments lie here as plain tensors (``exp_avg`` as codes, ``exp_avg_scale`` beside it), and a parameter is
    updated in pieces of whole blocks, as what is worked out meanwhile would otherwise take more than is saved.
    """

    def __init__(self, params: Sequence[dict[str, Any]], *, lr: float, betas: tuple[float, float]) -> None:
        self._arithmetic, self._codes = load_torchao()
        self._maps: dict[tuple[torch.device, bool], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        # torch would turn codes into numbers of the parameter's kind.
        parameters = [one for group in self.param_groups for one in group["params"]]
        indices = [one for group in state_dict["param_groups"] for one in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            kept = state_dict["state"].get(index, {})
            if kept:
                self.state[parameter] = {
                    name: value.clone() if name == "step" else value.to(parameter.device, copy=True)
                    for name, value in kept.items()
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate = torch.tensor(group["lr"], dtype=torch.float32)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, rate, group)

    def _update(self, parameter: nn.Parameter, rate: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_new_moments(parameter))
        state["step"] += 1
        weights, gradient = parameter.detach().view(-1), parameter.grad
        assert gradient is not None
        gradient = gradient.reshape(-1)
        _, update = self._arithmetic
        for start in range(0, weights.numel(), _PIECE):
            end = min(start + _PIECE, weights.numel())
            moments = [self._piece(state, name, start, end) for name in ("exp_avg", "exp_avg_sq")]
            update(
                weights[start:end],
                gradient[start:end],
                state["step"],
                *moments,
                None,
                rate,
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                True,
                False,
            )

    def _piece(self, state: Mapping[str, Tensor], name: str, start: int, end: int) -> Any:
        """Some of a moment, to be read and written where it lies."""
        values, scale = state[name].view(-1)[start:end], state.get(name + _SCALE)
        if scale is None:
            return values
        of_8_bits, _ = self._arithmetic
        signed = name == "exp_avg"
        map = self._map(values.device, signed)
        return of_8_bits(values, scale[start // _BLOCK : end // _BLOCK], map, signed, torch.float32)

    def _map(self, device: torch.device, signed: bool) -> Tensor:
        """What each of the 256 codes stands for."""
        if (device, signed) not in self._maps:
            self._maps[device, signed] = torch.tensor(self._codes[signed], device=device)
        return self._maps[device, signed]


def _new_moments(parameter: Tensor) -> dict[str, Tensor]:
    state = {"step": torch.tensor(0.0)}
    for name in ("exp_avg", "exp_avg_sq"):
        if _is_in_8_bits(parameter):
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=torch.contiguous_format)
            state[name + _SCALE] = torch.zeros(parameter.numel() // _BLOCK, device=parameter.device)
        else:
            state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return state


def _is_in_8_bits(parameter: Tensor) -> bool:
    return parameter.numel() >= _LEAST_IN_8_BITS and parameter.numel() % _BLOCK == 0


@cache
def load_torchao() -> tuple[tuple[Any, Any], dict[bool, tuple[float, ...]]]:
    """torchao's moments of 8 bits and its update of one parameter; what the codes of a moment with and without a sign
    stand for, which cannot be worked out once tensors are pretended.
    """
    with quiet_torchao():
        from torchao.optim.adam import single_param_adam
        from torchao.optim.subclass_8bit import OptimState8bit, get_qmap_signed, get_qmap_unsigned

    return (OptimState8bit, single_param_adam), {True: get_qmap_signed(), False: get_qmap_unsigned()}


@contextmanager
def quiet_torchao() -> Iterator[None]:
    """What it says of kernels that it was not built with, and that nothing here asks for, is not said."""
    loggers = [logging.getLogger(name) for name in CHATTY]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the moments that an optimizer has, or is going to have, of all its parameters."""
    total = 0
    for group in optimizer.param_groups:
        for one in group["params"]:
            if isinstance(optimizer, AdamW8Bit) and _is_in_8_bits(one):
                total += 2 * (one.numel() + 4 * (one.numel() // _BLOCK))
            else:
                total += (1 if "ns_steps" in group else 2) * one.numel() * one.element_size()
    return total


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    where: object,
    resize: Mapping[nn.Parameter, Callable[[Tensor], Tensor]] | None = None,
) -> None:
    """Give ``optimizer`` the moments of a saved one; learning rate, decay and betas stay its own.

    Args:
        optimizer: newly built, of the same architecture.
        state: its ``state_dict()`` as it was saved.
        where: the checkpoint, for messages.
        resize: what was done to a parameter since, to be done to its moments too.

    Raises:
        CheckpointError: the state is of other parameters. torch compares no shapes when it loads, and its fused kernel
            then reads past the end.
    """
    own = optimizer.state_dict()["param_groups"]
    saved = [list(group["params"]) for group in state["param_groups"]]
    if [len(group) for group in saved] != [len(group["params"]) for group in own]:
        raise _foreign_moments(where, f"groups of {[len(group) for group in saved]} parameters")
    moments = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, index in zip(parameters, [index for group in saved for index in group], strict=True):
        change, found = (resize or {}).get(parameter), state["state"].get(index, {})
        in_8_bits = any(name.endswith(_SCALE) for name in found)
        if found and in_8_bits != (isinstance(optimizer, AdamW8Bit) and _is_in_8_bits(parameter)):
            raise _foreign_moments(where, f"moments in {8 if in_8_bits else 32} bits")
        if change is not None and in_8_bits:
            raise _foreign_moments(where, "moments in 8 bits of another number of positions, which cannot be resized")
        kept = {name: change(value) if change is not None and value.dim() else value for name, value in found.items()}
        for name, value in kept.items():
            expected = (parameter.numel() // _BLOCK,) if name.endswith(_SCALE) else parameter.shape
            if value.dim() and value.shape != expected:
                raise _foreign_moments(where, f"{name} {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
        if kept:
            moments[index] = kept
    # The rate is set anew before each step; where none follows, what is saved again is what was loaded.
    rates = [group.get("lr", mine["lr"]) for mine, group in zip(own, state["param_groups"], strict=True)]
    groups = [{**mine, "params": indices, "lr": lr} for mine, indices, lr in zip(own, saved, rates, strict=True)]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _foreign_moments(where: object, got: str) -> CheckpointError:
    return CheckpointError(
        "the optimizer's state is of other parameters than the student's",
        where=where,
        got=got,
        remedy="start the optimizer afresh with --reset_optim, or choose another checkpoint",
    )
