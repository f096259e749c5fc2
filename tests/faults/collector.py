"""What the services tell of themselves beside their logs, kept as it comes: traces that they export, metrics."""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

# A service that is stopped or starved is asked again at the next round.
_SCRAPE_SECONDS = 2.0


class TraceCollector:
    """An OTLP endpoint that keeps the bytes of every export in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.touch()
        writing = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                with writing, file.open("ab") as kept:
                    kept.write(body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                """Nothing: every export would be a line."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, name="traces", daemon=True).start()

    def stop(self) -> None:
        """Take no more."""
        self._server.shutdown()
        self._server.server_close()


def scrape(port: int, file: Path) -> bool:
    """Add what a service's `/metrics` says to the file; whether it answered."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=_SCRAPE_SECONDS) as answer:
            said = answer.read()
    except OSError:
        return False
    with file.open("ab") as kept:
        kept.write(said)
    return True
