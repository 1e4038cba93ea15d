"""The coordinator of a batch: it finds cases, gives them to workers, and records their outcomes."""

from __future__ import annotations

import logging
import os
import shutil
import time
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, Protocol

from fseft_edge.batch.case_work import CaseTask, failed_outcome, read_record
from fseft_edge.batch.cluster_pool import ClusterWorkerPool
from fseft_edge.batch.inbox import Arrival, Inbox, signature_of
from fseft_edge.batch.local_pool import LocalWorkerPool
from fseft_edge.batch.messages import CaseLost, PoolEvent
from fseft_edge.batch.options import options_fingerprint, other_options, same_options
from fseft_edge.batch.report import write_report
from fseft_edge.batch.settings import BatchSettings, BatchSummary, StopRequest
from fseft_edge.batch.worker import WorkerSettings
from fseft_edge.outbox.content_key import content_key, content_of
from fseft_edge.outbox.folders import (
    check_folders,
    checked_state_path,
    disk_problem,
    lock_outbox,
    outbox_id,
    remove_partial_results,
    scratch_folder,
)
from fseft_edge.outbox.records import CaseState, Outcome
from fseft_edge.outbox.store import FINGERPRINT_KEY, SOURCE_MISSING, UNREADABLE_PREFIX, BatchStore
from fseft_edge.runtime.errors import BatchStateError, FseftEdgeError, OutOfSpaceError, UnreadableFileError
from fseft_edge.segmentation.failures import in_words
from fseft_edge.segmentation.label_values import warn_of_new_label_values
from fseft_edge.segmentation.models import load_models

_LOG = logging.getLogger(__name__)

_POLL_SECONDS: Final = 1.0  # longest wait for events of the workers
_REPORT_SECONDS: Final = 60.0  # shortest time between two reports
_INBOX_SECONDS: Final = 5.0  # longest time between two looks into the inbox


class WorkerPool(Protocol):
    """Runs cases in worker processes."""

    @property
    def in_progress(self) -> int:
        """Number of cases that were given to workers and have not ended."""

    def has_capacity(self, *, exclusive: bool) -> bool:
        """Whether another case can be submitted. An exclusive case needs a worker that has no case."""

    def submit(self, task: CaseTask, *, exclusive: bool) -> None:
        """Give a case to a worker."""

    def events(self, timeout: float) -> list[PoolEvent]:
        """Return the events since the last call; wait at most ``timeout`` seconds for the first event."""

    def close(self, *, now: bool = False) -> list[str]:
        """Stop the workers, at once or after their present cases; return the keys of the cases that did not end."""


def run_batch(settings: BatchSettings, stop: StopRequest | None = None) -> BatchSummary:
    """Segment every scan of the inbox into the outbox, each scan exactly once.

    Every case gets a result folder ``outbox/<key>/``, which appears complete by one rename, and a row in the state
    file. A run that was interrupted continues when this function is called again. See docs/batch.md.

    Args:
        settings: folders and options of the batch.
        stop: request to stop the run, which a signal handler can set.

    Returns:
        Numbers of cases that ended in this run and of cases that are still waiting.

    Raises:
        UsageError: another run has locked this outbox, or inbox and outbox overlap.
        BatchStateError: the state file is damaged, was written by a newer version, or belongs to other adapters.
        InputError: an adapter, the encoder or the inbox is not usable.
        OutOfSpaceError: there is no free disk space for results; cases in progress are returned to the queue.
        EnvironmentProblemError: workers cannot start.
    """
    stop = stop or StopRequest()
    check_folders(settings.inbox, settings.outbox)
    models = load_models(settings.segmentation)
    warn_of_new_label_values(models.adapters)
    settings = settings.absolute(models.bundle.path)
    fingerprint = options_fingerprint(settings.segmentation, models)
    state = checked_state_path(settings.outbox, settings.state)
    with (
        lock_outbox(settings.outbox, state),
        BatchStore(state, create=True) as store,
        scratch_folder(settings.outbox) as scratch,
    ):
        _check_same_outbox(settings.outbox, store)
        earlier = store.metadata(FINGERPRINT_KEY)
        if earlier is not None and not same_options(earlier, fingerprint):
            raise BatchStateError(
                f"The results in {settings.outbox} were made with other adapters, with other options, or by a version "
                "that gave the organs other label values. What differs: "
                f"{', '.join(other_options(earlier, fingerprint)) or 'unknown'}.",
                remedy="Give another OUTBOX, or the same adapters and options as before.",
            )
        store.set_metadata(FINGERPRINT_KEY, fingerprint)
        store.requeue_running()
        store.forget_unreadable()
        remove_partial_results(settings.outbox)
        try:
            return _Run(settings, store, fingerprint, scratch, stop).run()
        finally:
            remove_partial_results(settings.outbox)


class _Run:
    """One run of a batch, with its open state file and its worker pool."""

    def __init__(
        self, settings: BatchSettings, store: BatchStore, fingerprint: str, scratch: Path, stop: StopRequest
    ) -> None:
        self._settings = settings
        self._store = store
        self._fingerprint = fingerprint
        self._scratch = scratch
        self._stop = stop
        self._inbox = Inbox(settings.inbox, settings.settle)
        self._done: set[str] = set()
        self._failed: set[str] = set()
        self._says_that_it_waits = False
        self._disk_problem: OutOfSpaceError | None = None
        self._pool: WorkerPool | None = None
        self._report_outdated = True
        self._last_report = float("-inf")
        self._report_duration = 0.0

    def run(self) -> BatchSummary:
        last_look = float("-inf")
        interval = min(_INBOX_SECONDS, max(self._settings.settle, _POLL_SECONDS))
        try:
            while True:
                if not self._stopping and time.monotonic() - last_look >= interval:
                    self._look_into_inbox()
                    last_look = time.monotonic()
                if not self._stopping:
                    self._submit_waiting()
                in_progress = self._pool.in_progress if self._pool else 0
                self._say_if_waiting(in_progress)
                if self._stop.now or (not in_progress and (self._stopping or self._all_ended)):
                    break
                if self._pool is None:
                    time.sleep(_POLL_SECONDS)
                    continue
                for event in self._pool.events(_POLL_SECONDS):
                    self._handle(event)
                self._report_when_due()
        finally:
            if self._pool is not None:
                for key in self._pool.close(now=self._stop.now or self._pool.in_progress > 0):
                    self._store.requeue(key)
        if self._disk_problem is not None:
            raise self._disk_problem
        self._report()
        cases = self._store.cases()
        waiting = sum(case.state == CaseState.WAITING for case in cases)
        warned = sum(case.key in self._done and bool(case.warnings) for case in cases)
        return BatchSummary(len(self._done), len(self._failed), waiting, warned)

    def _say_if_waiting(self, in_progress: int) -> None:
        """Log why nothing happens, once each time: the scans in the inbox may still be arriving."""
        number = 0 if self._stopping or in_progress else self._inbox.incomplete
        if number and not self._says_that_it_waits:
            _LOG.info(
                "Waiting: %s in the inbox may still be arriving. A scan is complete when its files have not changed "
                "for %g seconds (--settle).",
                "1 scan" if number == 1 else f"{number} scans",
                self._settings.settle,
            )
        self._says_that_it_waits = number > 0

    def _report_when_due(self) -> None:
        """Write the report if enough time has passed; at most a tenth of the time goes into reports."""
        if time.monotonic() - self._last_report >= max(_REPORT_SECONDS, 10 * self._report_duration):
            started = time.monotonic()
            self._report()
            self._last_report = time.monotonic()
            self._report_duration = self._last_report - started

    def _report(self) -> None:
        """Write the report if it is outdated. An error while writing it does not stop the batch."""
        if not self._report_outdated:
            return
        try:
            write_report(self._settings.outbox, self._store, show_ids=self._settings.show_ids)
            self._report_outdated = False
        except FseftEdgeError as error:
            _LOG.warning("The report was not written: %s", error)
        except Exception as error:  # a bug in the report must not cost the cases in progress
            _LOG.error("The report was not written: %s. This is a bug: please report it.", in_words(error))

    @property
    def _stopping(self) -> bool:
        """Whether no further case may be started."""
        late = self._settings.until is not None and datetime.now().astimezone() >= self._settings.until
        return self._stop.soon or late or self._disk_problem is not None

    @property
    def _all_ended(self) -> bool:
        waiting = any(self._store.next_waiting(exclusive=exclusive) for exclusive in (True, False))
        return not (self._settings.watch or self._inbox.incomplete or waiting)

    def _look_into_inbox(self) -> None:
        try:
            complete = self._inbox.complete_arrivals()
        except UnreadableFileError as error:
            if not self._settings.watch:
                raise
            # A network drive may be connected again later.
            _LOG.warning("%s The batch will look into the inbox again.", error.message)
            return
        for arrival in complete:
            if not self._stopping and self._store.key_of(arrival.source, arrival.signature) is None:
                self._add(arrival)

    def _add(self, arrival: Arrival) -> None:
        try:
            content = content_of(arrival.source)
        except FseftEdgeError as error:
            # The key depends on path and signature instead, so that the file is listed, and read again if it changes.
            digest = sha256(os.fsencode(arrival.source) + arrival.signature.encode()).hexdigest()
            key = f"{UNREADABLE_PREFIX}{digest[:12]}"
            if self._store.add(arrival.source, arrival.signature, key):
                self._end(key, failed_outcome(error, key, arrival.source))
            return
        key = content.key
        added = self._store.add(arrival.source, arrival.signature, key, content.files)
        self._supersede_earlier(arrival.source, key)
        if not added:
            return
        outcome = read_record(self._settings.outbox / key, self._fingerprint)
        if outcome is not None:  # from a run whose state file is lost, or that was killed before it recorded the result
            self._store.end(key, outcome)
            self._report_outdated = True

    def _supersede_earlier(self, source: Path, key: str) -> None:
        """Mark the cases whose place a case takes: its series arrived in parts, or its file or folder was changed."""
        earlier = self._store.supersede_earlier(source, key)
        for old in earlier.keys:
            _LOG.warning(
                "%s is superseded by %s: the inbox now has more or other files of its scan. Do not use the mask of %s.",
                old,
                key,
                old,
            )
        for old in earlier.replaced:
            _LOG.warning("%s: its file or folder has other content now, which is %s", old, key)
        self._done -= set(earlier.keys)
        self._failed -= set(earlier.keys)
        self._report_outdated |= bool(earlier.keys or earlier.replaced)

    def _submit_waiting(self) -> None:
        for exclusive in (True, False):
            while (
                self._has_capacity(exclusive=exclusive)
                and (case := self._store.next_waiting(exclusive=exclusive)) is not None
            ):
                outcome = read_record(self._settings.outbox / case.key, self._fingerprint)
                source = self._source(case.key)
                if outcome is not None or source is None:
                    self._end(case.key, outcome or _source_missing(case.key))
                    continue
                if self._pool is None:
                    self._pool = self._new_pool()
                    if not self._pool.has_capacity(exclusive=exclusive):
                        break
                if self._store.start(case.key):
                    self._pool.submit(CaseTask(case.key, source), exclusive=exclusive)

    def _has_capacity(self, *, exclusive: bool) -> bool:
        """Whether a waiting case can be submitted. The worker pool is started for the first case that needs it."""
        return self._pool is None or self._pool.has_capacity(exclusive=exclusive)

    def _source(self, key: str) -> Path | None:
        """Return a path at which the scan of a case is still unchanged, or None."""
        paths = self._store.sources_of(key)
        return next((path for path, signature in paths.items() if signature_of(path) == signature), None)

    def _handle(self, event: PoolEvent) -> None:
        if isinstance(event, CaseLost):
            self._handle_lost(event)
            return
        if event.outcome.problem == OutOfSpaceError.__name__ and self._requeued_for_space(event.key):
            return
        outcome = event.outcome
        if self._source(event.key) is None and not self._is_valid(event.key, outcome):
            # The scan was changed or removed while it was read, so the content behind the mask is unknown.
            shutil.rmtree(self._settings.outbox / event.key, ignore_errors=True)
            outcome = _source_missing(event.key)
        self._end(event.key, outcome)

    def _requeued_for_space(self, key: str) -> bool:
        """Return a case that found no free disk space to the queue, if it may be tried again.

        If a disk is still full, the run stops and the case waits for the next run. Otherwise the case becomes exclusive
        and the attempt counts.

        Returns:
            Whether the case was returned to the queue. If not, it has used all its attempts.
        """
        self._scratch.mkdir(mode=0o700, exist_ok=True)  # a clean-up program may have deleted the folder
        self._disk_problem = disk_problem([self._settings.outbox, self._scratch])
        if self._disk_problem is not None:
            self._store.requeue(key)
            return True
        return self._store.requeue(key, exclusive=True, attempted=True) < self._settings.attempts

    def _is_valid(self, key: str, outcome: Outcome) -> bool:
        """Whether an outcome is valid although no path of the case has its recorded signature any more."""
        left = [path for path in self._store.sources_of(key) if signature_of(path) is not None]
        if not left:  # the scan was removed; a complete mask was made from content that had been read before
            return outcome.state == CaseState.DONE
        try:
            return any(content_key(path) == key for path in left)  # only permissions or dates were changed
        except UnreadableFileError:
            return False

    def _handle_lost(self, lost: CaseLost) -> None:
        attempts = self._store.requeue(lost.key, exclusive=True, attempted=lost.counts)
        if attempts >= self._settings.attempts:
            times = f"{attempts} times" if attempts > 1 else "once"
            self._end(
                lost.key,
                Outcome(
                    CaseState.SET_ASIDE,
                    problem="Crash",
                    reason=f"{lost.key} was tried {times}: {lost.cause}.",
                    remedy="Try `fseft-edge segment` on this scan. Allow more memory or time, then use `batch retry`.",
                ),
            )

    def _end(self, key: str, outcome: Outcome) -> None:
        if outcome.problem == SOURCE_MISSING:
            self._store.mark_missing(key, outcome)
        else:
            for other in self._store.end(key, outcome):
                _LOG.warning("%s is not superseded any more: %s is another series of its folder", other, key)
        self._report_outdated = True
        case = self._store.case(key)
        if case.state == CaseState.SUPERSEDED:
            _LOG.warning("%s ended, but is superseded by %s", key, case.superseded_by)
        elif case.state == CaseState.DONE:
            self._done.add(key)
            _LOG.info("%s is done", key)
            for warning in case.warnings:  # also those that come from the other cases of the batch
                _LOG.warning("%s: %s", key, warning)
        else:
            self._failed.add(key)
            _LOG.warning("%s failed: %s %s", key, outcome.reason, outcome.remedy)

    def _new_pool(self) -> WorkerPool:
        settings = self._settings
        workers = settings.workers or 1
        shared = replace(settings.segmentation, processes=workers)
        worker_settings = WorkerSettings(shared, settings.outbox, self._fingerprint, self._scratch, settings.pipeline)
        limit = settings.limit_minutes * 60
        if settings.scheduler is not None:
            return ClusterWorkerPool(worker_settings, settings.scheduler, limit, _LOG.info)
        return LocalWorkerPool(worker_settings, workers, limit, _LOG.info)


def _source_missing(key: str) -> Outcome:
    return Outcome(
        CaseState.FAILED,
        problem=SOURCE_MISSING,
        reason=f"The scan of {key} was changed or removed before it was segmented.",
        remedy="Put the scan back into the inbox; the batch finds it. A changed scan becomes a new case. "
        "Use `batch cancel` with this key to remove the case from the list of failures.",
    )


def _check_same_outbox(outbox: Path, store: BatchStore) -> None:
    """Raise BatchStateError if the state file belongs to another outbox. Both store the same identifier."""
    own, recorded = outbox_id(outbox), store.metadata("outbox")
    if recorded not in (None, own):
        raise BatchStateError(
            f"The state file {store.path} belongs to another outbox than {outbox}.",
            remedy="Give each OUTBOX its own --state file.",
        )
    store.set_metadata("outbox", own)
