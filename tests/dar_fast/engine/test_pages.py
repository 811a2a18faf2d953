"""Pages against a naive model: who holds what, and what a device would read out of them."""

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dar_fast.engine.pages import (
    PagePool,
    PageRow,
    PagesExhaustedError,
    pages_needed,
    request_pages,
)

PAGE = 32
NUM_PAGES = 40  # small enough that rows compete
GROUPS = 12


def state(pool: PagePool) -> tuple[int, ...]:
    counts = pool.free, pool.used, pool.shared, pool.promised, pool.available
    return counts + tuple(map(pool.references, range(pool.num_pages)))


def grow(row: PageRow, length: int) -> list[tuple[int, int]]:
    pairs = row.reserve(length)
    row.advance(length)
    return pairs


class Row:
    """A row under test, and the tag that each of its inputs must read back as."""

    def __init__(self, row: PageRow, tags: list[int]) -> None:
        self.row, self.tags = row, tags
        self.writing: tuple[int, tuple[int, ...]] | None = None  # end, and pages as they were

    @property
    def next_page(self) -> int | None:
        """The page, partly filled, that the next input goes to."""
        at, within = divmod(len(self.tags), PAGE)
        return self.row.pages[at] if within else None


class PageMachine(RuleBasedStateMachine):
    """Rows grow, fork, and go; a device of tags is written and read through their block tables."""

    group_size = 8
    operations = 0
    rows = Bundle("rows")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.device = [[-1] * PAGE for _ in range(NUM_PAGES)]
        self.owners: dict[int, set[Row]] = {page: set() for page in range(NUM_PAGES)}
        self.open: list[Row] = []
        self.tag = itertools.count()

    def sure(self, needed: int, call: Any) -> Any:
        """What `call` gives; it fails when and only when fewer pages are available, in vain."""
        before, available = state(self.pool), self.pool.available
        try:
            result = call()
        except PagesExhaustedError as error:
            assert (error.needed, error.available) == (needed, available)
            assert needed > available and state(self.pool) == before
            return None
        assert needed <= available
        return result

    def watch(self, row: PageRow, tags: list[int]) -> Row:
        PageMachine.operations += 1
        own = Row(row, tags)
        for page in row.pages:
            self.owners[page].add(own)
        self.open.append(own)
        return own

    @rule(target=rows, groups=st.integers(0, GROUPS))
    def start(self, groups: int) -> Any:
        length = groups * self.group_size
        row = self.sure(request_pages(length, 1), lambda: self.pool.row(length))
        return self.watch(row or self.pool.row(), [])

    @rule(row=rows, groups=st.integers(0, GROUPS))
    def extend(self, row: Row, groups: int) -> None:
        PageMachine.operations += 1
        limit = groups * self.group_size
        needed = max(0, pages_needed(limit) - pages_needed(row.row.limit))
        self.sure(needed, lambda: row.row.extend(limit))

    @rule(row=rows, inputs=st.integers(1, 40), whole=st.booleans())
    def begin(self, row: Row, inputs: int, whole: bool) -> None:
        """Reserve and copy; again where a write is under way that failed."""
        PageMachine.operations += 1
        end = len(row.tags) + (self.group_size if whole else inputs)
        needed = max(0, pages_needed(end) - pages_needed(row.row.limit))
        before, at = row.row.pages, len(row.tags) // PAGE
        pairs = self.sure(needed, lambda: row.row.reserve(end))
        if pairs is None:
            return
        after = row.row.pages
        shared = row.tags and len(row.tags) % PAGE and len(self.owners[before[at]]) > 1
        assert pairs == ([(before[at], after[at])] if shared else [])
        assert len(after) == max(len(before), pages_needed(end))
        for source, destination in pairs:
            self.device[destination] = list(self.device[source])
            self.owners[source].remove(row)
        for old, new in itertools.zip_longest(before, after):
            if new != old:
                assert not self.owners[new], "a page was given twice"
                self.owners[new].add(row)
        for page in after[at : pages_needed(end)]:
            assert self.owners[page] == {row}, "a page has two writers"
        row.writing = end, after

    @rule(row=rows)
    def finish(self, row: Row) -> None:
        """Write what was reserved: to the pages of then, though forks may have come since."""
        PageMachine.operations += 1
        if row.writing is None:
            with pytest.raises(ValueError, match="reserved"):
                row.row.advance(len(row.tags) + 1)
            return
        end, pages = row.writing
        for p in range(len(row.tags), end):
            tag = next(self.tag)
            self.device[pages[p // PAGE]][p % PAGE] = tag
            row.tags.append(tag)
        row.row.advance(end)
        row.writing = None

    @rule(row=rows)
    def step(self, row: Row) -> None:
        self.begin(row, 0, True)
        if row.writing is not None:
            self.finish(row)

    @rule(target=rows, row=rows, data=st.data(), more=st.integers(0, GROUPS))
    def fork(self, row: Row, data: st.DataObject, more: int) -> Any:
        groups = len(row.tags) // self.group_size
        length = data.draw(st.integers(0, groups)) * self.group_size
        length = min(data.draw(st.sampled_from((length, length, length + 3))), len(row.tags))
        limit = length + more * self.group_size
        child = self.sure(
            request_pages(limit, 1, length), lambda: row.row.fork(length, limit=limit)
        )
        if child is None:
            return self.watch(self.pool.row(), [])
        assert child.pages == row.row.pages[: pages_needed(length)]
        return self.watch(child, row.tags[:length])

    @rule(row=consumes(rows))
    def release(self, row: Row) -> None:
        PageMachine.operations += 1
        if row.writing is not None:
            self.finish(row)
        row.row.release()
        before = state(self.pool)
        row.row.release()
        assert state(self.pool) == before and row.row.pages == ()
        for owners in self.owners.values():
            owners.discard(row)
        self.open.remove(row)

    @precondition(lambda self: len(self.open) > 3)
    @rule(row=rows)
    def keep_promises(self, row: Row) -> None:
        """Every row at once grows as far as it was promised, in some order, and goes."""
        order = sorted(self.open, key=lambda other: (other is not row, len(other.tags)))
        for own in order:
            while len(own.tags) < own.row.limit:
                PageMachine.operations += 1
                own.writing = None
                left = own.row.limit - len(own.tags)
                self.begin(own, min(self.group_size, left), False)
                assert own.writing is not None, "a promise was broken"
                self.finish(own)

    @invariant()
    def reads_are_what_was_written(self) -> None:
        for own in self.open:
            assert own.row.length == len(own.tags)
            pages = own.row.pages
            read = [self.device[pages[p // PAGE]][p % PAGE] for p in range(len(own.tags))]
            assert read == own.tags

    @invariant()
    def counts_are_the_owners(self) -> None:
        pool, owners = self.pool, self.owners.values()
        assert pool.used == sum(map(bool, owners)) == pool.num_pages - pool.free
        assert pool.shared == sum(len(o) > 1 for o in owners)
        assert [pool.references(p) for p in self.owners] == [len(o) for o in owners]

    @invariant()
    def promises_are_exact(self) -> None:
        """What rows may still take, and the copies that they may still need; not a page more."""
        growth = sum(max(0, pages_needed(own.row.limit) - len(own.row.pages)) for own in self.open)
        copies = 0
        for page, owners in self.owners.items():
            writers = sum(own.next_page == page for own in owners)
            copies += max(0, min(writers, len(owners) - 1))
        assert self.pool.promised == growth + copies <= self.pool.free
        assert self.pool.available == self.pool.free - self.pool.promised

    def teardown(self) -> None:
        for own in self.open:
            own.row.release()
        assert (self.pool.used, self.pool.shared, self.pool.promised) == (0, 0, 0)


@pytest.mark.parametrize("group_size", [4, 8, 32])
def test_thousands_of_operations_against_a_naive_model(group_size: int) -> None:
    kind: Any = type(f"PageMachine{group_size}", (PageMachine,), {"group_size": group_size})
    before = PageMachine.operations
    run_state_machine_as_test(kind, settings=settings(max_examples=50, stateful_step_count=100))
    assert PageMachine.operations - before >= 5_000  # 15,000 in all


def test_a_row_takes_pages_as_it_grows_and_gives_them_back() -> None:
    pool = PagePool(8)
    row = pool.row(limit=100)
    assert (pool.free, pool.used, pool.promised, pool.available) == (8, 0, 4, 4)
    assert row.reserve(31) == [] and list(row.pages) == [0]
    row.advance(31)
    assert row.reserve(33) == [] and list(row.pages) == [0, 1]
    row.advance(32)
    assert (pool.free, pool.promised, row.length) == (6, 2, 32)
    row.release()
    row.release()  # harmless
    assert (pool.free, pool.promised) == (8, 0)
    assert pool.row(33).reserve(33) == []  # the pages of before


def test_a_fork_within_a_page_copies_it_once_for_both() -> None:
    pool = PagePool(4)
    parent = pool.row(64)
    grow(parent, 40)
    child = parent.fork(40, limit=64)
    assert child.pages == parent.pages and pool.shared == 2
    (pair,) = parent.reserve(48)  # whoever writes first
    assert pair == (child.pages[1], parent.pages[1]) and pool.shared == 1
    assert child.reserve(48) == []  # the last one in place
    assert parent.pages[0] == child.pages[0]
    assert (pool.used, pool.promised) == (3, 0)


def test_a_fork_between_pages_copies_nothing() -> None:
    pool = PagePool(5)
    parent = pool.row(96)
    grow(parent, 96)
    child = parent.fork(64, limit=96)
    assert pool.promised == 1
    assert grow(child, 96) == []
    assert child.pages[:2] == parent.pages[:2] and child.pages[2] != parent.pages[2]


def test_copies_that_nobody_needs_any_more_go_back() -> None:
    pool = PagePool(8)
    parent = pool.row(64)
    grow(parent, 64)
    forks = [parent.fork(length) for length in (20, 40, 20)]
    assert pool.promised == 3  # the parent's pages are full: each fork may need a copy
    forks[0].release()
    assert pool.promised == 2  # a copy that will not be made
    parent.release()
    assert (pool.promised, pool.used) == (1, 2)  # the fork at 40 has its page to itself
    forks[1].release()
    assert (pool.promised, pool.used) == (0, 1)
    assert forks[2].reserve(32) == []


@pytest.mark.parametrize(
    ("length", "rows", "forked_at", "pages"),
    [
        (256, 2, 0, 16), (256, 1, 0, 8), (64, 2, 0, 4), (8, 2, 0, 2), (40, 1, 0, 2),
        (256, 2, 32, 14), (256, 2, 128, 8), (64, 2, 8, 4), (64, 2, 40, 2), (96, 1, 64, 1),
    ],
)  # fmt: skip
def test_a_request_needs_what_it_promises_and_no_less(
    length: int, rows: int, forked_at: int, pages: int
) -> None:
    assert request_pages(length, rows, forked_at) == pages
    parents = request_pages(forked_at, rows)
    pool = PagePool(parents + pages)
    old = [pool.row(forked_at) for _ in range(rows)]
    for row in old:
        grow(row, forked_at)
    new = [row.fork(forked_at, limit=length) for row in old]
    assert pool.available == 0
    for end in range(forked_at, length + 1, 8):
        for row in new:
            grow(row, end)
    assert pool.used == pool.num_pages  # no page fewer would do


def test_the_winner_takes_over_what_another_was_promised() -> None:
    pool = PagePool(6)
    first, second = pool.row(128), pool.row(64)
    for row in (first, second):
        grow(row, 64)
    with pytest.raises(PagesExhaustedError, match="at least 2 available, got 0"):
        second.extend(128)
    first.release()
    second.extend(128)
    assert grow(second, 128) == []
    assert (pool.used, pool.promised) == (4, 0)


def test_a_reserve_that_fails_changes_nothing() -> None:
    pool = PagePool(3)
    parent = pool.row()
    grow(parent, 40)
    child = parent.fork(40)
    before = state(pool), parent.pages, child.pages
    with pytest.raises(
        PagesExhaustedError, match="pages: expected at least 1 available, got 0"
    ) as e:
        child.reserve(65)
    assert (e.value.needed, e.value.available) == (1, 0)
    assert (state(pool), parent.pages, child.pages) == before
    with pytest.raises(PagesExhaustedError, match="at least 1 available, got 0"):
        parent.fork(20)
    assert (state(pool), parent.pages, child.pages) == before
    with pytest.raises(PagesExhaustedError, match="at least 4 available, got 0"):
        pool.row(100)
    assert len(child.reserve(64)) == 1


def test_a_write_that_failed_is_reserved_again() -> None:
    pool = PagePool(2)
    row = pool.row(64)
    grow(row, 16)
    row.reserve(48)
    before = state(pool), row.pages
    assert row.reserve(48) == []
    assert (state(pool), row.pages) == before


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages: expected an integer >= 1, got 0"):
        PagePool(0)
    row = PagePool(4).row(64)
    with pytest.raises(ValueError, match="length: expected 0 to 0, reserved, got 1"):
        row.advance(1)
    grow(row, 32)
    with pytest.raises(ValueError, match="length: expected at least 32, the row's, got 31"):
        row.reserve(31)
    with pytest.raises(ValueError, match="length: expected 32 to 32, reserved, got 8"):
        row.advance(8)
    for length in (-1, 33):
        with pytest.raises(ValueError, match=f"length: expected 0 to 32, the row's, got {length}"):
            row.fork(length)
    row.release()
    for use in (lambda: row.reserve(64), lambda: row.fork(0), lambda: row.extend(1)):
        with pytest.raises(ValueError, match="PageRow: expected one in use"):
            use()
