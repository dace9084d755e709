"""The server, asked over HTTP with the client that people use, about a tiny packed model."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
import uvicorn

from flows.serving import ROUTES, application, bound
from sparseforge_core.models.hub import load_model, load_tokenizer
from sparseforge_core.models.sites import assign_patterns
from sparseforge_core.runtime.generate import say
from sparseforge_core.runtime.speech import Voice
from sparseforge_core.sparsity.patterns import nm, top_mask
from tests.core.runtime.exports import packed_export
from tests.flows.test_cli import run
from tests.tiny import sites_of, tiny_source

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant: "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed tiny LLaMA with its tokenizer and a chat template."""
    home = tmp_path_factory.mktemp("served")
    source = tiny_source("llama", width=32, positions=256)
    model, tokenizer = load_model(source, home), load_tokenizer(source, home)
    with torch.no_grad():
        for site in assign_patterns(sites_of(model), nm(2, 4)):
            matrix = site.matrix(site.weight)
            matrix.copy_(torch.where(top_mask(matrix.abs(), nm(2, 4)), 20.0 * matrix, torch.zeros_like(matrix)))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "saved")
    return packed_export(model, home)


@pytest.fixture(scope="module")
def voice(folder: Path) -> Voice:
    return Voice.load(folder, cache="static")


@pytest.fixture(scope="module")
def address(voice: Voice) -> Iterator[str]:
    """Of a running server."""
    listener = bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(application(voice, "tiny"), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_a_completion_is_what_generate_says(client: openai.OpenAI, voice: Voice) -> None:
    said = say(voice.speaker, voice.tokenizer, "the cat", tokens=12)
    answer = client.completions.create(model="tiny", prompt="the cat", max_tokens=12, temperature=0)
    assert answer.choices[0].text == said.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    stream = client.completions.create(model="tiny", prompt="the cat", max_tokens=12, temperature=0, stream=True)
    pieces = [event.choices[0].text for event in stream]
    assert "".join(pieces) == said.text
    assert len(pieces) > 2, "it comes in pieces"


def test_a_seed_repeats_what_was_drawn(client: openai.OpenAI) -> None:
    how = {"model": "tiny", "prompt": "the cat", "max_tokens": 16, "temperature": 1.5}
    texts = [client.completions.create(**how, seed=seed).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    cut = client.completions.create(**how, seed=5, extra_body={"top_p": 0.01})
    assert cut.choices[0].text != texts[0], "what our loop does not do, transformers' own does"


def test_chat(client: openai.OpenAI, voice: Voice) -> None:
    messages = [{"role": "user", "content": "hello"}]
    prompt = voice.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    said = say(voice.speaker, voice.tokenizer, prompt, tokens=8)
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == said.text
    stream = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in stream) == said.text


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"model": "other", "prompt": "x"}, "pinned to 'tiny'"),
        ({"model": "tiny", "prompt": ["a", "b"]}, "prompt must be a string"),
        ({"model": "tiny", "prompt": ""}, "holds no token"),
        ({"model": "tiny", "prompt": "the cat " * 200}, "leave no room in the model's 256"),
    ],
)
def test_bad_requests_get_a_sentence(client: openai.OpenAI, asked: dict[str, object], sentence: str) -> None:
    with pytest.raises(openai.BadRequestError, match=sentence):
        client.completions.create(**asked)  # type: ignore[call-overload]


def test_nothing_but_its_own_routes_answers(address: str) -> None:
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer) == {"status": "ok"}
    for path in ("/docs", "/openapi.json", "/load_model", "/reset", "/v1/responses"):
        assert path not in ROUTES
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(urllib.request.Request(address + path, data=b"{}", method="POST"))


def test_what_cannot_be_served_is_refused_before_it_is_loaded(
    home: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("serve", folder, "--port", str(port)) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert run("serve", home, "--port", "0") == 2
    assert "no complete export" in capsys.readouterr().err
    assert run("serve", folder, "--port", "0", "--device", "cuda:9") == 2
    assert "torch sees" in capsys.readouterr().err
    assert run("serve", folder, "--port", "0", "--cache", "fast") == 2
    assert "unknown cache 'fast'" in capsys.readouterr().err
