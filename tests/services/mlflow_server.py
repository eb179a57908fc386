"""MLflow's own server on loopback, to be killed and started again, and a proxy before it that misbehaves."""

import http.client
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

START_SECONDS = 90.0


class MlflowServer:
    """A server whose database and artifacts outlive it, always at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self.port: int = unused.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder / 'mlflow.db'}", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | quiet,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            assert time.monotonic() < deadline and self._process.poll() is None, (
                "MLflow's server did not start"
            )
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill the server and all that it started, at once."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
            self._process = None

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Let no file of the server grow beyond what the database has now: what it writes fails as on a full disk."""
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        processes = [parent, *parent.children(recursive=True)]
        full = (self.folder / "mlflow.db").stat().st_size
        limits = {each.pid: resource.prlimit(each.pid, resource.RLIMIT_FSIZE) for each in processes}
        for pid, (_, hard) in limits.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (min(full, 4096), hard))
        try:
            yield
        finally:
            for pid, old in limits.items():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, old)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Yield a running server with its files in `folder`."""
    server = MlflowServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Misbehaving:
    """Passes requests on to a server, or does with them what `mode` says."""

    def __init__(self, target_port: int) -> None:
        self.mode = "pass"
        """pass; 500: answer so and pass nothing on; hang: never answer; deaf: pass on and cut the answer off."""
        self.requests = 0
        self._end = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def do_GET(self) -> None:
                outer.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if outer.mode == "500":
                    self.send_error(500)
                    return
                if outer.mode == "hang":
                    outer._end.wait(60)
                    return
                passed = http.client.HTTPConnection("127.0.0.1", target_port, timeout=30)
                headers = {
                    name: value for name, value in self.headers.items() if name.lower() != "connection"
                }
                passed.request(self.command, self.path, body, headers)
                answer = passed.getresponse()
                content = answer.read()
                if outer.mode == "deaf":
                    return
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

            def log_message(self, *words: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it, hanging requests too."""
        self._end.set()
        self._server.shutdown()
        self._server.server_close()
