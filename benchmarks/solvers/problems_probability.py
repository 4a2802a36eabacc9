"""Chains, decisions, mixtures, transport and messages: fixed points of probability and statistics."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.solvers.cases import Map, SuiteProblem, normal, uniform
from benchmarks.solvers.problems_linear import affine


def _pagerank(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    pages, damping = 500, 0.85
    popularity = 1 / (1 + torch.arange(pages, dtype=torch.float64)[:, None])
    links = (uniform(generator, pages, pages) < (8 * popularity).clamp(max=0.5) + 0.004).double()
    links += torch.eye(pages, dtype=torch.float64)  # no page without a link
    transition = links / links.sum(dim=0)
    return affine(damping * transition, torch.full((pages,), (1 - damping) / pages, dtype=torch.float64), dtype)


def _markov(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    blocks, size = 5, 20
    inside = torch.block_diag(*uniform(generator, blocks, size, size) ** 4)
    chain = inside + 1e-3 * uniform(generator, blocks * size, blocks * size)
    transition = (chain / chain.sum(dim=0)).T.to(dtype).contiguous()

    def f(z: Tensor) -> Tensor:
        image = z @ transition
        return image / image.sum(dim=1, keepdim=True)

    z0 = torch.zeros(1, blocks * size, dtype=dtype)
    z0[0, 0] = 1
    return f, z0


def _value_iteration(generator: torch.Generator, dtype: torch.dtype, *, discount: float) -> tuple[Map, Tensor]:
    actions, states, successors = 4, 100, 5
    reach = uniform(generator, actions, states, states)
    kept = reach >= reach.topk(successors, dim=-1).values[..., -1:]
    weights = uniform(generator, actions, states, states) * kept
    transition = (discount * weights / weights.sum(dim=-1, keepdim=True)).to(dtype).flatten(0, 1).T.contiguous()
    reward = uniform(generator, actions, states).to(dtype)

    def f(z: Tensor) -> Tensor:
        return (reward + (z @ transition).view(-1, actions, states)).amax(dim=1)

    return f, torch.zeros(1, states, dtype=dtype)


def _gaussian_mixture(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    parts, dim, count = 3, 8, 400
    centres = 0.9 * normal(generator, parts, dim)
    label = torch.randint(parts, (count,), generator=generator)
    data = (centres[label] + normal(generator, count, dim)).to(dtype)
    first = data[torch.randperm(count, generator=generator)[:parts]]
    z0 = torch.cat(
        [torch.full((parts,), 1 / parts, dtype=dtype).log(), first.flatten(), torch.zeros(parts * dim, dtype=dtype)]
    )

    def f(z: Tensor) -> Tensor:
        """Weights and variances by their logarithms, so that every state is a mixture."""
        logits, mean, log_variance = z.split([parts, parts * dim, parts * dim], dim=1)
        mean, log_variance = mean.view(-1, parts, dim), log_variance.view(-1, parts, dim)
        distance = ((data[:, None] - mean[:, None]) ** 2 * torch.exp(-log_variance)[:, None]).sum(dim=-1)
        share = torch.softmax(logits[:, None] - (distance + log_variance.sum(dim=-1)[:, None]) / 2, dim=-1)
        mass = share.sum(dim=1)
        mean = share.transpose(1, 2) @ data / mass[..., None]
        spread = (share[..., None] * (data[:, None] - mean[:, None]) ** 2).sum(dim=1) / mass[..., None]
        return torch.cat([torch.log(mass / count), mean.flatten(1), torch.log(spread).flatten(1)], dim=1)

    return f, z0[None]


def _multivariate_t(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    dim, count, freedom = 9, 60, 1.0
    mix = normal(generator, dim, dim)
    chi = normal(generator, count, 1) ** 2
    data = (normal(generator, count, dim) @ mix.T / chi.sqrt()).to(dtype)
    low = torch.tril_indices(dim, dim, -1)

    def pack(mean: Tensor, factor: Tensor) -> Tensor:
        diagonal = factor.diagonal(dim1=1, dim2=2)
        return torch.cat([mean, torch.log(diagonal), factor[:, low[0], low[1]]], dim=1)

    def f(z: Tensor) -> Tensor:
        """The scatter matrix by its Cholesky factor, with the diagonal's logarithm."""
        mean, diagonal, below = z.split([dim, dim, low.shape[1]], dim=1)
        factor = torch.diag_embed(torch.exp(diagonal)).index_put((torch.arange(len(z))[:, None], low[0], low[1]), below)
        centred = data - mean[:, None]
        distance = torch.linalg.solve_triangular(factor, centred.transpose(1, 2), upper=False).square().sum(dim=1)
        weight = (freedom + dim) / (freedom + distance)
        mean = (weight[..., None] * data).sum(dim=1) / weight.sum(dim=1, keepdim=True)
        centred = data - mean[:, None]
        scatter = (weight[..., None] * centred).transpose(1, 2) @ centred / count
        return pack(mean, torch.linalg.cholesky_ex(scatter).L)

    start = torch.eye(dim, dtype=dtype)[None] * data.abs().median()
    return f, pack(data.mean(dim=0, keepdim=True), start)


def _poisson_mixture(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    frequency = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=dtype)
    deaths = torch.arange(10, dtype=dtype)

    def f(z: Tensor) -> Tensor:
        """The state is the logit of the first weight and the logarithms of both rates."""
        logit, first, second = z.T[..., None]
        share = torch.sigmoid(logit + deaths * (first - second) - torch.exp(first) + torch.exp(second))
        one, two = frequency * share, frequency * (1 - share)
        rates = [torch.log((part * deaths).sum(dim=1) / part.sum(dim=1)) for part in (one, two)]
        return torch.stack([torch.log(one.sum(dim=1) / two.sum(dim=1)), *rates], dim=1)

    return f, torch.tensor([[-0.85, 0.0, 0.9]], dtype=dtype)


def _sinkhorn(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    points, regularisation = 100, 0.02
    x, y = uniform(generator, 2, points, 2)
    kernel = (-(torch.cdist(x, y) ** 2) / regularisation).to(dtype)
    source, target = (torch.softmax(normal(generator, 2, points), dim=1).log()).to(dtype)

    def f(z: Tensor) -> Tensor:
        """Log scalings of the rows; a constant is free in them, so their mean is put to zero."""
        columns = target - torch.logsumexp(kernel + z[..., None], dim=1)
        rows = source - torch.logsumexp(kernel + columns[:, None], dim=2)
        return rows - rows.mean(dim=1, keepdim=True)

    return f, torch.zeros(1, points, dtype=dtype)


def _belief_propagation(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    side = 12
    site = torch.arange(side * side).view(side, side)
    edges = torch.cat(
        [
            torch.stack([site[:, :-1].flatten(), site[:, 1:].flatten()]),
            torch.stack([site[:-1].flatten(), site[1:].flatten()]),
        ],
        dim=1,
    )
    source, target = torch.cat([edges, edges.flip(0)], dim=1)
    follows = (target[None] == source[:, None]) & (source[None] != target[:, None])
    coupling = torch.tanh(0.8 * normal(generator, edges.shape[1])).repeat(2).to(dtype)
    field = (0.3 * normal(generator, side * side))[source].to(dtype)
    gather = follows.T.to(dtype)
    return (lambda z: field + torch.atanh(coupling * torch.tanh(z)) @ gather), field[None].clone()


_GARNET = "random (Garnet) decision process, {}: Archibald, McKinnon & Thomas, J. Oper. Res. Soc. 46, 1995"

PROBLEMS = (
    SuiteProblem(
        name="pagerank", make=_pagerank, source="Page, Brin, Motwani & Winograd, 1999; damping 0.85", affine=True
    ),
    SuiteProblem(
        name="markov-chain",
        make=_markov,
        source="stationary distribution of a nearly decomposable chain: Courtois, Decomposability, 1977",
    ),
    SuiteProblem(
        name="value-iteration-0.95",
        make=partial(_value_iteration, discount=0.95),
        source=_GARNET.format("discount 0.95"),
    ),
    SuiteProblem(
        name="value-iteration-0.99",
        make=partial(_value_iteration, discount=0.99),
        source=_GARNET.format("discount 0.99"),
    ),
    SuiteProblem(
        name="em-gaussian-mixture",
        make=_gaussian_mixture,
        source="expectation-maximisation, three Gaussians in 8-d: Dempster, Laird & Rubin, JRSS B 39, 1977",
    ),
    SuiteProblem(
        name="em-multivariate-t",
        make=_multivariate_t,
        source="location and scatter of a Cauchy cloud: Kent, Tyler & Vardi, Commun. Stat. Simul. 23, 1994",
    ),
    SuiteProblem(
        name="em-poisson-mixture",
        make=_poisson_mixture,
        source="deaths in The Times: Hasselblad, JASA 64, 1969; Varadhan & Roland, Scand. J. Stat. 35, 2008",
        max_evals=500,
        seeded=False,
    ),
    SuiteProblem(
        name="sinkhorn",
        make=_sinkhorn,
        source="entropic optimal transport in logarithms: Cuturi, NeurIPS 2013; Peyré & Cuturi, 2019, sec. 4.4",
    ),
    SuiteProblem(
        name="belief-propagation",
        make=_belief_propagation,
        source="sum-product messages on an Ising grid: Mooij & Kappen, IEEE Trans. Inf. Theory 53, 2007",
    ),
)
