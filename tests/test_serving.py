"""`transformers serve DIR` is the server: what the official OpenAI client gets from it."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

openai = pytest.importorskip("openai", reason="pip install -r requirements-extras.txt")
pytest.importorskip("uvicorn", reason="pip install -r requirements-extras.txt")
pytestmark = pytest.mark.slow

QUESTION, ANSWER = "Who are you?", "I am LadderLM, a small model."
OTHER, OTHER_ANSWER = "你是谁？", "我是天梯，一个小模型。"


def turns(question, answer=None):
    said = [{"role": "user", "content": question}]
    return said + ([{"role": "assistant", "content": answer}] if answer else [])


@pytest.fixture(scope="module")
def chat_dir(tokenizer, tiny_config, tmp_path_factory):
    """A model that knows two answers by heart, and where they end."""
    from transformers import GPT2LMHeadModel

    from sft.model import set_stop_tokens

    torch.manual_seed(0)
    model = GPT2LMHeadModel(tiny_config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [turns(QUESTION, ANSWER), turns(OTHER, OTHER_ANSWER)]
    batch = tokenizer.apply_chat_template(
        rows, padding=True, return_tensors="pt", return_dict=True,
        tokenizer_kwargs={"padding_side": "right"},
    )  # fmt: skip
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(80):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    tokenizer = type(tokenizer).from_pretrained(save(tokenizer, tmp_path_factory.mktemp("t")))
    tokenizer.eos_token = "<|im_end|>"
    set_stop_tokens(model, tokenizer)
    directory = tmp_path_factory.mktemp("chat")
    model.save_pretrained(directory)
    return save(tokenizer, directory)


def save(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def client(chat_dir):
    """The official client of a server that runs as the handbook says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(chat_dir)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(server, address)
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(30)


def wait_for(server, address):
    """Return when the server answers; it has two minutes."""
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            if urllib.request.urlopen(f"{address}/health", timeout=5).status == 200:
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(address)


def ask(client, chat_dir, question, **options):
    return client.chat.completions.create(
        model=str(chat_dir), messages=turns(question), temperature=0, max_tokens=40, **options
    )


def test_an_answer_ends_at_its_end_token(client, chat_dir, tokenizer):
    completion = ask(client, chat_dir, QUESTION)
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    prompt = tokenizer.apply_chat_template(turns(QUESTION), add_generation_prompt=True)
    assert completion.usage.prompt_tokens == len(prompt["input_ids"])


def test_an_answer_streams(client, chat_dir):
    chunks = list(ask(client, chat_dir, OTHER, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    parts = [part for part in parts if part]
    assert "".join(parts) == OTHER_ANSWER and len(parts) > 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_an_answer_that_is_cut_says_so(client, chat_dir):
    completion = client.chat.completions.create(
        model=str(chat_dir), messages=turns(QUESTION), temperature=0, max_tokens=3
    )
    assert completion.choices[0].finish_reason == "length"
    assert ANSWER.startswith(completion.choices[0].message.content)


def test_eight_at_once_get_their_own_answers(client, chat_dir):
    questions = [QUESTION, OTHER] * 4
    with ThreadPoolExecutor(8) as pool:
        completions = list(pool.map(lambda question: ask(client, chat_dir, question), questions))
    said = [completion.choices[0].message.content for completion in completions]
    assert said == [ANSWER, OTHER_ANSWER] * 4


@pytest.mark.parametrize(
    "change", [{"model": "another/model"}, {"extra_body": {"colour": "green"}}]
)
def test_a_wrong_request_is_the_clients_fault(client, chat_dir, change):
    request = {"model": str(chat_dir), "messages": turns(QUESTION)} | change
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**request)
    assert refused.value.status_code in (400, 422)
