"""The operator's process: watches fill the store, a queue gathers, workers reconcile, a Lease says which operator may.

kopf is the frame: it watches the resource (and waits for its CRD) and keeps the login of its watch fresh. Its handler
only puts the resource into the store and the key into the queue: kopf keeps no annotation, finalizer or progress of its
own in any object. All other kinds are followed by the list-watch that the gateway uses.
"""

import asyncio
import contextlib
import logging
import time
from typing import Any, cast

import aiohttp
import kopf
from moe_contract.api_server import ApiError, ApiServer
from moe_contract.list_watch import Times

from moe_operator.kubernetes.api import Api
from moe_operator.kubernetes.descriptors import most_streams
from moe_operator.kubernetes.failure import is_expected
from moe_operator.kubernetes.kinds import SERVING
from moe_operator.kubernetes.leader import Election
from moe_operator.kubernetes.liveness import serve_liveness
from moe_operator.kubernetes.metrics import Metrics
from moe_operator.kubernetes.presence import Presence, Role
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.reconciler import Reconciler
from moe_operator.kubernetes.rivals import FORMER_LEASE, LABELS, SERVES, Rivals, render_scope
from moe_operator.kubernetes.settings import OperatorSettings
from moe_operator.kubernetes.state_streams import NUMBERS_EVERY_S, StateStreams
from moe_operator.kubernetes.store import Key, Store
from moe_operator.kubernetes.watches import Watches

# The API server sends a bookmark each minute: a watch that is silent for longer is dead.
INACTIVITY_S = 90.0
KOPF_END_S = 10.0
BEGIN_EVERY_S = 2.0
# A kind that is installed later is noticed within this time.
KINDS_EVERY_S = 60.0

log = logging.getLogger("moeserving.operator")


def kept_for_changes(workers: int) -> int:
    """The workers beside `workers` that take changes alone: a quarter more, at least one."""
    return max(1, workers // 4)


class _NoDifferences(kopf.DiffBaseStorage):
    """Keeps kopf from comparing each object with one of before: no handler here asks for the difference."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, *, body: kopf.Body) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: kopf.BodyEssence) -> None:
        """Nothing is kept in the object."""


class Operator:
    """One operator; `run` ends when it no longer leads or after `stop`.

    Raises:
        LoginError: neither a pod's account nor a usable kubeconfig is there.
    """

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings, self._server = settings, ApiServer()
        self._store: Store = Store()
        self._queue: WorkQueue[Key] = WorkQueue(most_background=settings.workers)
        self._stop = asyncio.Event()
        self._metrics = Metrics(self._queue, self._store)

    async def run(self) -> None:
        """Runs until `stop` or the loss of the lead.

        Raises:
            Exception: a part of the operator failed.
        """
        settings = self._settings
        self._api = Api(self._server)
        self._api.own.on_change = self._see_change
        self._metrics.calls = self._api.calls
        times = Times(
            watch_s=settings.watch_s,
            relist_s=settings.resync_s,
            silence_s=INACTIVITY_S,
            absent_s=min(KINDS_EVERY_S, settings.resync_s),
        )
        self._watches = Watches(self._server, self._store, self._namespaces(), self._api.own, self._api.calls, times)
        # 0: no bound. A stream keeps its connection.
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            streams = StateStreams(session, self._see_state, most_streams())
            self._reconciler = Reconciler(
                self._api,
                self._store,
                session,
                settings.defaults,
                lambda: self._watches.kinds,
                self._watches.sight.blind_spot,
                streams,
            )
            self._election = self._stand_for_election()
            self._metrics.describe = self._describe
            self._api.may_write = self._election.holds
            await self._metrics.start(settings.metrics_port)
            try:
                await self._run_parts()
            finally:
                await streams.close()
                await self._metrics.stop()
                await self._server.close()

    def _stand_for_election(self) -> Election:
        settings, scope = self._settings, render_scope(self._settings.namespaces)
        return Election(
            self._api,
            settings.own_namespace,
            settings.lease,
            settings.identity,
            settings.terms,
            find_rivals=Rivals(self._api, settings.own_namespace, settings.lease, scope).find,
            metadata={"labels": LABELS, "annotations": {SERVES: scope}},
        )

    def _describe(self) -> Presence:
        """What this operator does now, for its readiness and its metrics."""
        settings, rivals = self._settings, tuple(map(str, self._election.rivals))
        # Its own Lease with another scope, or under the former name, is that of the pod that it replaces.
        own = {f"{settings.own_namespace}/{name}" for name in (settings.lease, FORMER_LEASE)}
        is_rivalled = any(rival.place not in own for rival in self._election.rivals)
        if self._election.leading.is_set():
            role = Role.LEADS
        elif is_rivalled:
            role = Role.RIVALLED
        else:
            role = Role.STANDS_BY if self._watches.synced.is_set() else Role.STARTS
        return Presence(role=role, rivals=rivals, unreadable=tuple(self._watches.sight.unreadable()))

    def stop(self) -> None:
        """Makes `run` return once its work has ended."""
        self._stop.set()

    async def _run_parts(self) -> None:
        if not await self._begin():
            return
        parts = [
            asyncio.create_task(self._watch(), name="kopf"),
            asyncio.create_task(self._elect(), name="election"),
            asyncio.create_task(self._lead(), name="workers"),
            asyncio.create_task(self._resync(), name="resync"),
            asyncio.create_task(self._watches.run(), name="watches"),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                if (error := part.exception()) is not None:
                    raise error
        finally:
            # Writing ends first and the Lease is let go, so that another may lead; kopf takes seconds to end its own.
            self._stop.set()
            watch, *writers = parts
            for part in writers:
                part.cancel()
            await asyncio.gather(*writers, return_exceptions=True)
            await self._let_go()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(watch, return_exceptions=True), KOPF_END_S)

    async def _let_go(self) -> None:
        try:
            await asyncio.wait_for(self._election.release(), self._settings.terms.retry_s)
        except (ApiError, TimeoutError) as error:
            log.warning("the lease runs out by itself: %r", error)

    # Watches.

    def _namespaces(self) -> tuple[str | None, ...]:
        return self._settings.namespaces or (None,)

    async def _list_servings(self) -> None:
        """Lists the resources; `ApiError` when the API server or their kind is not there, in no namespace."""
        refusals = []
        for namespace in self._namespaces():
            try:
                listing = await self._api.list(SERVING, namespace)
            except ApiError as error:
                refusals.append(error)
                continue
            assert listing is not None, "its own kind is not optional"
            for key in self._store.replace(SERVING, listing, namespace):
                self._see_change(key)
        if len(refusals) == len(self._namespaces()):
            raise refusals[0]
        for refusal in refusals:
            log.warning("not all namespaces can be read: %s", refusal)

    async def _begin(self) -> bool:
        """Waits until the API server answers and knows the resource; False when stopped before."""
        while not self._stop.is_set():
            try:
                await self._list_servings()
            except ApiError as error:
                log.warning("not yet: %s; is the CRD installed, does the API server run?", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), BEGIN_EVERY_S)
            else:
                return True
        return False

    async def _is_synced(self) -> bool:
        """Waits until every kind was read once, or was refused; False when stopped before."""
        waits = [asyncio.ensure_future(one.wait()) for one in (self._watches.synced, self._stop)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return not self._stop.is_set()

    async def _resync(self) -> None:
        """Queues every resource again and again, against changes that were lost on the way; not all at once."""
        half_s = self._settings.resync_s / 2.0
        while True:
            await asyncio.sleep(half_s)
            try:
                await self._list_servings()
            except ApiError as error:
                log.warning("resync: %r", error)
                continue
            known = self._store.known()
            for key in known:
                await asyncio.sleep(half_s / len(known))
                self._queue.add_in_background(key)

    async def _watch(self) -> None:
        """Runs kopf until the end: the watch of the resource and its login, and the liveness endpoint.

        Of some namespaces alone the resource is followed by `Watches`: a refusal in one would end kopf for all.
        """
        if not await self._is_synced():
            return
        registry = kopf.OperatorRegistry()
        if not self._settings.namespaces:
            kopf.on.event(SERVING.group, SERVING.version, SERVING.plural, id="resource", registry=registry)(self._see)
        kopf.on.login(id="login", registry=registry)(kopf.login_via_client)
        namespaces = self._settings.namespaces
        async with serve_liveness(self._settings.liveness_port, self._probe):
            await kopf.operator(
                registry=registry,
                settings=self._kopf_settings(),
                standalone=True,
                # Else kopf asks for the name of the user, which in a container has none.
                identity=cast(Any, self._settings.identity),
                clusterwide=not namespaces,
                namespaces=namespaces,
                stop_flag=self._stop,
            )

    async def _see(self, event: Any, **_: Any) -> None:
        """Takes an event of kopf, which of those that come together passes on the last alone."""
        document = {**event["object"], "apiVersion": SERVING.api_version, "kind": SERVING.name}
        deleted = event["type"] == "DELETED"
        key = self._store.remove(SERVING, document) if deleted else self._store.put(SERVING, document)
        if key is not None:
            self._see_change(key)

    def _see_change(self, key: Key) -> None:
        """Queues a resource of which an object changed; before it leads an operator knows no change from another."""
        if self._election.leading.is_set():
            self._queue.add(key)
        else:
            self._queue.add_in_background(key)

    def _see_state(self, key: Key, numbers_only: bool) -> None:
        """Queues a resource of which an agent or a gateway changed; numbers, which always change, can wait."""
        if numbers_only:
            self._queue.add_after(key, NUMBERS_EVERY_S)
        else:
            self._queue.add(key)

    def _kopf_settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        # In some namespaces alone it may list neither namespaces nor CRDs, and kopf would try again and again.
        settings.scanning.disabled = bool(self._settings.namespaces)
        watching = settings.watching
        watching.server_timeout = self._settings.watch_s
        watching.client_timeout = self._settings.watch_s + 30.0
        watching.connect_timeout = 10.0
        watching.inactivity_timeout = INACTIVITY_S
        watching.chunk_size = 500
        # A change is only put into a queue here, so little is ever in the way of an end.
        settings.queueing.worker_limit = 64
        settings.queueing.idle_timeout = 1.0
        settings.queueing.exit_timeout = 0.5
        settings.posting.enabled = False
        settings.persistence.diffbase_storage = _NoDifferences()
        return settings

    async def _probe(self) -> dict[str, Any]:
        return {"queue": {"queue": len(self._queue), "leading": self._election.leading.is_set()}}

    # Workers.

    async def _elect(self) -> None:
        if await self._is_synced():
            await self._election.run()

    async def _lead(self) -> None:
        await self._election.leading.wait()
        for key in self._store.known():
            self._queue.add_in_background(key)
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._settings.workers + kept_for_changes(self._settings.workers)):
                workers.create_task(self._work())

    async def _work(self) -> None:
        while self._election.leading.is_set():
            key = await self._queue.take()
            started_s = time.monotonic()
            try:
                if not self._election.leading.is_set():
                    return
                again_after_s = await self._reconciler.reconcile(key)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # An error of one resource stops none of the others.
                delay_s = self._queue.failed(key)
                expected = is_expected(error)
                log.log(
                    logging.WARNING if expected else logging.ERROR,
                    "%s: %r; again in %.1f s",
                    key,
                    error,
                    delay_s,
                    exc_info=None if expected else error,
                )
                self._metrics.observe("failed", time.monotonic() - started_s)
            else:
                self._queue.done(key, again_after_s=again_after_s)
                self._metrics.observe("ok", time.monotonic() - started_s)
