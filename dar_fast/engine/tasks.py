"""A request while the engine has it: a job, and one task for each of its candidates.

Jobs talk to the user; tasks hold slots and pages. All fields are guarded by the engine's lock.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dar_fast.engine.events import Chosen, Event, Failed, Finished, Preview, Result
from dar_fast.engine.handle import Handle
from dar_fast.engine.pages import PageRow
from dar_fast.engine.request import GenerationRequest, Plan
from dar_fast.engine.rows import StepRow, TokenRow
from dar_fast.engine.streams import Mark


@dataclass(slots=True, eq=False)
class Task:
    """One candidate: codes drawn group by group, then solver steps."""

    plan: Plan
    job: "Job"
    index: int = 0  # among the candidates
    parent: "Task | None" = None  # whose first groups a fork takes over
    slot: int = -1
    rows: list[PageRow] = field(default_factory=list)  # conditional, then null; empty: released
    drawn: int = 0  # groups
    stepped: int = 0  # solver steps
    hold: int | None = None  # draw no group from this one on, until the winner is known
    drawing: bool = False  # in a batch of the token lane
    stepping: bool = False  # in a batch of the diffusion lane
    ended: bool = False  # done, failed or cancelled: what it holds goes back at the next boundary
    copies: list[tuple[int, int]] = field(default_factory=list)  # of pages, before it draws
    inherited: bool = False  # the first `drawn` groups are a parent's, and not yet in the slot
    extended: int = 0  # groups that have conditions
    free: Mark = field(default_factory=Mark)  # the device is done with who had the slot before
    drawn_mark: Mark = field(default_factory=Mark)  # the codes are in the slot
    stepped_mark: Mark = field(default_factory=Mark)  # the device is done with the last step
    turn: int = 0  # when the diffusion lane last took it
    codes: list[Tensor] = field(default_factory=list)  # [Q] a group, on the CPU
    estimate: Tensor | None = None  # [3, R, R] after the last step, where it may be the picture

    @property
    def to_draw(self) -> int:
        """Groups to draw for now."""
        return self.plan.groups if self.hold is None else self.hold

    @property
    def can_draw(self) -> bool:
        return not (self.drawing or self.ended) and self.drawn < self.to_draw

    @property
    def can_step(self) -> bool:
        if self.stepping or self.ended or self.stepped >= self.plan.steps:
            return False
        if self.inherited:  # the token lane writes the parent's codes to the slot as it draws
            return False
        return self.plan.reads[self.stepped] <= self.drawn

    @property
    def can_step_later(self) -> bool:
        """Whether a step is left that reads no group behind `to_draw`."""
        plan = self.plan
        return self.stepped < plan.steps and plan.reads[self.stepped] <= self.to_draw

    @property
    def complete(self) -> bool:
        """Whether all codes are drawn and all steps taken."""
        return self.drawn == self.plan.groups and self.stepped == self.plan.steps

    def token_row(self, group_size: int) -> TokenRow:
        """The next group of decode steps."""
        plan, first = self.plan, self.drawn * group_size
        return TokenRow(
            slot=self.slot, label=plan.label, seed=plan.seed, position=first,
            guidance=plan.guidance[first : first + group_size],
            temperature=plan.temperatures[first], top_k=plan.top_k, top_p=plan.top_p,
            pages=self.rows[0].pages, null_pages=self.rows[1].pages if plan.guided else None,
            forced=plan.prefix[first : first + group_size],
        )  # fmt: skip

    def step_row(self) -> StepRow:
        """The next solver step."""
        plan = self.plan
        return StepRow(
            slot=self.slot, step=self.stepped, num_steps=plan.num_steps, solver=plan.solver
        )


@dataclass(slots=True, eq=False, weakref_slot=True)
class Job:
    """What a user submitted: one task, or the candidates of `best_of`."""

    request: GenerationRequest
    handle: Handle | None  # None: it has been told the end, and goes when its user lets go
    order: int  # of submission, the handle's number
    expires: float  # by time.monotonic()
    tasks: list[Task] = field(default_factory=list)
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None  # when the first group began
    scores: tuple[float, ...] | None = None
    previews: dict[int, Preview] = field(default_factory=dict)  # of candidates that wait
    forks: list["Job"] = field(default_factory=list)  # that wait for codes of this one
    fork_group: int = 0
    error: Exception | None = None  # why it has no result; the user may yet have to be told

    @property
    def undecided(self) -> bool:
        """Whether candidates still compete."""
        return len(self.tasks) > 1

    @property
    def ended(self) -> bool:
        return all(task.ended for task in self.tasks)

    def tell(self, event: Event) -> None:
        """To the user; raises what the user's listener raises."""
        handle = self.handle
        if handle is None:
            return
        if isinstance(event, Finished | Failed):
            self.handle = None
        handle._tell(event)

    def fail(self, error: Exception) -> None:
        """End without a result."""
        self.tell(Failed(error=error))

    def finish(self, task: Task, image: Tensor | None) -> None:
        """End with the picture of a task."""
        plan, now = task.plan, time.monotonic()
        started = self.started or now
        result = Result(
            image=image, codes=torch.cat(task.codes), label=plan.label, seed=plan.seed,
            noise_seed=plan.noise_seed, scores=self.scores,
            queued_seconds=started - self.submitted, seconds=now - self.submitted,
        )  # fmt: skip
        self.tell(Finished(result=result))

    def choose(self, scores: tuple[float, ...]) -> Task:
        """Keep the first task of the highest score; the others end. The winner's task."""
        winner = self.tasks[scores.index(max(scores))]
        for task in self.tasks:
            task.ended = task.ended or task is not winner
        self.tasks, self.scores, winner.hold = [winner], scores, None
        return winner

    def announce(self, winner: Task) -> None:
        """Tell who won, and the preview that won it."""
        self.tell(Chosen(seed=winner.plan.seed, scores=self.scores or ()))
        if self.request.previews:
            self.tell(self.previews[winner.index])
        self.previews.clear()


__all__ = ["Job", "Task"]
