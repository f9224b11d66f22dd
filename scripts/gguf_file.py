"""A model directory as one GGUF file, the format of llama.cpp and Ollama; and back from it.

llama.cpp's own converter knows a tokenizer by the hash of a test string and refuses every
vocabulary it has not seen. This writes the same format with the `gguf` package, and names the
pre-tokenizer by what it does.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.pytorch_utils import Conv1D

from sft.model import check_vocabulary

Type = gguf.GGMLQuantizationType
TYPES = {
    "f32": (Type.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q5_1": (Type.Q5_1, gguf.LlamaFileType.MOSTLY_Q5_1),
    "q5_0": (Type.Q5_0, gguf.LlamaFileType.MOSTLY_Q5_0),
    "q4_1": (Type.Q4_1, gguf.LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}  # what the `gguf` package can quantise to; the K types need llama.cpp's own llama-quantize
ARCHITECTURES = {"gpt2": gguf.MODEL_ARCH.GPT2, "llama": gguf.MODEL_ARCH.LLAMA}

# llama.cpp's name of a pre-tokenizer, and the same in `tokenizers`. "smollm" cuts off every digit,
# then splits as GPT-2 does: just what tokenizer.train does.
PRE_TOKENIZERS = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}
GENERATION_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")


class Tensor(NamedTuple):
    """One tensor as GGUF stores it: its name there, fp32 values in its layout, its type."""

    name: str
    values: np.ndarray
    type: Type


def write_gguf(model: Any, tokenizer: Any, path: Path, type_name: str, name: str) -> dict[str, int]:
    """Write a causal language model and its tokenizer.

    Args:
        model: a GPT-2 or Llama model in fp32.
        tokenizer: its byte-level BPE tokenizer.
        path: the file to write.
        type_name: a key of `TYPES`. Vectors and positions stay in fp32, and matrices whose rows
            do not fill whole blocks of 32 become f16, as llama.cpp does it.
        name: `general.name` of the file.

    Returns:
        How many tensors have which type.

    Raises:
        ValueError: an architecture, an option of it or a tokenizer that GGUF has no place for.
    """
    check_supported(model.config)
    check_vocabulary(model, tokenizer)
    vocabulary = describe_vocabulary(tokenizer, model.config.vocab_size)  # raises before it writes
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    try:
        writer.add_name(name)
        writer.add_file_type(TYPES[type_name][1])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_sizes(writer, model.config)
        add_vocabulary(writer, tokenizer, vocabulary)
        add_stop_ids(writer, model, tokenizer)
        counts = Counter()
        for tensor in list_tensors(model, type_name):
            data = gguf.quants.quantize(tensor.values, tensor.type)
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.type)
            counts[tensor.type.name.lower()] += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return dict(counts)


def check_supported(config: Any) -> None:
    """Raise a ValueError for what llama.cpp would read and then compute otherwise."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model_type {kind!r} is not exported to GGUF here, only {', '.join(ARCHITECTURES)}. "
            "llama.cpp's convert_hf_to_gguf.py knows more"
        )
    fixed = {"gpt2": {"activation_function": "gelu_new", "scale_attn_weights": True,
                      "scale_attn_by_inverse_layer_idx": False},
             "llama": {"hidden_act": "silu", "mlp_bias": False}}[kind]  # fmt: skip
    for key, value in fixed.items():
        if getattr(config, key) != value:
            raise ValueError(f"{key}={getattr(config, key)!r}: GGUF's {kind} means {value!r}")
    if (rope := rope_of(config)) and rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r}: only plain rotary positions (default)")


def rope_of(config: Any) -> dict:
    """The rotary parameters of a Llama; none for a GPT-2."""
    return getattr(config, "rope_parameters", None) or {}


def add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """The numbers of the config, under llama.cpp's names."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope_of(config)["rope_theta"])
    writer.add_key_length(width)
    writer.add_value_length(width)


def list_tensors(model: Any, type_name: str) -> Iterator[Tensor]:
    """Every weight once, named, laid out and typed as in the file."""
    names = gguf.get_tensor_name_map(
        ARCHITECTURES[model.config.model_type], model.config.num_hidden_layers
    )
    turned = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Conv1D)}
    tied = set(model._tied_weights_keys or {}) if model.config.tie_word_embeddings else set()
    for key, value in model.state_dict().items():
        if key in tied or key.endswith((".attn.bias", ".attn.masked_bias", "inv_freq")):
            continue
        stem, _, suffix = key.rpartition(".")
        name = names.get_name(stem)
        if name is None:
            raise ValueError(f"the weight {key} has no place in a {model.config.model_type} GGUF")
        values = value.to(torch.float32).cpu().numpy()
        if key in turned:  # Conv1D keeps (in, out), GGUF (out, in)
            values = np.ascontiguousarray(values.T)
        if ".self_attn.q_proj." in key:
            values = interleave_halves(values, model.config.num_attention_heads)
        if ".self_attn.k_proj." in key:
            values = interleave_halves(values, model.config.num_key_value_heads)
        yield Tensor(f"{name}.{suffix}", values, choose_type(name, values, type_name))


def interleave_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Llama's query or key as ggml rotates them: pairs side by side, not half a head
    apart."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def choose_type(name: str, values: np.ndarray, type_name: str) -> Type:
    """The wanted type, where it can hold this tensor and llama.cpp reads it."""
    wanted = TYPES[type_name][0]
    if values.ndim == 1 or name == "position_embd":
        return Type.F32
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if values.shape[-1] % block == 0 else Type.F16


def describe_vocabulary(tokenizer: Any, rows: int) -> dict[str, Any]:
    """`tokens` and `types` by id, `merges`, and the name of the pre-tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        rows: of the model's embedding; ids beyond the tokenizer's are marked unused.

    Raises:
        ValueError: not byte-level BPE, or text is changed or split in a way that llama.cpp has no
            name for.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = parts["model"]["type"]
    if kind != "BPE" or (parts["decoder"] or {}).get("type") != "ByteLevel":
        raise ValueError(f"the tokenizer is {kind}: only byte-level BPE is exported to GGUF here")
    if parts["normalizer"] is not None:
        raise ValueError(
            f"the tokenizer rewrites text ({parts['normalizer']['type']}), which llama.cpp's "
            "byte-level BPE does not do: its ids would differ"
        )
    known = {name: json.loads(pre.__getstate__()) for name, pre in PRE_TOKENIZERS.items()}
    found = [name for name, state in known.items() if state == parts["pre_tokenizer"]]
    if not found:
        raise ValueError(
            f"the pre-tokenizer {json.dumps(parts['pre_tokenizer'])} has no name in llama.cpp that "
            f"is known here; known: {', '.join(known)}"
        )
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, gguf.TokenType.NORMAL
    for added in parts["added_tokens"]:
        special = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        types[added["id"]] = special
    merges = [m if isinstance(m, str) else " ".join(m) for m in parts["model"]["merges"]]
    return {"tokens": tokens, "types": types, "merges": merges, "pre": found[0]}


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: dict[str, Any]) -> None:
    """The vocabulary, how text is split before it, and the chat template."""
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE, whatever the model
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(without_generation_marks(tokenizer.chat_template))


def without_generation_marks(template: str) -> str:
    """The template for engines that do not know TRL's `{% generation %}`.

    A comment takes its place, which trims the white space around it just as the mark does.
    """
    return GENERATION_MARK.sub(r"{#\1 \2#}", template)


def add_stop_ids(writer: gguf.GGUFWriter, model: Any, tokenizer: Any) -> None:
    """The special ids. All stop ids end an answer in llama.cpp: as eos, end of turn or message."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    stops = list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *stops) if i is not None))
    adders = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    if len(stops) > len(adders):
        raise ValueError(f"{len(stops)} stop ids {stops}: GGUF has room for {len(adders)}")
    for add, stop in zip(adders, stops, strict=False):
        add(stop)
    for add, token in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if token is not None:
            add(token)


def read_tensors(reader: gguf.GGUFReader) -> dict[str, tuple[Type, np.ndarray, np.ndarray]]:
    """name -> (type, the stored bytes, their values in fp32)."""
    return {
        tensor.name: (
            tensor.tensor_type,
            np.asarray(tensor.data),
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in reader.tensors
    }


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """The tokenizer that the file describes, from nothing but the file."""
    tokens, types, merges, pre = (
        reader.get_field(f"tokenizer.ggml.{key}").contents()
        for key in ("tokens", "token_type", "merges", "pre")
    )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=special)])
    return tokenizer
