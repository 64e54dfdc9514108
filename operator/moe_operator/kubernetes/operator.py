"""The operator's process: kopf watches, a queue gathers, workers reconcile, a Lease says who may.

kopf brings the watches (with selectors on the server's side, reconnection and a bound on silence), the liveness
endpoint and the handling of signals. Its handlers here only put what they see into the store and the resource's key
into the queue: kopf keeps no annotation, finalizer or progress of its own in any object.
"""

import asyncio
import contextlib
import logging
import time
from typing import Any, cast

import aiohttp
import httpx2
import kopf
from lightkube import ApiError, AsyncClient

from moe_operator.kubernetes.api import ALL, Api, NotLeading
from moe_operator.kubernetes.kinds import SELECTOR, SERVING, WATCHED, Kind
from moe_operator.kubernetes.leader import Election
from moe_operator.kubernetes.metrics import Metrics
from moe_operator.kubernetes.queue import WorkQueue
from moe_operator.kubernetes.reconciler import Reconciler
from moe_operator.kubernetes.settings import OperatorSettings
from moe_operator.kubernetes.store import Key, Store

LEASE_NAME = "moeserving-operator"
# The API server sends a bookmark each minute: a watch that is silent for longer is dead.
INACTIVITY_S = 90.0
KOPF_END_S = 10.0
BEGIN_EVERY_S = 2.0
# Of kinds that the cluster lacked: who installs one waits for no resync.
KINDS_EVERY_S = 60.0

log = logging.getLogger("moeserving.operator")


class Operator:
    """See the module; `run` ends when it no longer leads or is told to stop."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._store: Store = Store()
        self._queue: WorkQueue[Key] = WorkQueue()
        self._stop = asyncio.Event()
        self._metrics = Metrics(self._queue, self._store)

    async def run(self) -> None:
        """Runs until stopped."""
        settings = self._settings
        self._api = Api(AsyncClient(timeout=httpx2.Timeout(30.0, connect=5.0)))
        self._metrics.calls = self._api.calls
        async with aiohttp.ClientSession() as session:
            self._reconciler = Reconciler(self._api, self._store, session, settings.defaults)
            self._election = Election(self._api, settings.own_namespace, LEASE_NAME, settings.identity, settings.terms)
            self._api.may_write = self._election.holds
            await self._metrics.start(settings.metrics_port)
            try:
                await self._run_parts()
            finally:
                await self._metrics.stop()
                await self._api.close()

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()

    async def _run_parts(self) -> None:
        if not await self._begin():
            return
        parts = [
            asyncio.create_task(self._watch(), name="watch"),
            asyncio.create_task(self._election.run(), name="election"),
            asyncio.create_task(self._lead(), name="workers"),
            asyncio.create_task(self._resync(), name="resync"),
            asyncio.create_task(self._find_kinds(), name="kinds"),
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
        except (ApiError, httpx2.HTTPError, TimeoutError, OSError) as error:
            log.warning("the lease runs out by itself: %r", error)

    # What is seen.

    def _namespaces(self) -> tuple[str, ...]:
        return self._settings.namespaces or (ALL,)

    async def _relist(self) -> None:
        """Everything as it is now: what the store begins with, and what a watch may have lost."""
        present = set()
        for kind in WATCHED:
            before = self._store.places(kind)
            documents = await self._api.list(kind, self._namespaces())
            if documents is None:
                continue
            present.add(kind)
            for key in self._store.replace(kind, documents, before):
                self._queue.add(key)
        self._reconciler.kinds = frozenset(present)

    async def _begin(self) -> bool:
        """The first look, once the API server answers and knows the resource; False when told to stop before."""
        while not self._stop.is_set():
            try:
                await self._relist()
            except (ApiError, httpx2.HTTPError, OSError) as error:
                log.warning("not yet: %s; is the CRD installed, does the API server run?", error)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), BEGIN_EVERY_S)
            else:
                return True
        return False

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(self._settings.resync_s)
            await self._look_at_everything()

    async def _find_kinds(self) -> None:
        while True:
            await asyncio.sleep(min(KINDS_EVERY_S, self._settings.resync_s))
            missing = [kind for kind in WATCHED if kind not in self._reconciler.kinds]
            try:
                found = [kind.name for kind in missing if await self._api.list(kind, self._namespaces()) is not None]
            except (ApiError, httpx2.HTTPError, OSError) as error:
                log.warning("kinds: %r", error)
                continue
            if found:
                log.info("the cluster has %s now", ", ".join(found))
                await self._look_at_everything()

    async def _look_at_everything(self) -> None:
        try:
            await self._relist()
        except (ApiError, httpx2.HTTPError, OSError) as error:
            log.warning("resync: %r", error)
            return
        for key in self._store.known():
            self._queue.add(key)

    async def _watch(self) -> None:
        registry = kopf.OperatorRegistry()
        for kind in WATCHED:
            self._register(registry, kind)
        kopf.on.login(id="login", registry=registry)(_login)
        kopf.on.probe(id="queue", registry=registry)(self._probe)
        namespaces = self._settings.namespaces
        await kopf.operator(
            registry=registry,
            settings=self._kopf_settings(),
            standalone=True,
            # Else kopf asks for the name of the user, which in a container has none.
            identity=cast(Any, self._settings.identity),
            clusterwide=not namespaces,
            namespaces=namespaces,
            liveness_endpoint=f"http://0.0.0.0:{self._settings.liveness_port}/healthz",
            stop_flag=self._stop,
        )

    def _register(self, registry: kopf.OperatorRegistry, kind: Kind) -> None:
        place = (kind.group, kind.version, kind.plural) if kind.group else (kind.version, kind.plural)

        async def see(event: Any, **_: Any) -> None:
            document = {**event["object"], "apiVersion": kind.api_version, "kind": kind.name}
            deleted = event["type"] == "DELETED"
            key = self._store.remove(kind, document) if deleted else self._store.put(kind, document)
            if key is not None:
                self._queue.add(key)

        kopf.on.event(*place, id=f"see-{kind.plural}", registry=registry)(see)

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
        for kind in WATCHED:
            if kind != SERVING:
                place = (kind.group, kind.version, kind.plural) if kind.group else (kind.version, kind.plural)
                watching.label_selectors[place] = SELECTOR
        # A change is only put into a queue here, so little is ever in the way of an end.
        settings.batching.worker_limit = 64
        settings.batching.idle_timeout = 1.0
        settings.batching.exit_timeout = 0.5
        settings.batching.batch_window = 0.05
        settings.posting.enabled = False
        return settings

    async def _probe(self, **_: Any) -> dict[str, Any]:
        return {"queue": len(self._queue), "leading": self._election.leading.is_set()}

    # What is done.

    async def _lead(self) -> None:
        await self._election.leading.wait()
        for key in self._store.known():
            self._queue.add(key)
        async with asyncio.TaskGroup() as workers:
            for _ in range(self._settings.workers):
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
                # Whatever one resource brings about, the others go on.
                delay_s = self._queue.failed(key)
                expected = isinstance(error, ApiError | httpx2.HTTPError | OSError | TimeoutError | NotLeading)
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


def _login(**kwargs: Any) -> Any:
    """The pod's service account, else KUBECONFIG: what lightkube takes, too."""
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)
