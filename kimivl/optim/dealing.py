"""Newton-Schulz over several ranks: each matrix is orthogonalised once, in whole, by one of them.

Where the ranks hold the same parameters (DDP), the work is dealt out and the results are gathered. Where parameters
are cut up along their rows (FSDP2), a matrix travels to the rank that it was dealt to, and its rows travel back. What
is computed is what one process would compute. Stacked experts are cut by whole experts, and need none of this.

Shapes: B matrices of one shape, R rows <= C columns.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kimivl.optim.matrices import Matrices
from kimivl.optim.newton_schulz import newton_schulz_flops, orthogonalise


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each piece of work: the dearest first, always to the rank with the least so far."""
    owners, loads = [0] * len(costs), [0.0] * ranks
    for number in sorted(range(len(costs)), key=lambda number: -costs[number]):
        owners[number] = min(range(ranks), key=loads.__getitem__)
        loads[owners[number]] += costs[number]
    return owners


def rounds(owners: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Numbers of pieces of work, so that no rank has more than ``limit`` (or one piece) at a time."""
    queues: dict[int, list[int]] = defaultdict(list)
    for number, owner in enumerate(owners):
        queues[owner].append(number)
    while any(queues.values()):
        taken = []
        for queue in queues.values():
            room = limit
            while queue and (room == limit or sizes[queue[0]] <= room):
                room -= sizes[queue[0]]
                taken.append(queue.pop(0))
        yield taken


def rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """How many of ``rows`` each rank holds, as ``torch.chunk`` cuts them: 5 over 4 -> [2, 2, 1, 0]."""
    size = math.ceil(rows / ranks)
    return [max(0, min(size, rows - rank * size)) for rank in range(ranks)]


def orthogonalise_replicas(stacks: Sequence[Tensor], steps: int, group: Any) -> list[Tensor]:
    """Stacks (B, R, C) that all ranks of ``group`` hold alike, each orthogonalised by one rank. Overwrites them."""
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    owners = deal([newton_schulz_flops(*stack.shape) for stack in stacks], ranks)
    shares = [[number for number, owner in enumerate(owners) if owner == rank] for rank in range(ranks)]
    longest = max(sum(stacks[number].numel() for number in share) for share in shares)
    own = stacks[0].new_zeros(longest)
    for place, number in zip(_split(own, [stacks[n] for n in shares[me]]), shares[me], strict=True):
        place.copy_(orthogonalise(stacks[number], steps))
    gathered = list(own.new_empty(ranks, longest).unbind())
    dist.all_gather(gathered, own, group=group)
    done = dict[int, Tensor]()
    for share, results in zip(shares, gathered, strict=True):
        done.update(zip(share, _split(results, [stacks[number] for number in share]), strict=True))
    return [done[number] for number in range(len(stacks))]


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [tensor.numel() for tensor in like]
    parts = flat[: sum(sizes)].split(sizes) if like else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def orthogonalise_cut(
    rows: Sequence[Tensor], matrices: Sequence[Matrices], owners: Sequence[int], steps: int, limit: int, group: Any
) -> list[Tensor]:
    """What becomes of this rank's rows of parameters that are cut up over the ranks of ``group``.

    Args:
        rows: (its rows, cols) of each parameter, in the dtype to compute in.
        matrices: what the whole parameters are.
        owners: the rank that orthogonalises each.
        limit: numbers in one batch of products.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    shares = [[count * each.cols for count in rows_of_ranks(each.number * each.rows, ranks)] for each in matrices]
    order = sorted(range(len(rows)), key=lambda number: owners[number])
    mine = [number for number in order if owners[number] == me]
    out = [sum(shares[number][me] for number in order if owners[number] == rank) for rank in range(ranks)]
    back = [sum(shares[number][rank] for number in mine) for rank in range(ranks)]

    sent = torch.cat([rows[number].flatten() for number in order])
    received = sent.new_empty(sum(back))
    dist.all_to_all_single(received, sent, back, out, group=group)
    parts = received.split([shares[number][rank] for rank in range(ranks) for number in mine])
    whole = [torch.cat(parts[place :: len(mine)]) for place in range(len(mine))]
    done = orthogonalise_all(whole, [matrices[number] for number in mine], steps, limit)
    pieces = [move.split(shares[number]) for number, move in zip(mine, done, strict=True)]
    answer = torch.cat([piece[rank] for rank in range(ranks) for piece in pieces]) if mine else sent.new_empty(0)
    dist.all_to_all_single(sent, answer, out, back, group=group)
    results = dict(zip(order, sent.split([shares[number][me] for number in order]), strict=True))
    return [results[number].view(rows[number].shape) for number in range(len(rows))]


def orthogonalise_all(flat: Sequence[Tensor], matrices: Sequence[Matrices], steps: int, limit: int) -> list[Tensor]:
    """Whole parameters, flattened, with all matrices of one shape in batches of up to ``limit`` numbers."""
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, each in enumerate(matrices):
        alike[each.wide].append(number)
    done = list(flat)
    for wide, numbers in alike.items():
        stack = torch.cat([matrices[number].laid_wide(matrices[number].of(flat[number])) for number in numbers])
        batches = stack.split(max(1, limit // math.prod(wide)))
        moves = torch.cat([orthogonalise(batch, steps) for batch in batches])
        counts = [matrices[number].number for number in numbers]
        for number, move in zip(numbers, moves.split(counts), strict=True):
            done[number] = matrices[number].laid_wide(move).flatten()
    return done
