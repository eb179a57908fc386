"""A TCP proxy on loopback that can be slow, refuse connections, and cut them in the middle of an answer."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CHUNK_BYTES = 1024


class Proxy:
    """Passes connections on to 127.0.0.1:`port`; the attributes say what goes wrong from now on."""

    def __init__(self, port: int) -> None:
        self._target, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.pause_seconds = 0.0
        """Before each KiB of an answer."""
        self.refuse = 0
        """So many connections are closed as soon as they are made."""
        self.cuts = 0
        """So many answers are cut."""
        self.cut_after_bytes = 0
        """Where an answer is cut, its headers counted."""
        self.done: list[str] = []
        """What went wrong so far: "refused", "cut"."""

    def serve(self) -> None:
        """Accept until the listener is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuse > 0:
                self.refuse -= 1
                self.done.append("refused")
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            for one, two, answers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(one, two, answers), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        try:
            while content := source.recv(CHUNK_BYTES):
                if answers:
                    time.sleep(self.pause_seconds)
                    passed += len(content)
                    if self.cuts > 0 and passed > self.cut_after_bytes:
                        self.cuts -= 1
                        self.done.append("cut")
                        return
                target.sendall(content)
        except OSError:
            return
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                end.close()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    """Yield a proxy in front of the port."""
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
