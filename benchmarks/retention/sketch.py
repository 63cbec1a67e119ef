"""An experiment of ``bench_retention``: a whole distribution, coarsely, as a few hundred components of its logits.

A teacher's logits are a linear map of as many numbers as it is wide, so its distribution over 49,152 ids lies in a
space of a few hundred dimensions. In that space

metric      the mean, over positions and over T = 1 and 2, of the Fisher information of the distribution: half a squared
            distance in it is a divergence, KL(q || q') = 1/2 d' F d + O(d^3)
component   a direction: the metric is the identity in their basis and what a teacher says has uncorrelated components,
            ordered by variance
bits        of each component, by reverse water-filling (Shannon 1959): one after the other to where it takes off most
cell        of a component, by Lloyd's algorithm (1982): each stands for the mean of what falls into it
spread      variance of each logit's error. Averaged over an error e, exp((z + e) / T) is exp(z / T + var / 2 T^2): what
            is read is given var / 2 T more, so that rare ids do not lose what rounding takes from them

A store would keep the tables once, as large as the teacher's head, and the loss would form a product with them.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from liquid_llm.losses.signals import OutputHead

FIT_TEMPERATURES = (1.0, 2.0)
MOST_BITS = 7
# Variance that the best scalar quantiser of a Gaussian leaves, by bits (Max 1960).
_LEFT = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.0006399, 0.000161)
_ROUNDS = 40
_CHUNK = 512
_METRIC_ROWS = 2048  # a mean over so many distributions is good enough, and each costs three products with the head
_LEAST_METRIC = 1e-7  # of the largest eigenvalue: directions that no distribution feels


class Sketch:
    """The rounding for a teacher.

    Args:
        head: its output head, without soft cap.
        hidden: [positions, width] of its states, thousands of them.
        num_bytes: of a stored position.
    """

    def __init__(self, head: OutputHead, hidden: Tensor, num_bytes: int) -> None:
        weight = head.weight.detach().float() * head.scale
        weight = weight - weight.mean(0)
        hidden = hidden.float()
        root, inverse = _roots(_metric(head, weight, hidden[:: -(-hidden.shape[0] // _METRIC_ROWS)]))
        whitened = hidden.double() @ root
        middle = whitened.mean(0)
        _, turn = torch.linalg.eigh(torch.cov((whitened - middle).T))
        turn = turn.flip(1)
        sample = ((whitened - middle) @ turn).float()
        bits = allot_bits(sample.var(0), num_bytes)
        self._live = (bits > 0).nonzero().squeeze(1).to(hidden.device)
        kept = sample[:, self._live]
        self._cells = [make_cells(kept[:, n].contiguous(), int(bits[one])) for n, one in enumerate(self._live.tolist())]
        error = sample.clone()
        error[:, self._live] -= self._round(kept)
        synthesis = (weight.double() @ inverse @ turn).float()
        self._analysis = (root @ turn).float()[:, self._live]
        self._middle = (middle @ turn).float()[self._live]
        self._synthesis = synthesis[:, self._live].contiguous()
        self._constant = (weight.double() @ (inverse @ middle)).float()
        self._spread = synthesis.square() @ error.square().mean(0)

    def rows(self, hidden: Tensor) -> Tensor:
        """What is read back of states [positions, width]: [positions, components]."""
        parts = [self._round(part.float() @ self._analysis - self._middle) for part in hidden.split(65536)]
        return torch.cat(parts)

    def head(self, temperature: float) -> OutputHead:
        """Makes logits of ``rows``, for use at ``temperature``."""
        return OutputHead(self._synthesis, self._constant + self._spread / (2 * temperature))

    def _round(self, components: Tensor) -> Tensor:
        columns = [look_up(components[:, n].contiguous(), cells) for n, cells in enumerate(self._cells)]
        return torch.stack(columns, 1)


def _metric(head: OutputHead, weight: Tensor, hidden: Tensor) -> Tensor:
    """[width, width] float64: mean covariance of the head's rows under the teacher's distributions."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for part in hidden.split(_CHUNK):
        logits = OutputHead(head.weight.detach().float(), head.bias, head.scale, head.soft_cap).logits(part)
        for temperature in FIT_TEMPERATURES:
            probabilities = torch.softmax(logits / temperature, dim=1)
            means = probabilities @ weight
            total += ((weight * probabilities.sum(0)[:, None]).T @ weight - means.T @ means).double()
    return total / (hidden.shape[0] * len(FIT_TEMPERATURES))


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric root of a metric, and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(float(values.max()) * _LEAST_METRIC).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def allot_bits(variances: Tensor, num_bytes: int) -> Tensor:
    """Bits of every component, 0 to ``MOST_BITS``, ``8 * num_bytes`` in all or as many as there is use for."""
    bits = [0] * variances.numel()
    waiting = [(-float(variance) * (_LEFT[0] - _LEFT[1]), one) for one, variance in enumerate(variances)]
    heapq.heapify(waiting)
    for _ in range(8 * num_bytes):
        if not waiting or waiting[0][0] >= 0:
            break
        _, one = heapq.heappop(waiting)
        bits[one] += 1
        if (now := bits[one]) < MOST_BITS:
            heapq.heappush(waiting, (-float(variances[one]) * (_LEFT[now] - _LEFT[now + 1]), one))
    return torch.tensor(bits)


def make_cells(values: Tensor, bits: int) -> Tensor:
    """[2**bits] rising means of the cells that Lloyd's algorithm finds for a sample [n]."""
    count = 2**bits
    values = values.sort().values
    places = (torch.arange(count, device=values.device) + 0.5) * (values.numel() / count)
    means = values[places.long().clamp_max(values.numel() - 1)]
    for _ in range(_ROUNDS):
        cells = nearest(values, means)
        sums = torch.zeros_like(means).scatter_add_(0, cells, values)
        sizes = torch.zeros_like(means).scatter_add_(0, cells, torch.ones_like(values))
        means = torch.where(sizes > 0, sums / sizes.clamp_min(1), means)
    return means


def nearest(values: Tensor, means: Tensor) -> Tensor:
    """Number of the cell of each value [n]."""
    return torch.bucketize(values, (means[1:] + means[:-1]) / 2)


def look_up(values: Tensor, means: Tensor) -> Tensor:
    """What is read back of each value [n]."""
    return means[nearest(values, means)]
