"""A server of our own that answers, fails and lies as it is told."""

import contextlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fake:
    """An OpenAI-compatible server: `answer(body, tried)` gives (status, JSON or bytes, headers...)."""

    def __init__(self):
        self.models = {"data": [{"id": "tiny"}, {"id": "other"}]}
        self.answer = lambda body, tried: (200, echo(body))
        self.bodies, self.keys, self.tries = [], [], Counter()
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def reply(self, status, body, headers=()):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in (*headers, ("Content-Length", str(len(data)))):
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has gone
                    self.wfile.write(data)

            def do_GET(self):
                fake.keys.append(self.headers.get("Authorization"))
                assert self.path == "/v1/models"
                self.reply(*((200, fake.models) if isinstance(fake.models, dict) else fake.models))

            def do_POST(self):
                chat = self.path == "/v1/chat/completions"
                assert chat or self.path == "/v1/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    name = json.dumps(body["messages" if chat else "prompt"])
                    fake.tries[name] += 1
                    tried = fake.tries[name]
                    fake.busy += 1
                    fake.most_busy = max(fake.busy, fake.most_busy)
                answer = fake.answer(body, tried)
                with fake.lock:
                    fake.busy -= 1
                self.reply(*answer)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def echo(body, **more):
    """Its prompt back, with ids and log-probabilities, as vLLM writes them."""
    ids = body["prompt"]
    logprobs = {
        "tokens": [f"token_id:{t}" for t in ids],
        "token_logprobs": [-float(t) for t in ids],
        "top_logprobs": [{"token_id:7": -9.0, f"token_id:{t}": -float(t)} for t in ids],
    }
    choice = {"index": 0, "text": "echo", "finish_reason": "length", "token_ids": ids, "logprobs": logprobs}
    return {"choices": [choice | more]}
