"""The coordinator of a batch: finds cases, hands them to workers, and writes down what became of each."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from fseft_edge.batch.case_work import CaseTask, outcome_of, read_record
from fseft_edge.batch.cluster_pool import ClusterWorkerPool
from fseft_edge.batch.inbox import Arrival, Inbox, signature_of
from fseft_edge.batch.local_pool import LocalWorkerPool
from fseft_edge.batch.messages import Lost, PoolEvent
from fseft_edge.batch.report import write_report
from fseft_edge.batch.settings import BatchSettings, BatchSummary, StopRequest
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.content_key import content_key
from fseft_edge.outbox.folders import (
    check_folders,
    clear_leftovers,
    no_room,
    only_one_run,
    outbox_number,
    place_of_state,
    scratch_folder,
)
from fseft_edge.outbox.records import CaseState, Outcome
from fseft_edge.outbox.store import GONE, UNREADABLE, BatchStore
from fseft_edge.runtime.errors import BatchStateError, FseftEdgeError, OutOfSpaceError, UnreadableFileError
from fseft_edge.segmentation.segmenter import LoadedModels, SegmentationSettings, load_models

_LOG = logging.getLogger(__name__)

POLL: Final = 1.0  # seconds between two looks at what workers say
_REPORT: Final = 60.0  # seconds between two reports while cases are done
_LOOK: Final = 5.0  # seconds between two looks into the inbox


class WorkerPool(Protocol):
    """Those who do the cases."""

    @property
    def in_hand(self) -> int:
        """How many cases they have."""

    def room(self, *, exclusive: bool) -> bool:
        """Whether another case can be handed over; one that has to be alone needs a worker without any."""

    def hand_over(self, task: CaseTask, *, exclusive: bool) -> None:
        """Give them a case."""

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return what happened, waiting at most so many seconds for the first of it."""

    def close(self, *, now: bool = False) -> list[str]:
        """Let them go, at once or when they have finished; return the cases that were lost by it."""


def run_batch(settings: BatchSettings, stop: StopRequest | None = None) -> BatchSummary:
    """Segment every scan of the inbox into the outbox, each exactly once, whatever happens meanwhile.

    Every case gets a folder ``outbox/<key>/``, which appears whole, and a row in the state. Called again it goes on
    where it was. See docs/batch.md.

    Args:
        settings: what, where and how.
        stop: lets a signal handler end the run.

    Raises:
        UsageError: another run holds this outbox, or inbox and outbox overlap.
        BatchStateError: the state is damaged, newer, or of other adapters.
        InputError: an adapter, the encoder or the inbox is not usable.
        OutOfSpaceError: there is no room for results; cases in hand wait again.
        EnvironmentProblemError: workers cannot start.
    """
    stop = stop or StopRequest()
    check_folders(settings.inbox, settings.outbox)
    models = load_models(settings.segmentation)
    settings = settings.absolute(models.bundle.path)
    fingerprint = _fingerprint(settings.segmentation, models)
    state = place_of_state(settings.outbox, settings.state)
    with (
        only_one_run(settings.outbox, state),
        BatchStore(state, create=True) as store,
        scratch_folder(settings.outbox) as scratch,
    ):
        _check_belongs(settings.outbox, store)
        before = store.noted("recipe")
        if before not in (None, fingerprint):
            raise BatchStateError(
                f"{settings.outbox} holds results of other adapters, or of other options.",
                remedy="Use another OUTBOX, or the same adapters and options as before.",
            )
        store.note("recipe", fingerprint)
        store.put_back_all()
        store.forget_unreadable()
        clear_leftovers(settings.outbox)
        try:
            return _Run(settings, store, fingerprint, scratch, stop).run()
        finally:
            clear_leftovers(settings.outbox)


class _Run:
    """One run of a batch, with what it holds open."""

    def __init__(
        self, settings: BatchSettings, store: BatchStore, fingerprint: str, scratch: Path, stop: StopRequest
    ) -> None:
        self._settings = settings
        self._store = store
        self._fingerprint = fingerprint
        self._scratch = scratch
        self._stop = stop
        self._inbox = Inbox(settings.inbox, settings.settle)
        self._done = self._failed = 0
        self._trouble: OutOfSpaceError | None = None
        self._pool: WorkerPool | None = None
        self._changed = True
        self._reported = float("-inf")
        self._report_seconds = 0.0

    def run(self) -> BatchSummary:
        looked = float("-inf")
        try:
            while True:
                if not self._ending and time.monotonic() - looked >= min(_LOOK, max(self._settings.settle, POLL)):
                    self._look()
                    looked = time.monotonic()
                if not self._ending:
                    self._hand_over()
                in_hand = self._pool.in_hand if self._pool else 0
                if self._stop.now or (not in_hand and (self._ending or self._nothing_more)):
                    break
                if self._pool is None:
                    time.sleep(POLL)
                    continue
                for event in self._pool.events(POLL):
                    self._note(event)
                self._report_when_due()
        finally:
            if self._pool is not None:
                for key in self._pool.close(now=self._stop.now or self._pool.in_hand > 0):
                    self._store.put_back(key)
        if self._trouble is not None:
            raise self._trouble
        self._report()
        waiting = sum(case.state == CaseState.WAITING for case in self._store.cases())
        return BatchSummary(self._done, self._failed, waiting)

    def _report_when_due(self) -> None:
        """Write the report now and then; the longer it takes, the more seldom."""
        if time.monotonic() - self._reported >= max(_REPORT, 10 * self._report_seconds):
            begun = time.monotonic()
            self._report()
            self._reported = time.monotonic()
            self._report_seconds = self._reported - begun

    def _report(self) -> None:
        """Write the report; one that cannot be written costs no case."""
        if not self._changed:
            return
        try:
            write_report(self._settings.outbox, self._store, show_ids=self._settings.show_ids)
            self._changed = False
        except FseftEdgeError as error:
            _LOG.warning("the report was not written: %s", error)

    @property
    def _ending(self) -> bool:
        """Whether no case is begun any more."""
        late = self._settings.until is not None and datetime.now().astimezone() >= self._settings.until
        return self._stop.soon or late or self._trouble is not None

    @property
    def _nothing_more(self) -> bool:
        waiting = any(self._store.next_waiting(exclusive=exclusive) for exclusive in (True, False))
        return not (self._settings.watch or self._inbox.unsettled or waiting)

    def _look(self) -> None:
        try:
            settled = self._inbox.settled()
        except UnreadableFileError as error:
            if not self._settings.watch:
                raise
            _LOG.warning("%s Looking again later.", error.message)  # a network drive that comes back
            return
        for arrival in settled:
            if not self._ending and self._store.key_of(arrival.source, arrival.signature) is None:
                self._add(arrival)

    def _add(self, arrival: Arrival) -> None:
        try:
            key = content_key(arrival.source)
        except FseftEdgeError as error:
            # Known by its place instead, so that it is listed, and looked at again when it changes.
            key = f"{UNREADABLE}{sha256(os.fsencode(arrival.source) + arrival.signature.encode()).hexdigest()[:12]}"
            if self._store.add(arrival.source, arrival.signature, key):
                self._end(key, outcome_of(error, key, arrival.source))
            return
        if not self._store.add(arrival.source, arrival.signature, key):
            return
        outcome = read_record(self._settings.outbox / key, self._fingerprint)
        if outcome is not None:  # done in a run whose state is lost, or just before the machine went down
            self._store.end(key, outcome)
            self._changed = True

    def _hand_over(self) -> None:
        for exclusive in (True, False):
            while (
                self._has_room(exclusive=exclusive)
                and (case := self._store.next_waiting(exclusive=exclusive)) is not None
            ):
                outcome = read_record(self._settings.outbox / case.key, self._fingerprint)
                source = self._source(case.key)
                if outcome is not None or source is None:
                    self._end(case.key, outcome or _gone(case.key))
                    continue
                if self._pool is None:
                    self._pool = self._new_pool()
                    if not self._pool.room(exclusive=exclusive):
                        break
                if self._store.start(case.key):
                    self._pool.hand_over(CaseTask(case.key, source), exclusive=exclusive)

    def _has_room(self, *, exclusive: bool) -> bool:
        """Whether looking at waiting cases is worth it; workers are started for the first that has to be done."""
        return self._pool is None or self._pool.room(exclusive=exclusive)

    def _source(self, key: str) -> Path | None:
        """Return where a case lies unchanged."""
        places = self._store.sources_of(key)
        return next((place for place, signature in places.items() if signature_of(place) == signature), None)

    def _note(self, event: PoolEvent) -> None:
        if isinstance(event, Lost):
            self._note_lost(event)
            return
        if event.outcome.problem == OutOfSpaceError.__name__ and self._waits_for_room(event.key):
            return
        outcome = event.outcome
        if self._source(event.key) is None and not self._may_stand(event.key, outcome):
            # It grew, was replaced or went away while it was read: nobody knows of what the mask is.
            shutil.rmtree(self._settings.outbox / event.key, ignore_errors=True)
            outcome = _gone(event.key)
        self._end(event.key, outcome)

    def _waits_for_room(self, key: str) -> bool:
        """Put back a case that found no room: until the next run or, where there is room now, to be done alone."""
        self._scratch.mkdir(mode=0o700, exist_ok=True)  # a cleaner of temporary files may have been there
        self._trouble = no_room([self._settings.outbox, self._scratch])
        if self._trouble is not None:
            self._store.put_back(key)
            return True
        return self._store.put_back(key, exclusive=True, attempted=True) < self._settings.attempts

    def _may_stand(self, key: str, outcome: Outcome) -> bool:
        """Whether an outcome holds although the scan does not lie where it lay, as it lay there."""
        left = [place for place in self._store.sources_of(key) if signature_of(place) is not None]
        if not left:  # taken away: a mask that is there was made of what had been read
            return outcome.state == CaseState.DONE
        try:
            return any(content_key(place) == key for place in left)  # permissions or dates were changed, no more
        except UnreadableFileError:
            return False

    def _note_lost(self, lost: Lost) -> None:
        attempts = self._store.put_back(lost.key, exclusive=True, attempted=lost.blamed)
        if attempts >= self._settings.attempts:
            times = f"{attempts} times" if attempts > 1 else "once"
            self._end(
                lost.key,
                Outcome(
                    CaseState.SET_ASIDE,
                    problem="Crash",
                    reason=f"{lost.key} was tried {times}: {lost.cause}.",
                    remedy="Try `fseft-edge segment` on it, or give more memory or time; then `batch retry`.",
                ),
            )

    def _end(self, key: str, outcome: Outcome) -> None:
        if outcome.problem == GONE:
            self._store.lose(key, outcome)
        else:
            self._store.end(key, outcome)
        self._changed = True
        if outcome.state == CaseState.DONE:
            self._done += 1
            _LOG.info("%s is done", key)
        else:
            self._failed += 1
            _LOG.warning("%s failed: %s %s", key, outcome.reason, outcome.remedy)

    def _new_pool(self) -> WorkerPool:
        settings = self._settings
        workers = settings.workers or 1
        of_each = WorkerSettings(
            settings.segmentation,
            settings.outbox,
            self._fingerprint,
            self._scratch,
            max(1, (os.cpu_count() or 1) // workers),
            settings.pipeline,
        )
        limit = settings.limit_minutes * 60
        if settings.scheduler is not None:
            return ClusterWorkerPool(of_each, settings.scheduler, limit, _LOG.info)
        return LocalWorkerPool(of_each, workers, limit, _LOG.info)


def _gone(key: str) -> Outcome:
    return Outcome(
        CaseState.FAILED,
        problem=GONE,
        reason=f"{key} was changed or taken away before it was done.",
        remedy="Back in the inbox it is found by itself; another scan in its place is a case of its own. "
        "`batch cancel` with this case takes it off the list.",
    )


def _fingerprint(segmentation: SegmentationSettings, models: LoadedModels) -> str:
    """Return what decides on the masks, as text."""
    return json.dumps(
        {
            "encoder": models.bundle.encoder_id,
            "adapters": [file.sha256 for file in models.adapters],
            "largest_component": segmentation.largest_component,
            "fill_holes": segmentation.fill_holes,
            "dicom": sorted(set(segmentation.dicom)),
            "transductive": segmentation.transduction is not None,
        },
        sort_keys=True,
    )


def _check_belongs(outbox: Path, store: BatchStore) -> None:
    """Make sure that a state is of this outbox; both hold the same number, which outlives a new name.

    Raises:
        BatchStateError: it is of another.
    """
    own, theirs = outbox_number(outbox), store.noted("outbox")
    if theirs not in (None, own):
        raise BatchStateError(
            f"The state {store.path} is of another outbox.", remedy="Give every OUTBOX a --state of its own."
        )
    store.note("outbox", own)
