"""A stand-in for an OpenAI-compatible server: gives prepared answers in turn, keeps what it was asked."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatStandIn(ThreadingHTTPServer):
    """A context manager. `answers` are (status, content), the last one for good; `asked` is what came in.

    A content that is a function is called with the handler and writes the answer itself.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.answers, self.released = [], [], threading.Event()
        self.thread = threading.Thread(target=self.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append((self.path, self.headers.get("Authorization"), body))
        status, content = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        if status == "slow":
            server.released.wait(10)
            status = 200
        if callable(content):
            with contextlib.suppress(OSError):
                content(self)
            return
        answer = content if isinstance(content, bytes) else chat(content)
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
        except OSError:
            pass  # whoever asked has gone

    def log_message(self, *_):
        pass


def chat(content: str) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
