"""A real Kubernetes API: etcd and kube-apiserver, without nodes or controllers: level `api`, and the base of `node`.

Used by the command and the fixtures. All state is below `state_dir`; an object of this class is a handle without any.
"""

import dataclasses
import random
import secrets
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster_binaries import API_LEVEL, locate, locate_all
from cluster_certificates import Certificates, encoded, write_kubeconfig
from cluster_problem import ClusterProblem
from cluster_processes import Processes

ADMIN = "admin"
ADMINS = "system:masters"
PORTS = range(20000, 32000)  # below what the kernel hands out by itself: a stopped server's port stays free for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoints:
    """Where the API server and etcd listen, and the range of the Services' addresses."""

    host: str
    bind: str
    api_port: int
    etcd_port: int
    peer_port: int
    service_range: str = "10.96.0.0/16"
    service_host: str = "10.96.0.1"


class ApiCluster:
    """One API server with its etcd."""

    level = "api"
    programs = API_LEVEL
    users: tuple[tuple[str, str], ...] = ((ADMIN, ADMINS),)

    def __init__(self, state_dir: Path, endpoints: Endpoints, *, tied: bool = False) -> None:
        self.state_dir = state_dir
        self.endpoints = endpoints
        self.processes = Processes(state_dir=state_dir, tied=tied)
        self.certificates = Certificates(folder=state_dir / "pki")

    @classmethod
    def new(cls, state_dir: Path, *, tied: bool = False) -> "ApiCluster":
        """A cluster that is not up yet, on free ports."""
        loopback = "127.0.0.1"
        api, etcd, peer = free_ports(3)
        ends = Endpoints(host=loopback, bind=loopback, api_port=api, etcd_port=etcd, peer_port=peer)
        return cls(state_dir, ends, tied=tied)

    @property
    def kubeconfig(self) -> Path:
        """Path of the administrator's kubeconfig."""
        return self.state_dir / "kubeconfig"

    @property
    def server(self) -> str:
        return f"https://{self.endpoints.host}:{self.endpoints.api_port}"

    @property
    def parts(self) -> tuple[str, ...]:
        """The processes that a whole cluster has."""
        return ("etcd", "kube-apiserver")

    def record(self) -> dict[str, object]:
        """What another process needs to use this cluster."""
        return {"level": self.level, "endpoints": dataclasses.asdict(self.endpoints)}

    def start(self) -> None:
        """Brings it up; ready when this returns."""
        locate_all(self.programs)
        self._write_credentials()
        self.start_etcd()
        self.start_api_server()

    def start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.endpoints.etcd_port, self.endpoints.peer_port))
        self._run(
            "etcd",
            *("--data-dir", self.state_dir / "etcd", "--unsafe-no-fsync"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *(
                "--listen-peer-urls",
                peer,
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                f"default={peer}",
            ),
        )

    def start_api_server(self) -> None:
        """Starts it on its port and etcd, for the first time or again; ready when this returns."""
        self._run("kube-apiserver", *self.api_server_arguments())
        self.processes.wait("kube-apiserver", "the API server is ready", self.is_ready)

    def stop_api_server(self, *, kill: bool = False) -> None:
        """Ends it; etcd goes on, and `start_api_server` continues where it was."""
        self.processes.stop("kube-apiserver", kill=kill)

    def restart_api_server(self, *, kill: bool = False) -> None:
        self.stop_api_server(kill=kill)
        self.start_api_server()

    def api_server_arguments(self) -> list[str | Path]:
        ends, path = self.endpoints, self.certificates.path
        return [
            *("--etcd-servers", f"http://127.0.0.1:{ends.etcd_port}"),
            *("--bind-address", ends.bind, "--secure-port", str(ends.api_port), "--advertise-address", ends.host),
            *("--tls-cert-file", path("apiserver.crt"), "--tls-private-key-file", path("apiserver.key")),
            *("--client-ca-file", path("ca.crt"), "--token-auth-file", path("tokens.csv")),
            *("--service-account-issuer", "https://kubernetes.default.svc"),
            *("--service-account-key-file", path("service-accounts.pub")),
            *("--service-account-signing-key-file", path("service-accounts.key")),
            *("--service-cluster-ip-range", ends.service_range, "--allow-privileged=true"),
            *("--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction"),
            *self.admission_arguments(),
        ]

    def admission_arguments(self) -> Sequence[str]:
        """No controller makes the accounts that this plugin wants for each pod."""
        return ("--disable-admission-plugins", "ServiceAccount")

    def is_ready(self) -> bool:
        try:
            return self.get("/readyz") == "ok"
        except (OSError, ClusterProblem):
            return False

    def get(self, path: str) -> str:
        """GET as the administrator, past any proxy."""
        token = self._token(ADMIN)
        request = urllib.request.Request(self.server + path, headers={"Authorization": f"Bearer {token}"})
        context = ssl.create_default_context(cafile=str(self.certificates.path("ca.crt")))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with opener.open(request, timeout=5) as answer:
            return str(answer.read().decode())

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Output of kubectl as the administrator; a refusal is a ClusterProblem with its message."""
        words = [str(word) for word in (locate("kubectl"), "--kubeconfig", self.kubeconfig, *arguments)]
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ClusterProblem(f"kubectl {' '.join(words[3:])}: {done.stderr.strip()}")
        return done.stdout

    def user_kubeconfig(self, user: str, *groups: str) -> Path:
        """A kubeconfig for a new user, known by a certificate: no restart, and no rights but those that RBAC gives."""
        self.certificates.issue_user(user, list(groups))
        stem = self.certificates.path(f"user-{user}")
        identity = {
            "client-certificate-data": encoded(stem.with_name(stem.name + ".crt")),
            "client-key-data": encoded(stem.with_name(stem.name + ".key")),
        }
        return write_kubeconfig(self.state_dir / f"{user}.kubeconfig", self.server, self.certificates, identity)

    def service_account_kubeconfig(self, namespace: str, name: str) -> Path:
        """A kubeconfig with a token of this service account, made when it is absent: what its pods would use."""
        if not self.kubectl("get", "serviceaccount", name, "-n", namespace, "--ignore-not-found"):
            self.kubectl("create", "serviceaccount", name, "-n", namespace)
        token = self.kubectl("create", "token", name, "-n", namespace, "--duration", "24h").strip()
        path = self.state_dir / f"{namespace}.{name}.kubeconfig"
        return write_kubeconfig(path, self.server, self.certificates, {"token": token})

    def command(self, name: str, *arguments: str | Path) -> list[str | Path]:
        """How a program of the cluster is run."""
        return [locate(name), *arguments]

    def _run(self, name: str, *arguments: str | Path) -> None:
        self.processes.start(name, self.command(name, *arguments))

    def _write_credentials(self) -> None:
        ends = self.endpoints
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"]
        self.certificates.make(names, list(dict.fromkeys(["127.0.0.1", ends.host, ends.service_host])))
        rows = [(secrets.token_hex(16), user, group) for user, group in self.users]
        tokens = self.certificates.path("tokens.csv")
        tokens.touch(mode=0o600)
        tokens.write_text("".join(f'{token},{user},{user},"{group}"\n' for token, user, group in rows))
        write_kubeconfig(self.kubeconfig, self.server, self.certificates, {"token": self._token(ADMIN)})

    def _token(self, user: str) -> str:
        for line in self.certificates.path("tokens.csv").read_text().splitlines():
            token, name, _ = line.split(",", 2)
            if name == user:
                return token
        raise ClusterProblem(f"no token for '{user}'")


def free_ports(count: int) -> list[int]:
    """Distinct ports of loopback that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise ClusterProblem(f"no free port from {PORTS.start} to {PORTS.stop}")
