"""The engines that are compared: how each is started, asked and stopped. All serve greedily, one token
after another, with the end of text ignored. ask() sends all prompts at once and returns, for each
request, when its first and last token came and how many there were; times start with the sending.
"""
import http.client
import json
import os
import pathlib
import selectors
import shutil
import signal
import socket
import subprocess
import time

HERE = pathlib.Path(__file__).resolve().parent
SILENCE_S = 1200  # of all streams: the engine hangs


class Missing(Exception):
    """The engine is not installed; says what is missing."""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class HttpEngine:
    """Streams of server-sent events."""

    def launch(self, command, ready, environment=None):
        self.log = open(os.devnull, "w")
        begin = time.monotonic()
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log,
                                        env={**os.environ, **(environment or {})})
        while True:
            if self.process.poll() is not None:
                raise Missing(f"{command[0]} ended with {self.process.returncode} while starting")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", ready)
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            if time.monotonic() > begin + 600:
                raise Missing(f"{command[0]} was not ready within 600 s")
            time.sleep(0.02)
        self.start_s = time.monotonic() - begin

    def http(self, prompt, adapter, output):
        path, body = self.request(prompt, adapter, output)
        body = json.dumps(body).encode()
        return (f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: "
                f"application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode() + body

    def read(self, parts):
        """What a stream's parts, each with its time, say."""
        first = last = None
        tokens, rest = 0, b""
        for time_s, part in parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {"):
                    last, first = time_s, first or time_s
                    tokens = self.total(json.loads(line[6:]), tokens)
        if not tokens:
            raise RuntimeError(b"".join(part for _, part in parts)[:300])
        return {"first_s": first, "last_s": last, "tokens": tokens}

    def ask(self, prompts, adapters, output):
        """One thread, and nothing is looked into before all is over: the client shares the
        processor with what it measures."""
        requests = [self.http(p, a, output) for p, a in zip(prompts, adapters)]
        sockets = [socket.create_connection(("127.0.0.1", self.port)) for _ in requests]
        parts = {sock: [] for sock in sockets}
        begin = time.monotonic()
        with selectors.DefaultSelector() as selector:
            for sock, request in zip(sockets, requests):
                sock.sendall(request)
                selector.register(sock, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(SILENCE_S)
                if not ready:
                    raise RuntimeError(f"nothing came for {SILENCE_S} s")
                for key, _ in ready:
                    part = key.fileobj.recv(1 << 16)
                    parts[key.fileobj].append((time.monotonic() - begin, part))
                    if not part:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
        return [self.read(parts[sock]) for sock in sockets]

    def rss_bytes(self):
        with open(f"/proc/{self.process.pid}/status", encoding="utf-8") as file:
            return 1024 * int(next(x for x in file if x.startswith("VmRSS")).split()[1])

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Lorad(HttpEngine):
    """Without speculation, which no other engine here does."""
    name, options = "lorad", ()

    def __init__(self, options):
        self.port = free_port()
        folder = pathlib.Path(options.folder)
        command = [options.lorad, "serve", "--model", str(folder / "hf"), "--served-model-name",
                   "base", "--port", str(self.port), "--dtype", "bf16", "--pool-bytes", "1GiB",
                   "--speculation", "off", *self.options]
        for i in range(options.adapters):
            command += ["--adapter", f"a{i:02d}={folder}/adapters/a{i:02d}"]
        self.launch(command, "/ready")

    def request(self, prompt, adapter, output):
        return "/v1/completions", {
            "model": "base" if adapter is None else f"a{adapter:02d}", "prompt": prompt,
            "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True}

    def total(self, event, before):
        """How many tokens there are after this event."""
        choices = event.get("choices")
        return before + (len(choices[0].get("token_ids") or []) if choices else 0)


class LoradInt8(Lorad):
    name, options = "lorad int8", ("--quantization", "int8")


class LlamaCpp(HttpEngine):
    """llama.cpp's server. Slots with different adapters are not computed in one batch there."""
    name, model = "llama.cpp", "model.gguf"

    def __init__(self, options):
        program = options.llama_server or shutil.which("llama-server")
        folder = pathlib.Path(options.folder)
        if not program or not (folder / self.model).exists():
            raise Missing(f"no llama-server, or no {self.model}")
        self.port = free_port()
        command = [program, "-m", str(folder / self.model), "--port", str(self.port), "--host",
                   "127.0.0.1", "-c", str(16 * 1024), "-np", "16", "-t", str(os.cpu_count()),
                   "--no-webui", "--lora-init-without-apply", "-fit", "off"]
        for i in range(options.adapters):
            command += ["--lora", str(folder / f"a{i:02d}.gguf")]
        self.adapters = options.adapters
        self.launch(command, "/health")

    def request(self, prompt, adapter, output):
        lora = [{"id": i, "scale": 1.0 if i == adapter else 0.0} for i in range(self.adapters)]
        return "/completion", {"prompt": prompt, "n_predict": output, "temperature": 0, "top_k": 1,
                               "ignore_eos": True, "stream": True, "cache_prompt": False,
                               "lora": lora, "return_tokens": True}

    def total(self, event, before):  # bytes of a character that is not whole come with the next
        return event["tokens_predicted"] if event.get("stop") else before + 1


class LlamaCppQ8(LlamaCpp):
    name, model = "llama.cpp Q8_0", "model-q8_0.gguf"


class Vllm(HttpEngine):
    name = "vLLM (CPU)"

    def __init__(self, options):
        program = options.vllm or shutil.which("vllm")
        if not program:
            raise Missing("it is not installed")
        self.port = free_port()
        folder = pathlib.Path(options.folder)
        modules = [json.dumps({"name": f"a{i:02d}", "path": f"{folder}/adapters/a{i:02d}"})
                   for i in range(options.adapters)]
        self.launch([program, "serve", str(folder / "hf"), "--served-model-name", "base", "--port",
                     str(self.port), "--dtype", "bfloat16", "--max-model-len", "1024",
                     "--max-num-seqs", "16", "--enable-lora", "--max-loras", "16",
                     "--max-lora-rank", "16", "--skip-tokenizer-init", "--lora-modules", *modules],
                    "/health", {"VLLM_CPU_KVCACHE_SPACE": "2"})

    def request(self, prompt, adapter, output):
        return "/v1/completions", {
            "model": "base" if adapter is None else f"a{adapter:02d}", "prompt": prompt,
            "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": True,
            "return_token_ids": True, "detokenize": False}

    total = Lorad.total


class Peft:
    """transformers + PEFT: a static batch with an adapter a row (adapter_names); not a server."""
    name = "transformers + PEFT"

    def __init__(self, options):
        begin = time.monotonic()
        self.process = subprocess.Popen(
            [options.python, str(HERE / "hf_worker.py"), str(options.folder), str(options.adapters)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if self.process.stdout.readline().strip() != "ready":
            raise Missing("no torch, transformers and peft for its Python")
        self.start_s = time.monotonic() - begin

    def ask(self, prompts, adapters, output):
        self.process.stdin.write(json.dumps({"prompts": prompts, "adapters": adapters,
                                             "output": output}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def rss_bytes(self):
        return HttpEngine.rss_bytes(self)

    def stop(self):
        self.process.stdin.close()
        self.process.wait(60)


ENGINES = (Lorad, LlamaCpp, Peft, Vllm, LoradInt8, LlamaCppQ8)
# Whom each is compared with: who keeps weights in as many bits.
AGAINST = {"llama.cpp": "lorad", "transformers + PEFT": "lorad", "vLLM (CPU)": "lorad",
           "llama.cpp Q8_0": "lorad int8"}
