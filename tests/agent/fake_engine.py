"""A stand-in for vLLM's API server at the supervisor's seam: answers `/health` and `/v1/models`, misbehaves on demand.

`python fake_engine.py PORT JSON`, where JSON may hold `start_delay_s`, `error` (printed, then exit 1), `crash_file`
(exits when the file is there), `sick_file` (unhealthy while it is there), `asleep_file` (the same, asleep), `drain_s`
(time between SIGTERM and the end), `drain_file` (ends after SIGTERM once the file is there), `deaf` (ignores SIGTERM),
`host` (an address to listen on), `environment_file` (its environment is written there), `asked_file` (made when its
core is asked, which never answers; after SIGTERM it waits until nobody asks), `worker_file` (starts a child of its own
and writes its process id there), `requests_file` (a line for each request for tokens), `healed_file` (such a request
ends it while the file is not there, and gets the status in it otherwise; 0: no answer), `locked_file` (its models
are refused while it is there, as with a key) and `cores` (the number of stand-ins for engine cores,
`stand_in_core.py`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

WAYS: dict[str, Any] = json.loads(sys.argv[2])
OPEN: set[object] = set()
"""Requests without an answer, whose ends vLLM's server waits for after SIGTERM."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/core" and "asked_file" in WAYS:
            Path(WAYS["asked_file"]).touch()
            OPEN.add(self)
            # Its core is about to end: no answer comes.
            with suppress(OSError):
                self.connection.recv(1)
            OPEN.discard(self)
            return
        sick = "sick_file" in WAYS and Path(WAYS["sick_file"]).exists()
        asleep = "asleep_file" in WAYS and Path(WAYS["asleep_file"]).exists()
        body = json.dumps({"data": [{"id": "fake", "max_model_len": 4096}], "is_sleeping": asleep}).encode()
        locked = "locked_file" in WAYS and self.path == "/v1/models" and Path(WAYS["locked_file"]).exists()
        self.send_response(401 if locked else 503 if sick else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        with Path(WAYS["requests_file"]).open("a") as requests:
            requests.write(self.path + "\n")
        if not Path(WAYS["healed_file"]).exists():
            os._exit(3)
        self.rfile.read(int(self.headers["Content-Length"]))
        status = int(Path(WAYS["healed_file"]).read_text() or 200)
        if not status:
            # Until the client gives up.
            with suppress(OSError):
                self.connection.recv(1)
            return
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def on_term(*_: Any) -> None:
    print("drains", flush=True)
    if "drain_file" in WAYS:
        threading.Thread(target=end_at, args=[Path(WAYS["drain_file"])]).start()
    elif "asked_file" in WAYS:
        threading.Thread(target=end_when_closed).start()
    elif not WAYS.get("deaf"):
        threading.Timer(WAYS.get("drain_s", 0.0), os._exit, args=[0]).start()


def end_when_closed() -> None:
    while OPEN:
        time.sleep(0.01)
    os._exit(0)


def end_at(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)
    os._exit(0)


def watch_for_crash() -> None:
    while not Path(WAYS["crash_file"]).exists():
        time.sleep(0.01)
    print("(EngineCore pid=1) ValueError: no memory left for the KV cache", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above.", flush=True)
    os._exit(3)


signal.signal(signal.SIGTERM, on_term)
if "worker_file" in WAYS:
    worker = subprocess.Popen(["sleep", "600"])
    Path(WAYS["worker_file"]).write_text(str(worker.pid))
for core in range(WAYS.get("cores", 0)):
    program = Path(__file__).with_name("stand_in_core.py")
    subprocess.Popen([sys.executable, str(program), str(core), str(WAYS["cores"])])
if "error" in WAYS:
    print(WAYS["error"], flush=True)
    sys.exit(1)
if "crash_file" in WAYS:
    threading.Thread(target=watch_for_crash, daemon=True).start()
time.sleep(WAYS.get("start_delay_s", 0.0))
if "environment_file" in WAYS:
    Path(WAYS["environment_file"]).write_text(json.dumps(dict(os.environ)))
host = WAYS.get("host", "127.0.0.1")
# As vLLM does: the family of the address.
ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
ThreadingHTTPServer((host, int(sys.argv[1])), Handler).serve_forever()
