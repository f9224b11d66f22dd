"""Continue a text with a base model.

python -m pretrain.sample output/tiny/pretrain --prompt "Once upon a time" --seed 1
"""

import argparse
from typing import Any

import torch

import stages

SAMPLE_PROMPTS = ("", "In the morning", "早上")


@torch.no_grad()
def continue_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 80,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> str:
    """The prompt and a sampled continuation; temperature 0 takes the likeliest tokens."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    if not ids:
        raise ValueError("this tokenizer has no <bos>: give a prompt of at least one token")
    if temperature > 0:
        torch.manual_seed(seed)
    context = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    output = model.generate(
        torch.tensor([ids], device=model.device),
        max_new_tokens=min(max_new_tokens, context - len(ids)),
        pad_token_id=tokenizer.pad_token_id,
        **(sampling if temperature > 0 else {"do_sample": False}),
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main(args: argparse.Namespace) -> None:
    """Print continuations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages.require_input(args.directory, "config.json")
    model = AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.directory)
    for prompt in [args.prompt] if args.prompt is not None else SAMPLE_PROMPTS:
        sampling = (args.max_new_tokens, args.temperature, args.top_k, args.seed)
        print(continue_text(model, tokenizer, prompt, *sampling))
        print("---")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory or a Hub name of a causal language model")
    parser.add_argument("--prompt", help="text to continue; without it, a few examples")
    parser.add_argument("--max_new_tokens", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    with stages.plain_errors():
        main(parser.parse_args())
