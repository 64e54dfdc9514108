"""A whole Kubernetes of one node: control plane, kubelet, containerd, pod network, Services, DNS. The level `node`.

All processes run in mount, network and process namespaces of its own, so that the end of one process ends it
whole and without a trace: what the machine itself sees are one link with two routes, and a cgroup.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml
from cluster_api import ADMIN, ADMINS, ApiCluster, Endpoints
from cluster_binaries import NODE_LEVEL
from cluster_certificates import write_kubeconfig
from cluster_debian import ADMIN_PATH, NODE_PACKAGES, require
from cluster_images import Image, write_archive
from cluster_problem import ClusterProblem

NODE = "node1"
CONTROLLERS, SCHEDULER, KUBELET, PROXY, DNS = (
    "system:kube-controller-manager",
    "system:kube-scheduler",
    f"system:node:{NODE}",
    "system:kube-proxy",
    "coredns",
)
PAUSE = Image(name="docker.io/moeserving/pause:1", entrypoint=["/pause"], environment={})
PAUSE_SOURCE = """
#include <signal.h>
#include <unistd.h>
static void quit(int number) { _exit(0); }
int main() { signal(SIGTERM, quit); signal(SIGINT, quit); for (;;) pause(); }
"""
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
# Programs keep things here and have no option against it: in the node they are memory.
HIDDEN = ("/run", "/var/log", "/var/lib/kubelet", "/var/lib/cni")
CGROUPS = Path("/sys/fs/cgroup")
LINK = "moetest"
CLUSTERS = range(64)  # how many may run on one machine
PATIENCE_S = 20.0


class NodeCluster(ApiCluster):
    """One API server, one node."""

    level = "node"
    programs = NODE_LEVEL
    users = (
        (ADMIN, ADMINS),
        (CONTROLLERS, ADMINS),
        (DNS, ADMINS),
        (SCHEDULER, ""),
        (PROXY, ""),
        (KUBELET, "system:nodes"),
    )

    @classmethod
    def new(cls, state_dir: Path, *, tied: bool = False) -> "NodeCluster":
        check_machine(state_dir)
        taken = set(psutil.net_if_addrs())
        number = next((number for number in CLUSTERS if link_name(number) not in taken), None)
        if number is None:
            raise ClusterProblem(f"{len(CLUSTERS)} node clusters run already on this machine")
        return cls(
            state_dir,
            Endpoints(
                host=f"10.244.{number}.1",
                bind="0.0.0.0",
                api_port=6443,
                etcd_port=2379,
                peer_port=2380,
                service_range=f"10.96.{number}.0/24",
                service_host=f"10.96.{number}.1",
            ),
            tied=tied,
        )

    @property
    def number(self) -> int:
        """Keeps the addresses of several clusters on one machine apart."""
        return int(self.endpoints.host.split(".")[2])

    @property
    def pod_range(self) -> str:
        return f"10.244.{self.number}.0/24"

    @property
    def parts(self) -> tuple[str, ...]:
        controllers = ("kube-controller-manager", "kube-scheduler")
        return ("node", *super().parts, *controllers, "containerd", "kubelet", "kube-proxy", "coredns")

    def record(self) -> dict[str, object]:
        return super().record() | {"made": missing_folders(), "number": self.number}

    def start(self) -> None:
        self._make_namespaces()
        self._make_network()
        super().start()
        for user, _ in self.users:
            self._user_file(user)
        self._run("kube-controller-manager", *self._controller_arguments())
        self._run("kube-scheduler", "--kubeconfig", self._user_file(SCHEDULER), "--leader-elect=false")
        self._start_containerd()
        self.start_kubelet()
        self._run("kube-proxy", "--config", self._write("proxy.yaml", self._proxy_config()))
        self._start_dns()
        self.processes.wait("kubelet", "the node is ready", self.node_is_ready)

    def admission_arguments(self) -> tuple[str, ...]:
        """No name service knows the node: the API server asks its kubelet (logs, exec) by address."""
        return ("--kubelet-preferred-address-types", "InternalIP")

    def command(self, name: str, *arguments: str | Path) -> list[str | Path]:
        return self.enter(*super().command(name, *arguments))

    def enter(self, *command: str | Path) -> list[str | Path]:
        """This command, to run inside the node."""
        return ["nsenter", "--target", str(self._first_process()), "--mount", "--net", "--pid", "--", *command]

    def inside(self, *command: str | Path) -> str:
        """Output of a command that runs inside the node."""
        return run(*self.enter(*command))

    def load_image(self, image: Image, root: Path) -> None:
        """Makes an image of this folder known to the node; pods name it with `imagePullPolicy: Never`."""
        archive = self.state_dir / "image.tar"
        write_archive(image, root, archive)
        self.load_archive(archive)
        archive.unlink()

    def load_archive(self, archive: Path) -> None:
        self.inside("ctr", "--namespace", "k8s.io", "images", "import", archive)

    def node_is_ready(self) -> bool:
        try:
            node = json.loads(self.get(f"/api/v1/nodes/{NODE}"))
        except OSError:
            return False
        conditions = {row["type"]: row["status"] for row in node["status"].get("conditions", ())}
        return conditions.get("Ready") == "True"

    def start_kubelet(self) -> None:
        self._run(
            "kubelet",
            *("--config", self._write("kubelet.yaml", self._kubelet_config())),
            *("--kubeconfig", self._user_file(KUBELET), "--root-dir", self.state_dir / "kubelet"),
            *("--cert-dir", self.state_dir / "kubelet-pki"),
            *("--hostname-override", NODE, "--node-ip", self.endpoints.host),
        )

    def _make_namespaces(self) -> None:
        """The first process of the node, alone in its namespaces, with memory where programs would leave traces."""
        for folder in (*HIDDEN, *(cgroup_folders(self.state_dir))):
            Path(folder).mkdir(parents=True, exist_ok=True)
        apart = ["--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child", "--propagation", "private"]
        init = Path(__file__).with_name("cluster_init.py")
        self.processes.start("node", ["unshare", *apart, sys.executable, "-I", init])
        self.processes.wait("node", "the node's first process runs", lambda: self._find_first_process() is not None)
        self.inside("mount", "--make-rshared", "/")
        for folder in HIDDEN:
            self.inside("mount", "-t", "tmpfs", "tmpfs", folder)

    def _first_process(self) -> int:
        if found := self._find_first_process():
            return found
        raise ClusterProblem(f"{self.state_dir}: the node's first process is gone; run `down`, then `up`")

    def _find_first_process(self) -> int | None:
        """Its number as the machine sees it; `unshare`, which stays above it, has the same mark."""
        for process in self.processes.find("node"):
            words = process.cmdline()
            if words and words[0] == sys.executable:
                return process.pid
        return None

    def _make_network(self) -> None:
        """The pods' bridge in the node, and a link from the machine to it with routes to pods and Services."""
        link, machine, node = link_name(self.number), f"10.245.{self.number}.1", f"10.245.{self.number}.2"
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "machine", "netns", str(self._first_process()))
        for words in (
            f"link add cni0 type bridge|addr add {self.endpoints.host}/24 dev cni0|link set cni0 up|link set lo up"
            f"|addr add {node}/30 dev machine|link set machine up|route add default via {machine}"
        ).split("|"):
            self.inside("ip", *words.split())
        self.inside("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
        run("ip", "addr", "add", f"{machine}/30", "dev", link)
        run("ip", "link", "set", link, "up")
        for wanted in (self.pod_range, self.endpoints.service_range):
            run("ip", "route", "add", wanted, "via", node)

    def _controller_arguments(self) -> list[str | Path]:
        return [
            *("--kubeconfig", self._user_file(CONTROLLERS), "--root-ca-file", self.certificates.path("ca.crt")),
            *("--service-account-private-key-file", self.certificates.path("service-accounts.key")),
            "--leader-elect=false",
        ]

    def _start_containerd(self) -> None:
        config = self.state_dir / "containerd.toml"
        config.write_text(self._containerd_config())
        self.processes.start("containerd", self.enter("containerd", "--config", config))
        self.processes.wait("containerd", "containerd answers", self._containerd_answers)
        root = self.state_dir / "pause"
        root.mkdir()
        source = self._write_text("pause.c", PAUSE_SOURCE)
        run("gcc", "-static", "-O2", "-o", root / "pause", source)
        self.load_image(PAUSE, root)

    def _containerd_answers(self) -> bool:
        try:
            return bool(self.inside("ctr", "version"))
        except ClusterProblem:
            return False

    def _containerd_config(self) -> str:
        """`restrict_oom_score_adj`: a machine may forbid to lower that score."""
        self._write("cni/10-pods.conflist", self._network_config())
        return f"""version = 2
root = "{self.state_dir}/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE.name}"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{self.state_dir}/cni"
"""

    def _network_config(self) -> dict[str, object]:
        first = f"10.244.{self.number}.2"
        ranges = [[{"subnet": self.pod_range, "rangeStart": first}]]
        addresses = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}]}
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True}
        ports = {"type": "portmap", "capabilities": {"portMappings": True}}
        return {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge | {"ipam": addresses}, ports]}

    def _kubelet_config(self) -> dict[str, object]:
        """`failCgroupV1`, `oomScoreAdj`, the gate: for machines with cgroup v1 or without full rights."""
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroup_name(self.state_dir)}",
            "failCgroupV1": False,
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
            "failSwapOn": False,
            "enforceNodeAllocatable": [],
            "oomScoreAdj": 0,
            "clusterDNS": [self.endpoints.host],
            "clusterDomain": "cluster.local",
            "resolvConf": "",
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
            "featureGates": {"KubeletInUserNamespace": True},
        }

    def _proxy_config(self) -> dict[str, object]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": str(self._user_file(PROXY))},
            "mode": "iptables",
            "clusterCIDR": self.pod_range,
            "hostnameOverride": NODE,
            "conntrack": {"maxPerCore": 0},
        }

    def _start_dns(self) -> None:
        config = self._write_text(
            "Corefile",
            f".:53 {{\n bind {self.endpoints.host}\n errors\n ready {self.endpoints.host}:8181\n"
            f" kubernetes cluster.local {{\n  kubeconfig {self._user_file(DNS)}\n }}\n}}\n",
        )
        self._run("coredns", "-conf", config)

    def _user_file(self, user: str) -> Path:
        """The kubeconfig of a part of the cluster."""
        path = self.certificates.path(f"{user.replace(':', '-')}.kubeconfig")
        return write_kubeconfig(path, self.server, self.certificates, {"token": self._token(user)})

    def _write(self, name: str, document: dict[str, object]) -> Path:
        text = json.dumps(document) if name.endswith(".conflist") else yaml.safe_dump(document)
        return self._write_text(name, text)

    def _write_text(self, name: str, text: str) -> Path:
        path = self.state_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


def why_not() -> str:
    """Why no node can run on this machine; empty when it can."""
    if sys.platform != "linux":
        return "a node needs Linux"
    if os.geteuid():
        return "a node needs root"
    return ""


def check_machine(state_dir: Path) -> None:
    if reason := why_not():
        raise ClusterProblem(reason)
    for folder in HIDDEN:
        if state_dir.is_relative_to(folder):
            raise ClusterProblem(f"{state_dir}: the node has a {folder} of its own; name another --state-dir")
    require(NODE_PACKAGES)


def missing_folders() -> list[str]:
    """Those that this machine has not, or has only since another node cluster runs."""
    others = has_links()
    return [name for name in HIDDEN if not Path(name).exists() or (others and not any(Path(name).iterdir()))]


def has_links() -> bool:
    """True while a node cluster runs on this machine."""
    return any(name.startswith(LINK) for name in psutil.net_if_addrs())


def link_name(number: int) -> str:
    return f"{LINK}{number}"


def cgroup_name(state_dir: Path) -> str:
    return f"moeserving-test-{hashlib.sha256(str(state_dir).encode()).hexdigest()[:12]}"


def cgroup_folders(state_dir: Path) -> list[Path]:
    """The pods' cgroup, in each hierarchy of version 1 or in the one of version 2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / cgroup_name(state_dir)]
    return [folder.resolve() / cgroup_name(state_dir) for folder in CGROUPS.iterdir() if folder.is_dir()]


def remove_traces(state_dir: Path, made: list[str], number: int | None) -> None:
    """What outlives the node's first process: its cgroup, for a moment the link, the folders `made` for its mounts."""
    deadline_s = time.monotonic() + PATIENCE_S
    for folder in cgroup_folders(state_dir):
        while folder.exists() and not remove_cgroup(folder) and time.monotonic() < deadline_s:
            time.sleep(0.05)
    while number is not None and link_name(number) in psutil.net_if_addrs() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    # Without its folder another node would lose the mount on it: the last one takes them away.
    for name in [] if has_links() else made:
        if Path(name).exists():
            Path(name).rmdir()


def remove_cgroup(folder: Path) -> bool:
    """False while something in it has not quite ended."""
    try:
        for path, _, _ in os.walk(folder, topdown=False):
            os.rmdir(path)
    except OSError:
        return False
    return True


def run(*command: str | Path) -> str:
    """Output of a command that must succeed."""
    words = [str(word) for word in command]
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{ADMIN_PATH}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterProblem(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
