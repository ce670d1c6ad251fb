import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


@dataclass
class Server:
    """A file on a local web server that can misbehave."""

    content: bytes
    url: str = ""
    resumes: bool = True
    cut_after: int | None = None
    """Bytes after which every answer breaks off."""
    status: int = 0
    ranges: list[str | None] = field(default_factory=list)
    """The Range header of each request."""


@pytest.fixture
def server() -> Iterator[Server]:
    file = Server(bytes(range(256)) * 2000)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            file.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and file.resumes else 0
            self.send_response(file.status or (206 if start else 200))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(file.content) - 1}/{len(file.content)}")
            self.send_header("Content-Length", str(len(file.content) - start))
            self.end_headers()
            self.wfile.write(file.content[start:][: file.cut_after])

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        file.url = f"http://127.0.0.1:{running.server_port}/file.bin"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield file
        running.shutdown()
        thread.join()
