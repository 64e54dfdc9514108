"""Stands in for an agent or a gateway: speaks their contract over real HTTP, computes nothing.

`python fake_peer.py agent|gateway --config FILE`. A file `FILE.refuse` makes the control route refuse, `FILE.crash`
ends the process at its start, `FILE.starting` keeps an engine from becoming ready, `FILE.idle` keeps its experts from
moving, as without requests, `FILE.no-page` has the status that the live page answers. `FILE.pod` has the pod that it
says it is. `GET /stream` at the gateway's client port streams numbers for a second. With `expert_parallel` an agent has
the experts of `experts_documents.py`; a directive is carried out at once. A drained agent ends one request at each
look. `FILE.split` makes the gateway split requests, `GET /ui/events` there has two snapshots.
"""

import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).parent))
from experts_documents import DECISION, decided, in_brief

ROLES = ("prefill", "decode")
ROLE, PATH = sys.argv[1], Path(sys.argv[3])
CONFIG = json.loads(PATH.read_text())
TOKEN = Path(CONFIG["token_file"]).read_text().strip()
CHUNKS = 20
# The engine's own candidate: each hot expert on a rank of its own.
CANDIDATE = [[0, 2, 3, 1, 2, 3], [0, 2, 3, 1, 2, 3]]
EXPERTS = decided("dryRun", moves=4, physical_to_logical=CANDIDATE)
BEFORE = EXPERTS["placement"]["physical_to_logical"]
# Requests that are left of a drained engine; empty while it serves.
LEFT: list[int] = []


def switch(name: str) -> bool:
    return PATH.with_name(f"{PATH.name}.{name}").exists()


def pod() -> dict:
    path = PATH.with_name(f"{PATH.name}.pod")
    return json.loads(path.read_text()) if path.exists() else {}


def agent_state() -> dict:
    ready = not switch("starting") and not LEFT
    engine = {"url": "", "model": CONFIG["engine"]["served_name"], "pid": 1, "restarts": 0, "last_exit": ""}
    left = LEFT.pop(0) if len(LEFT) > 1 else 0
    rank = {"rank": 0, "running": left if LEFT else 2, "waiting": 0 if LEFT else 1, "kv_usage": 0.25}
    phase = "ready" if ready else "starting"
    return {
        "name": CONFIG["name"],
        "phase": ("draining" if left else "stopped") if LEFT else phase,
        "start": {"phase": "loading weights", "progress": "3 of 8 files", "age_s": 1.0}
        if phase == "starting"
        else None,
        "accepting": ready,
        "engine": engine,
        "config": {"version": 1, "request": CONFIG["request"], "expert": CONFIG["expert"]},
        "ranks": [rank] if ready or left else [],
        "pod": pod(),
    }


def gateway_state() -> dict:
    split = switch("split")
    return {
        "accepting": True,
        "held": 0,
        "config": {"dispatch": CONFIG["dispatch"], "request": CONFIG["request"]},
        "engines": [
            {"name": row["name"], "in_flight": 1, "accepting": True, "role": ROLES[index % 2] if split else ""}
            for index, row in enumerate(CONFIG["engines"])
        ],
        "totals": {"requests": 7, "failed": 0, "retried": 0},
        "splits": {"transfers": 5, "fall_backs": {"decode_error": 1}, "role_changes": {}} if split else None,
    }


def snapshots() -> bytes:
    """Two snapshots, of which the first has no rates."""
    # Here, for every fake would load it: most are asked for none.
    from moe_contract.live_page import EngineRow, History, LiveSnapshot, TimePoint, write_event

    engines = tuple(
        EngineRow(name=row["name"], status="ready", in_flight=1, running=2, waiting=1, kv_usage=0.25, step_s=0.021)
        for row in CONFIG["engines"]
    )
    points = (TimePoint(at_s=1e9), TimePoint(at_s=1e9 + 1, ttft_s=0.17, requests_per_s=12.5, in_flight=3))
    shown = (LiveSnapshot(at_s=1e9, models=("m",), accepting=True, engines=engines, point=point) for point in points)
    return write_event(History()) + b"".join(map(write_event, shown))


def experts(query: str) -> tuple[int, dict]:
    if ROLE != "agent" or not CONFIG["engine"]["expert_parallel"]:
        return 404, {"errors": [{"path": "", "message": "no expert group"}]}
    document = EXPERTS | {"mode": CONFIG["expert"]["mode"]}
    return 200, in_brief(document) if query == "brief=1" else document


def direct(body: dict) -> tuple[int, dict]:
    """Takes a directive, and carries it out unless the engine is idle."""
    if CONFIG["expert"]["mode"] == "off":
        return 409, {"errors": [{"path": "", "message": "the mode is off"}]}
    placement = EXPERTS["placement"]
    version = placement["directive"] + 1
    if body["action"] == "affinity":
        pair = {"layer": 0, "expert": 1, "next": 3, "tokens": 50, "over_chance": 2.5}
        passes = 0 if switch("idle") else 64
        recorded = {"directive": version, "passes": passes, "wanted_passes": 64, "tokens": 640, "strongest": [pair]}
        EXPERTS["affinity"], placement["directive"] = recorded, version
        return 202, {"version": version}
    wanted = {"apply": body.get("physical_to_logical"), "rollback": BEFORE, "plan": None}[body["action"]]
    if body["action"] == "apply" and len(wanted[0]) != len(BEFORE[0]):
        return 422, {"errors": [{"path": "physical_to_logical[0]", "message": "6 slots are needed"}]}
    if not switch("idle"):
        placement["directive"] = version
        if wanted is not None:
            placement |= {"version": placement["version"] + 1, "physical_to_logical": wanted}
            outcome = "applied" if body["action"] == "apply" else "rolledBack"
            EXPERTS["decisions"].insert(0, {**DECISION, "outcome": outcome, "reason": "by hand", "moves": 4})
    return 202, {"version": version}


class Control(BaseHTTPRequestHandler):
    """A peer's state and its control route, which may follow on the same connection."""

    protocol_version = "HTTP/1.1"
    # An idle connection holds up no end for longer (seconds).
    timeout = 0.5

    def do_GET(self) -> None:
        path, query = urlsplit(self.path)[2:4]
        if path == "/v1/experts":
            return self.answer(*experts(query))
        if path == "/ui/events":
            return self.events()
        if path == "/ui/" and switch("no-page"):
            return self.answer(int(PATH.with_name(f"{PATH.name}.no-page").read_text()), {"errors": []})
        return self.answer(200, agent_state() if ROLE == "agent" else gateway_state(), keep=path == "/v1/state")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"errors": [{"path": "Authorization", "message": "needed"}]})
        if self.path == "/v1/drain":
            LEFT[:] = [2, 1, 0]
            return self.answer(202, {"phase": "draining"})
        if self.path == "/v1/resume":
            LEFT.clear()
            return self.answer(202, {"phase": "stopped"})
        return self.answer(*direct(body))

    def events(self) -> None:
        if switch("no-page"):
            return self.answer(404, {"errors": []})
        from moe_contract.page_keys import derive_page_key

        if self.headers["Authorization"] != f"Bearer {derive_page_key(TOKEN.encode())}":
            return self.answer(401, {"errors": [{"path": "Authorization", "message": "the page key is needed"}]})
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(snapshots())

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer(401, {"errors": [{"path": "Authorization", "message": "needed"}]})
        if switch("refuse"):
            return self.answer(422, {"errors": [{"path": "request", "message": "not today"}]})
        for section, values in body.items():
            CONFIG[section] = {**CONFIG[section], **values}
        return self.answer(200, {})

    def answer(self, status: int, document: dict, *, keep: bool = False) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if not keep:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Clients(Control):
    """A stream for a client."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for number in range(CHUNKS):
            self.wfile.write(b"%d\n" % number)
            time.sleep(0.05)


class Server(ThreadingHTTPServer):
    """Waits for running answers when it is closed."""

    daemon_threads = False


def serve(listen: dict, handler: type[Control]) -> Server:
    server = Server((listen["host"], listen["port"]), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    return server


def main() -> None:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    servers = [serve(CONFIG["admin" if ROLE == "gateway" else "listen"], Control)]
    if ROLE == "gateway":
        servers.insert(0, serve(CONFIG["listen"], Clients))
    print(f"{ROLE} serves", flush=True)
    stop.wait()
    print(f"{ROLE} drains", flush=True)
    for server in servers:
        server.shutdown()
        server.server_close()


if switch("crash"):
    sys.exit("ValueError: no such thing")
main()
