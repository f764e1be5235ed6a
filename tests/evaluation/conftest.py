"""A chat model with random weights and small local tasks; tests of the harness need the extra `eval`."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def endpoint():
    """A local endpoint that gives 5 points to answers with `Roma`, and 2 to others; counts its requests."""

    class Stub(BaseHTTPRequestHandler):
        requests = 0

        def do_POST(self):  # the name that http.server calls
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            Stub.requests += 1
            content = body["messages"][0]["content"]
            known = self.path == "/v1/chat/completions" and body["model"] == "stub"
            points = "5" if "Roma" in content else "2"
            reply = {"choices": [{"message": {"role": "assistant", "content": f"score: {points}"}}]}
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", Stub
    server.shutdown()
    server.server_close()
