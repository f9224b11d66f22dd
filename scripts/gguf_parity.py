"""Read a GGUF file back and compare it with the model it was made from.

Three readers, none of which shares code with the writer's layout: the `gguf` package (the bytes),
transformers' own GGUF loading, and llama.cpp through llama-cpp-python where that is installed.
"""

import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf_file
import numpy as np
import torch

from sft.model import context_length

# What tokenizers trip over: digits beside everything, runs of spaces, scripts, marks, control
# characters, text that looks like special tokens.
HOSTILE = (
    "", " ", "   ", "\n", "\r\n\r\n", "\t\tx\t", "a  b   c    d", " lead", "trail ", "trail  \n",
    "12 + 30 = 42", "3.14159", "1,234,567", "x1y22z333", "2024年11月24日", "第12章，共345页",
    "   7", "\n  42", "½ + ² = Ⅻ", "１２３ ４", "٣٤٥", "小河流过磨坊。", "你好，world！123",
    "\u3000全角\u3000空格\u3000", "カタカナとひらがな", "한국어 문장 12개",
    "مرحبا بالعالم", "שלום 12",
    "naïve café", "nai\u0308ve cafe\u0301", "\U0001f469\u200d\U0001f467 and \U0001f1e9\U0001f1ea",
    "zero\u200bwidth\u200djoin", "no\u00a0break", "I'm you're WE'LL it's don't 'tis",
    "<|im_end|>", "a<|im_start|>user\nb<|im_end|>\n", "<eos><pad>", "<|im_end", "< |im_end| >",
    "def f(x):\n    return x**2  # ok\n", "http://a.b/c?d=1&e=%20", "\\u0041\\n", "\x01\x7f",
    "\ufffd\ufeff", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟙𝟚", "a" * 300, "9" * 50, "…—“”‘’",
)  # fmt: skip
MESSAGES = ("Who are you?", "你是谁？", "What is 12 + 30?", "3 和 7，哪个更大？", "Thank you!")
TEXTS = ("In the morning", "早上", "12 + 30 =", "The river")
NEW_TOKENS = 32


def check(path: Path, model: Any, tokenizer: Any, type_name: str) -> dict[str, Any]:
    """Everything that was compared, and how it came out.

    Raises:
        RuntimeError: a tensor or the vocabulary does not come back as it was written.
    """
    reader = gguf.GGUFReader(path)
    found = {"tensors": compare_tensors(reader, model, type_name)}
    prompts = make_prompts(tokenizer)
    stops = model.generation_config.eos_token_id
    expected = [generate(model, tokenizer, ids, stops) for ids in prompts]
    rebuilt = gguf_file.read_tokenizer(reader)
    ids = compare_ids(tokenizer, lambda text: rebuilt.encode(text).ids)
    if ids["different"]:
        raise RuntimeError(f"{path}: its vocabulary makes other ids of {ids['different']}")
    found["vocabulary"] = {"token_ids": ids}
    found["transformers"] = read_with_transformers(
        path, model, tokenizer, type_name, prompts, expected
    )
    rooms = [count_new_tokens(model, ids) for ids in prompts]
    found["llama_cpp"] = read_with_llama_cpp(path, tokenizer, prompts, rooms, expected)
    return found


def compare_tensors(reader: gguf.GGUFReader, model: Any, type_name: str) -> dict[str, Any]:
    """Stored bytes against those of the model's weights; what the type's rounding changed."""
    stored = gguf_file.read_tensors(reader)
    worst, count = 0.0, 0
    for tensor in gguf_file.list_tensors(model, type_name):
        kind, data, values = stored.pop(tensor.name)
        wanted = gguf.quants.quantize(tensor.values, tensor.type)
        if kind != tensor.type or not np.array_equal(data.view(np.uint8), wanted.view(np.uint8)):
            raise RuntimeError(f"{tensor.name} did not come back as it was written")
        worst, count = max(worst, float(np.abs(values - tensor.values).max())), count + 1
    if stored:
        raise RuntimeError(f"tensors that the model does not have: {sorted(stored)}")
    return {"equal": count, "of": count, "max_rounding": worst}


def make_prompts(tokenizer: Any) -> list[list[int]]:
    """Token ids of a few prompts: turns for a chat model, beginnings of texts for a base model."""
    if tokenizer.chat_template is None:
        return [tokenizer(text)["input_ids"] for text in TEXTS]
    return [
        tokenizer.apply_chat_template(as_messages(text), add_generation_prompt=True)["input_ids"]
        for text in MESSAGES
    ]


def as_messages(text: str) -> list[dict[str, str]]:
    """A conversation of one turn."""
    return [{"role": "user", "content": text}]


def count_new_tokens(model: Any, ids: Sequence[int]) -> int:
    """How many tokens are compared: those that the context has positions for."""
    return min(NEW_TOKENS, context_length(model) - len(ids))


@torch.no_grad()
def generate(model: Any, tokenizer: Any, ids: Sequence[int], stops: int | list[int]) -> str:
    """The greedy continuation as text, up to a stop id."""
    new_tokens = count_new_tokens(model, ids)
    ids = torch.tensor([ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=stops,  # transformers reads one stop id of the file, not all
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def compare_ids(tokenizer: Any, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    """Token ids of the hostile strings, without what the tokenizer would put around them."""
    different = [
        text for text in HOSTILE
        if tokenizer(text, add_special_tokens=False)["input_ids"] != list(encode(text))
    ]  # fmt: skip
    return {"equal": len(HOSTILE) - len(different), "of": len(HOSTILE), "different": different}


def compare_texts(expected: list[str], texts: list[str]) -> dict[str, Any]:
    """How many greedy answers are the same text."""
    pairs = list(zip(expected, texts, strict=True))
    different = [{"expected": a, "found": b} for a, b in pairs if a != b]
    return {"equal": len(pairs) - len(different), "of": len(pairs), "different": different}


def read_with_transformers(
    path: Path, model: Any, tokenizer: Any, type_name: str, prompts: list, expected: list[str]
) -> dict[str, Any]:
    """Load the file with nothing but transformers, and compare weights, ids and greedy answers.

    The weights go through the writer's layout once more: a tensor that transformers names or turns
    otherwise than the writer does would not match its own bytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**where)
    if config.model_type == "gpt2":
        config.n_positions = config.n_ctx  # transformers 5.23 reads the context into n_ctx alone
    loaded = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=torch.float32)
    loaded.eval()
    compare_tensors(gguf.GGUFReader(path), loaded, type_name)
    other = AutoTokenizer.from_pretrained(**where)
    ids = compare_ids(tokenizer, lambda t: other(t, add_special_tokens=False)["input_ids"])
    stops = model.generation_config.eos_token_id
    texts = [generate(loaded, tokenizer, prompt, stops) for prompt in prompts]
    probe = torch.tensor([prompts[0]])
    with torch.no_grad():
        difference = (loaded(probe).logits - model(probe).logits).abs().max().item()
    return {
        "version": importlib.metadata.version("transformers"),
        "token_ids": ids,
        "greedy": compare_texts(expected, texts),
        "max_logit_difference": difference,
    }


def read_with_llama_cpp(
    path: Path, tokenizer: Any, prompts: list, rooms: list[int], expected: list[str]
) -> dict[str, Any] | str:
    """Ids, stop ids and answers of llama.cpp; the answers go through the file's own template.

    Asked for a conversation, llama-cpp-python does not count while a character is incomplete, and
    llama.cpp, which rounds the context up to a multiple of 256, aborts the process at a position
    that a GPT-2 has no row for. So its tokens are counted here.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: not read with llama.cpp"
    import llama_cpp

    engine = llama_cpp.Llama(str(path), n_ctx=0, verbose=False, seed=0)
    vocabulary = llama_cpp.llama_model_get_vocab(engine.model)

    def encode(text: str) -> list[int]:
        return engine.tokenize(text.encode(), add_bos=False, special=True)

    def answer(ids: list[int], room: int) -> str:
        tokens = itertools.islice(engine.generate(ids, temp=0.0), room)
        ends = itertools.takewhile(
            lambda token: not llama_cpp.llama_vocab_is_eog(vocabulary, token), tokens
        )
        return tokenizer.decode(list(ends), skip_special_tokens=True)

    if tokenizer.chat_template is not None:
        prompts = [encode(text) for text in render_with_llama_cpp(engine.metadata, tokenizer)]
    texts = [answer(ids, room) for ids, room in zip(prompts, rooms, strict=True)]
    return {
        "version": importlib.metadata.version("llama-cpp-python"),
        "token_ids": compare_ids(tokenizer, encode),
        "greedy": compare_texts(expected, texts),
    }


def render_with_llama_cpp(metadata: dict[str, str], tokenizer: Any) -> list[str]:
    """The questions as prompts, by llama-cpp-python's reading of the file's template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = metadata["tokenizer.chat_template"]
    render = Jinja2ChatFormatter(template, str(tokenizer.eos_token), str(tokenizer.bos_token))
    return [render(messages=as_messages(text)).prompt for text in MESSAGES]
