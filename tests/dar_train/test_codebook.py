"""The codebook's start and revival: where codes go, what else moves, and the same on every rank."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dar_kernels import vq_nearest
from dar_train.codebook import CodebookUse, of_first_rank, start_from_rows, use_of
from dar_train.distributed import Ranks
from dar_train.parallel import Parallel

CPU = torch.device("cpu")
V, C = 16, 4


class Group:
    """Ranks in one process: a sum is known once every rank has made its part."""

    def __init__(self, world: int) -> None:
        self.members = [Member(self, rank, world) for rank in range(world)]
        self.parts: list[list[Tensor]] = []


class Member(Parallel):
    """A rank whose sums were noted by a first run of every rank, and are given in the second."""

    def __init__(self, group: Group, rank: int, world: int) -> None:
        super().__init__(torch.nn.Linear(1, 1), "forward", Ranks(rank, world, rank, CPU))
        self.group, self.asked, self.given = group, [], None

    def sum(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        turn = len(self.asked) - 1
        if self.given is None:
            return x
        return sum(member.given[turn] for member in self.group.members)


def on_all_ranks(group: Group, work) -> list:
    """What `work(rank)` returns once it sees the sums of all; it is run as often as sums follow."""
    rounds = 3  # each settles one more sum
    for _ in range(rounds):
        asked = []
        for member in group.members:
            member.asked = []
            work(member.ranks.rank, member)
            asked.append(member.asked)
        for member, parts in zip(group.members, asked, strict=True):
            member.given = parts
    for member in group.members:
        member.asked = []
    return [work(member.ranks.rank, member) for member in group.members]


def rows_around(centres: Tensor, each: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = 0.01 * torch.randn(len(centres) * each, C, generator=generator)
    return F.normalize(centres.repeat(each, 1) + noise, dim=-1)


def test_kmeans_finds_the_clusters() -> None:
    centres = F.normalize(torch.randn(6, C, generator=torch.Generator().manual_seed(1)), dim=-1)
    codebook = F.normalize(torch.randn(64, C), dim=-1)
    start_from_rows(codebook, rows_around(centres, 40), torch.Generator().manual_seed(2))
    distance = (2 - 2 * centres @ codebook.T).amin(1)
    assert float(distance.max()) < 1e-3
    torch.testing.assert_close(codebook.norm(dim=-1), torch.ones(64))
    assert len(codebook.unique(dim=0)) == 64


def revived(rank: int, parallel: Parallel) -> tuple[int, list[Tensor]]:
    codebook = torch.nn.Parameter(F.normalize(torch.eye(V, C) + 0.1, dim=-1))
    average = codebook.detach().clone()
    optimizer = torch.optim.Adam([codebook], lr=0.1)
    codebook.grad = torch.ones_like(codebook)
    optimizer.step()
    use = CodebookUse(V, CPU)
    codes = torch.tensor([[0, 1, 2, 9]]) + 3 * rank
    use.count(codes, torch.tensor([[True, True, True, False]]))  # the ranks use 0 … 5
    rows = F.normalize(torch.randn(40, C, generator=torch.Generator().manual_seed(rank)), dim=-1)
    moved = use.revive(
        parallel, (codebook, average), rows, [optimizer], torch.Generator().manual_seed(7)
    )
    state = optimizer.state[codebook]
    return moved, [codebook.detach(), average, state["exp_avg"], state["exp_avg_sq"], use.recent]


def test_revival_moves_codes_that_no_rank_used_alike_on_all() -> None:
    results = on_all_ranks(Group(2), revived)
    assert [moved for moved, _ in results] == [10, 10]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)
    codebook, average, momentum, square, recent = results[0][1]
    rows = F.normalize(torch.randn(40, C, generator=torch.Generator().manual_seed(0)), dim=-1)
    distance = (codebook[:, None] - rows).square().sum(-1).amin(1)
    assert float(distance[6:].max()) < 0.03  # on the first rank's rows
    assert torch.equal(average[6:], codebook[6:])
    assert not torch.equal(average[:6], codebook[:6])
    assert not momentum[6:].any() and not square[6:].any()
    assert momentum[:6].all() and square[:6].all()
    assert not recent.any()


def test_nothing_is_revived_twice_in_a_row() -> None:
    alone = Parallel(torch.nn.Linear(1, 1), "forward", Ranks(0, 1, 0, CPU))
    use, codebook = CodebookUse(V, CPU), F.normalize(torch.randn(V, C), dim=-1)
    rows = F.normalize(torch.randn(4, C), dim=-1)
    arguments = alone, (codebook,), rows, [], torch.Generator()
    assert use.revive(*arguments) == 4  # as many as there are rows
    use.count(torch.arange(V), torch.ones(V, dtype=torch.bool))
    before = copy.deepcopy(codebook)
    assert use.revive(*arguments) == 0
    assert torch.equal(codebook, before)
    assert set(vq_nearest(rows, codebook).tolist()) <= set(range(V))


def test_the_first_rank_decides() -> None:
    values = on_all_ranks(
        Group(3), lambda rank, parallel: of_first_rank(parallel, torch.full((2,), rank + 5.0))
    )
    assert all(torch.equal(value, torch.full((2,), 5.0)) for value in values)


@pytest.mark.parametrize(
    ("counts", "used", "perplexity"),
    [([1, 1, 1, 1], 1.0, 4.0), ([8, 0, 0, 0], 0.25, 1.0), ([0, 0, 0, 0], 0.0, 0.0)],
)
def test_use(counts, used, perplexity) -> None:
    assert use_of(torch.tensor(counts)) == {
        "codes_used": used, "perplexity": pytest.approx(perplexity)
    }  # fmt: skip
