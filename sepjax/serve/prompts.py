"""How the prompts of jobs are read: from a row that is kept, a beginning that others need by itself, then what is left.

Choices of one prompt read it together: the first one reads all but its last token, and the others wait and go on from
there, each with draws of its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from sepjax.config import UserError
from sepjax.generation.row import StreamEvent
from sepjax.generation.sampling import Sampling
from sepjax.generation.slots import SlotRequest, Slots
from sepjax.serve.conversations import BLOCK, Conversations, Plan
from sepjax.serve.errors import refused
from sepjax.serve.jobs import Begun, Failed, FairQueue, Item, Job, Share, failed_or
from sepjax.serve.keeper import Keeper
from sepjax.serve.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Of one worker, in its thread."""

    slots: Slots
    conversations: Conversations
    keeper: Keeper
    metrics: Metrics
    queue: FairQueue  # where those that have waited for others' reading go on waiting, as the first
    running: dict[int, Job]  # by the number of their request
    put: Callable[[Job, Item], None]
    end: Callable[[Job, Failed], None]

    def begin(self, job: Job) -> None:
        """Gives a job a row; or has it wait, if another one is reading its prompt."""
        share = job.share
        if job.aside is not None:
            given, least = len(job.answer), job.request.min_new_tokens
            left = {
                "max_new_tokens": (job.request.max_new_tokens or 0) - given,
                "min_new_tokens": max(0, least - given),
            }
            changes: dict[str, Any] = {"resume": job.aside, "seed": None, **left}
            job.aside = None
            self._submit(job, dataclasses.replace(job.request, **changes))
        elif share is not None and share.reader is not None:
            share.waiting.append(job)
        elif share is not None and share.plan is not None:
            plan = share.plan
            self._begun(job, plan.cached)
            self._read(job, plan)
        else:
            plan = self.conversations.plan(job.ids, job.blocks)
            if plan.entry is not None:
                self.keeper.used(plan.entry)
            self._begun(job, plan.cached)
            self._go_on(job, plan)

    def _begun(self, job: Job, cached: int) -> None:
        if job.share is not None:
            job.share.to_begin -= 1
        self.metrics.begun(len(job.ids), cached)
        self.put(job, Begun(cached))

    def _go_on(self, job: Job, plan: Plan) -> None:
        """Reads what a plan wants by itself, or what other choices need too, or the rest."""
        share, most = job.share, self.conversations.most(job.ids)
        if plan.cut:
            job.cut = plan.cut
        elif share is not None and share.to_begin and self.conversations.is_on and most > plan.cached:
            job.cut, job.reads_for_others = most, True
        else:
            self._read(job, plan)
            return
        if share is not None:
            share.reader = job
        prompt = job.ids[plan.cached : job.cut].tolist()
        beginning = SlotRequest(
            prompt, 1, Sampling.create(), 0, resume=plan.row, stop_at_eos=False, keep=True, undrawn=True
        )  # fmt: skip
        self._submit(job, beginning)

    def _read(self, job: Job, plan: Plan) -> None:
        """Reads what a plan leaves of the prompt, and answers it."""
        if job.share is not None and not job.share.to_begin:
            job.share.plan = None  # nobody else needs its row
        job.source = plan.entry
        prompt = job.ids[plan.cached :].tolist()
        keep = self.conversations.is_on  # else nobody would ask for it
        self._submit(job, dataclasses.replace(job.request, prompt=prompt, resume=plan.row, keep=keep))

    def _submit(self, job: Job, request: SlotRequest) -> None:
        try:
            job.number = self.slots.submit(request)
        except UserError as error:
            self.end(job, Failed(refused(error)))
        else:
            self.running[job.number] = job

    def beginning_read(self, number: int, job: Job, event: StreamEvent) -> None:
        """The beginning that was read by itself is there: it is kept, and gone on from."""
        del self.running[number]
        if isinstance(failed := failed_or(event), Failed):
            self.slots.cancel(number)
            self.end(job, failed)
            return
        row = None if event.finish_reason == "full" else self.slots.save(number)
        if row is None or row.is_full:  # a cache that must not lose separators: nothing can go on from it
            self.slots.cancel(number)
            self.given_up(job)
            self._read(job, Plan(None, None, 0))
            return
        cut, for_others, share = job.cut, job.reads_for_others, job.share
        job.cut, job.reads_for_others = 0, False
        if for_others:
            entry = self.conversations.add(job.ids[:cut], job.blocks[: cut // BLOCK], None, row)
        else:
            entry = self.conversations.made(cut, job.blocks, job.ids, row)
        self.keeper.put(entry)
        plan = Plan(entry, row, 0)
        if share is not None:
            share.reader = None
        is_all = for_others or cut >= self.conversations.most(job.ids)  # nothing is left that others would need, too
        if is_all and share is not None:
            share.plan = plan
            self._let_go_on(share)
            self._read(job, plan)
        else:
            self._go_on(job, plan)

    def given_up(self, job: Job) -> None:
        """A job reads nothing by itself any more; others read for themselves."""
        if job.cut and not job.reads_for_others:
            self.conversations.given_up(job.cut, job.blocks)
        job.cut, job.reads_for_others = 0, False
        if job.share is not None and job.share.reader is job:
            job.share.reader = None
            self._let_go_on(job.share)

    def _let_go_on(self, share: Share) -> None:
        waiting, share.waiting = share.waiting, []
        for job in reversed(waiting):
            self.queue.put_back(job)
