"""Starts build/lorad on a free port, speaks raw HTTP to it, and stops it."""
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LORAD = os.environ.get("LORAD", str(ROOT / "build" / "lorad"))
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512,
          "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3,
          "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
          "rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "float32",
          "bos_token_id": 0, "eos_token_id": 1}


class Server:
    def __init__(self, *options, model=None):
        self.folder = tempfile.TemporaryDirectory()
        if model is None:
            model = pathlib.Path(self.folder.name) / "dummy"
            model.mkdir()
            (model / "config.json").write_text(json.dumps(CONFIG))
            options = ("--load-format", "dummy", *options)
        self.log = open(pathlib.Path(self.folder.name) / "log", "w+")
        self.process = subprocess.Popen(
            [LORAD, "serve", "--model", str(model), "--port", "0", "--pool-bytes", "64MiB",
             *options], stdout=subprocess.PIPE, stderr=self.log, text=True)
        for line in self.process.stdout:
            if line.startswith("listening on "):
                self.port = int(line.rsplit(":", 1)[1])
                return
        self.log.seek(0)
        raise RuntimeError("lorad did not start: " + self.log.read()[-2000:])

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def request(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = json.dumps(body) if isinstance(body, (dict, list)) else body
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        connection.close()
        try:
            return answer.status, json.loads(text)
        except ValueError:
            return answer.status, text

    def complete(self, **fields):
        return self.request("POST", "/v1/completions", fields)

    def tokens(self, **fields):
        """Greedy token ids of one request."""
        fields = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True,
                  **fields}
        status, answer = self.complete(**fields)
        assert status == 200, answer
        return answer["choices"][0]["token_ids"]

    def metric(self, name):
        for line in self.request("GET", "/metrics")[1].splitlines():
            if line.startswith(name + " ") or line.startswith(name + "{"):
                return float(line.rsplit(" ", 1)[1])
        raise KeyError(name)

    def wait_metric(self, name, wanted, seconds=20):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if wanted(self.metric(name)):
                return
            time.sleep(0.02)
        raise AssertionError(f"{name} is {self.metric(name)}")

    def raw(self, data, seconds=10, pieces=None):
        """Sends bytes as they are; returns all that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for piece in pieces or [data]:
                sock.sendall(piece)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while block := sock.recv(65536):
                answer += block
            return answer

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self.process.stdout.close()
        self.log.close()
        self.folder.cleanup()
        return code
