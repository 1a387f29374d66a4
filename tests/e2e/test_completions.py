"""The completions contract, through the official client and by hand."""
import concurrent.futures
import json
import threading

import openai

MODELS = ["dummy", "a", "b", "c"]


def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)


def test_models(dummy):
    models = {m.id: m for m in client(dummy).models.list()}
    assert list(models) == ["dummy", "a", "b", "c"]
    assert models["dummy"].parent is None and models["a"].parent == "dummy"
    assert client(dummy).models.retrieve("b").id == "b"


def test_openai_client_whole_and_streamed_agree(dummy):
    fields = dict(model="a", prompt=[5, 6, 7], max_tokens=9, temperature=0, n=2,
                  extra_body={"ignore_eos": True, "return_token_ids": True})
    whole = client(dummy).completions.create(**fields)
    assert [c.index for c in whole.choices] == [0, 1]
    assert whole.usage.prompt_tokens == 3 and whole.usage.completion_tokens == 18
    assert all(c.finish_reason == "length" for c in whole.choices)
    streamed = {0: [], 1: []}
    reasons, usage = {}, None
    for chunk in client(dummy).completions.create(**fields, stream=True,
                                                  stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.model_extra["token_ids"]
            reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
    assert streamed == {c.index: c.model_extra["token_ids"] for c in whole.choices}
    assert reasons == {0: "length", 1: "length"} and usage.completion_tokens == 18


def test_adapter_changes_the_answer_and_adapter_id_is_a_synonym(dummy):
    answers = {m: dummy.tokens(model=m, prompt=[1, 2, 3]) for m in MODELS}
    assert len({tuple(a) for a in answers.values()}) == 4
    assert dummy.tokens(adapter_id="a", prompt=[1, 2, 3]) == answers["a"]
    assert dummy.tokens(model="dummy", adapter_id="b", prompt=[1, 2, 3]) == answers["b"]
    assert dummy.tokens(model="dummy", lora=[{"id": "a"}], prompt=[1, 2, 3]) == answers["a"]
    assert dummy.tokens(model="dummy", lora=[{"id": "a", "weight": 0}],
                        prompt=[1, 2, 3]) == answers["dummy"]


def test_same_alone_and_in_a_mixed_batch(dummy):
    jobs = [dict(model=m, prompt=[(7 * i + j) % 512 for j in range(1 + 13 * i)], max_tokens=400)  # long enough to meet
            for i in range(6) for m in MODELS]
    alone = [dummy.tokens(**job) for job in jobs]
    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        together = list(pool.map(lambda job: dummy.tokens(**job), jobs))
    assert together == alone
    assert dummy.metric("lorad_step_adapters_max") >= 3


def test_prompt_forms_and_echo(dummy):
    status, answer = dummy.complete(model="a", prompt=[[1, 2], [3, 4, 5]], max_tokens=2, n=2,
                                    ignore_eos=True)
    assert status == 200 and [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 8, "total_tokens": 13,
                              "prompt_tokens_details": {"cached_tokens": 0}}
    status, answer = dummy.complete(model="a", prompt=[1, 2, 3], max_tokens=0, echo=True,
                                    logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    assert status == 200 and logprobs["tokens"] == ["1", "2", "3"]
    assert logprobs["token_logprobs"][0] is None and logprobs["token_logprobs"][1] < 0
    assert len(logprobs["top_logprobs"][1]) == 2


def test_echo_logprobs_equal_generated_ones(dummy):
    """Scoring a greedy continuation as a prompt gives the log-probabilities it was made with."""
    fields = dict(model="b", max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
    made = dummy.complete(prompt=[9, 8, 7], return_token_ids=True, **fields)[1]["choices"][0]
    scored = dummy.complete(prompt=[9, 8, 7] + made["token_ids"], echo=True,
                            **{**fields, "max_tokens": 1})[1]["choices"][0]
    for one, other in zip(made["logprobs"]["token_logprobs"],
                          scored["logprobs"]["token_logprobs"][3:9]):
        assert abs(one - other) < 1e-4


def test_seed_stop_ids_and_bias(dummy):
    base = dict(model="dummy", prompt=[4, 4], max_tokens=12, ignore_eos=True)
    one = dummy.tokens(**base, temperature=1, seed=5)
    assert dummy.tokens(**base, temperature=1, seed=5) == one
    assert dummy.tokens(**base, temperature=1, seed=6) != one
    greedy = dummy.tokens(**base)
    status, answer = dummy.complete(**base, temperature=0, stop_token_ids=[greedy[3]],
                                    return_token_ids=True)
    stopped = answer["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"][:greedy.index(greedy[3])] == greedy[:greedy.index(greedy[3])]
    assert dummy.tokens(**base, logit_bias={"77": 100}) == [77] * 12


def test_client_gone_frees_pages(dummy):
    dummy.wait_metric("vllm:num_requests_running", lambda v: v == 0)
    body = json.dumps({"model": "a", "prompt": [1] * 100, "max_tokens": 1800, "stream": True,
                       "ignore_eos": True}).encode()
    import socket
    sock = socket.create_connection(("127.0.0.1", dummy.port))
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                 % len(body) + body)
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    dummy.wait_metric("vllm:num_requests_running", lambda v: v == 1)
    sock.close()
    dummy.wait_metric("vllm:num_requests_running", lambda v: v == 0)
    assert dummy.metric('lorad_pages{owner="kv"}') == 0


def test_threads_of_one_client(dummy):
    errors = []

    def ask(i):
        try:
            dummy.tokens(model=MODELS[i % 4], prompt=[i], max_tokens=4)
        except AssertionError as error:
            errors.append(error)
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(64)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors
