"""Who holds which page of keys and values: reference counts, copy on write, and promises.

Input p of a row lies in page `pages[p // 32]`. A fork shares the pages of its first inputs; the
first of several rows to write into a page that they share gets a copy of its own. A row is promised
its pages before it starts, so one that has started never runs out. Host integers only: O(1) a page,
no tensors, no locks (the engine's guards them).

Only rows that end within a page write to it, and the last row of a page writes in place. So a page
with w such rows among its r may cost min(w, r - 1) copies, which is what is promised for it: a fork
that ends within a page promises one more, whoever writes first takes it, and what is not needed any
more goes back.
"""

from typing import Self

from dar_kernels.pages import PAGE_SIZE


class PagesExhaustedError(RuntimeError):
    """Fewer pages are available than needed; nothing was changed."""

    def __init__(self, needed: int, available: int) -> None:
        super().__init__(f"pages: expected at least {needed} available, got {available}")
        self.needed, self.available = needed, available


def pages_needed(length: int) -> int:
    """Pages that hold `length` inputs of one row."""
    return -(-length // PAGE_SIZE)


def request_pages(length: int, rows: int, forked_at: int = 0) -> int:
    """Pages that `rows` rows may take at most to grow to `length` inputs: what they are promised.

    With `forked_at` > 0 they are forks that share that many inputs: a page more each where the
    shared ones end within a page.
    """
    copies = 1 if forked_at % PAGE_SIZE else 0
    return rows * (pages_needed(length) - pages_needed(forked_at) + copies)


class PagePool:
    """Pages 0 … num_pages - 1; the last one freed is the first one taken.

    Raises:
        ValueError: where `num_pages` is not positive.
    """

    __slots__ = ("_copies", "_free", "_references", "num_pages", "promised", "shared")

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages: expected an integer >= 1, got {num_pages!r}")
        self.num_pages = num_pages
        self.promised = 0  # free pages that rows may still take
        self.shared = 0  # pages with more than one row
        self._free = list(range(num_pages))[::-1]
        self._references = [0] * num_pages
        self._copies = [0] * num_pages  # of each page, that are promised

    @property
    def free(self) -> int:
        """Pages that no row holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Pages that rows hold, a shared one once."""
        return self.num_pages - len(self._free)

    @property
    def available(self) -> int:
        """Free pages that nobody was promised."""
        return len(self._free) - self.promised

    def references(self, page: int) -> int:
        """Rows that hold a page."""
        return self._references[page]

    def row(self, limit: int = 0) -> "PageRow":
        """An empty row, promised the pages of `limit` inputs.

        Raises:
            PagesExhaustedError: where fewer are available.
        """
        row = PageRow(self)
        row.extend(limit)
        return row

    def _promise(self, pages: int) -> None:
        if pages > self.available:
            raise PagesExhaustedError(pages, self.available)
        self.promised += pages

    def _take(self) -> int:
        """A promised page."""
        self.promised -= 1
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _share(self, page: int) -> None:
        self._references[page] += 1
        self.shared += self._references[page] == 2

    def _drop(self, page: int, writer: bool = False) -> None:
        """One row less, which with `writer` would still have needed a copy."""
        left = self._references[page] - 1
        self._references[page] = left
        self.shared -= left == 1
        copies = max(0, min(self._copies[page] - writer, left - 1))
        self.promised -= self._copies[page] - copies
        self._copies[page] = copies
        if not left:
            self._free.append(page)


class PageRow:
    """The block table of one row of one request; made by `PagePool.row` and by `fork`.

    `reserve`, copy the pairs, write, `advance`; and so on. `release` at the end.
    """

    __slots__ = ("_pages", "_pool", "_promised", "_released", "_writable", "length", "limit")

    def __init__(self, pool: PagePool) -> None:
        self.length = 0  # inputs that the row holds
        self.limit = 0  # inputs that it has been promised pages for
        self._pool = pool
        self._pages: list[int] = []
        self._promised = 0  # pages still to take
        self._writable = 0  # inputs from `length` up to here may be written
        self._released = False

    @property
    def pages(self) -> tuple[int, ...]:
        """The block table."""
        return tuple(self._pages)

    def extend(self, limit: int) -> None:
        """Promise the pages of `limit` inputs in all; fewer than `self.limit` change nothing.

        Raises:
            PagesExhaustedError: where fewer are available; then nothing is changed.
        """
        self._check_open()
        if limit > self.limit:
            pages = pages_needed(limit) - pages_needed(self.limit)
            self._pool._promise(pages)
            self._promised += pages
            self.limit = limit

    def reserve(self, length: int) -> list[tuple[int, int]]:
        """Make inputs `self.length` … `length` - 1 writable, by this row alone.

        Up to `limit` it cannot fail; beyond, the row is extended first.

        Returns:
            Pairs of pages (source, destination), at most one: before anything is written, and
            before the pairs of a later call, the device must copy the first to the second. Where
            that fails, repeat it or release the row: no later call returns the pair again.

        Raises:
            PagesExhaustedError: beyond `limit`, where too few are available; nothing is changed.
            ValueError: where the row is longer.
        """
        if length < self.length:
            raise ValueError(f"length: expected at least {self.length}, the row's, got {length}")
        self.extend(length)
        pool, pairs = self._pool, []
        at, within = divmod(self.length, PAGE_SIZE)
        if within and length > self.length and pool.references(self._pages[at]) > 1:
            source = self._pages[at]
            pool._copies[source] -= 1
            self._pages[at] = pool._take()
            pool._drop(source)
            pairs.append((source, self._pages[at]))
        while len(self._pages) < pages_needed(length):
            self._pages.append(pool._take())
            self._promised -= 1
        self._writable = max(self._writable, length)
        return pairs

    def advance(self, length: int) -> None:
        """The row now holds `length` inputs; to write more, reserve again.

        Raises:
            ValueError: where they were not reserved.
        """
        self._check_open()
        if not self.length <= length <= self._writable:
            raise ValueError(
                f"length: expected {self.length} to {self._writable}, reserved, got {length}"
            )
        self.length = self._writable = length

    def fork(self, length: int, limit: int = 0) -> Self:
        """A row that shares the first `length` inputs, promised pages up to `limit` inputs.

        Safe while this row's reserved inputs are being written: they lie behind the shared ones.

        Raises:
            PagesExhaustedError: where `request_pages(limit, 1, length)` are not available; then
                nothing is changed.
            ValueError: where this row is shorter.
        """
        self._check_open()
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, the row's, got {length}")
        pool, limit = self._pool, max(limit, length)
        pool._promise(request_pages(limit, 1, length))
        row = type(self)(pool)
        row._pages = self._pages[: pages_needed(length)]
        row.length = row._writable = length
        row.limit, row._promised = limit, pages_needed(limit) - len(row._pages)
        if length % PAGE_SIZE:
            pool._copies[row._pages[-1]] += 1
        for page in row._pages:
            pool._share(page)
        return row

    def release(self) -> None:
        """Give back all pages and promises, once no write is under way; again: no effect."""
        self._released = True
        self._pool.promised -= self._promised
        end = self.length // PAGE_SIZE if self.length % PAGE_SIZE else -1
        for at in reversed(range(len(self._pages))):  # the first page is the next one taken
            self._pool._drop(self._pages[at], writer=at == end)
        self._pages, self._promised = [], 0

    def _check_open(self) -> None:
        if self._released:
            raise ValueError("PageRow: expected one in use, got one that was released")


__all__ = ["PagePool", "PageRow", "PagesExhaustedError", "pages_needed", "request_pages"]
