"""Talk to a chat model in the terminal.

    python -m sft.chat output/tiny/grpo
    python -m sft.chat output/tiny/sft --prompt "Who are you?" --greedy

While chatting: /reset forgets the conversation, /system TEXT sets the system prompt, /exit ends.
"""

import argparse
from typing import Any

import torch

import stages
from sft.eval import load_for_generation
from sft.model import context_length
from sft.rendering import encode_prompt

COMMANDS = "/reset forgets, /system TEXT sets the system prompt, /exit ends"


class Conversation:
    """A conversation with a model, kept within its context.

    Args:
        model, tokenizer: a chat model and its tokenizer.
        sampling: keyword arguments of `generate`.
        system: the system prompt, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, sampling: dict, system: str | None = None):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.system = system
        self.turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns = []

    @torch.no_grad()
    def answer(self, text: str, streamer: Any = None) -> str:
        """The model's answer to one more turn of the user.

        Args:
            text: what the user says.
            streamer: a transformers streamer that receives the tokens as they come.

        Raises:
            ValueError: the turn alone does not fit the model's context.
        """
        self.turns.append({"role": "user", "content": text})
        ids = self._fit()
        output = self.model.generate(
            torch.tensor([ids], device=self.model.device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=self.model.device),
            streamer=streamer,
            **self.sampling | {"max_new_tokens": self._room(ids)},
        )
        reply = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        self.turns.append({"role": "assistant", "content": reply})
        return reply

    def _room(self, ids: list[int]) -> int:
        return min(self.sampling["max_new_tokens"], context_length(self.model) - len(ids))

    def _fit(self) -> list[int]:
        """The prompt's ids; the oldest exchanges are dropped, aloud, until an answer fits."""
        wanted = min(self.sampling["max_new_tokens"], 32)
        while True:
            system = [{"role": "system", "content": self.system}] if self.system else []
            ids = encode_prompt(system + self.turns, self.tokenizer)
            if self._room(ids) >= wanted:
                return ids
            if len(self.turns) == 1:
                self.turns = []
                raise ValueError(f"the message has {len(ids)} tokens: too long for this model")
            self.turns = self.turns[2:]
            print("(the oldest exchange no longer fits the context and is forgotten)")


def make_sampling(args: argparse.Namespace) -> dict:
    """The keyword arguments of `generate` for the flags of the command line.

    Raises:
        ValueError: a flag with which nothing can be said.
    """
    for name, fine, wanted in (
        ("max_new_tokens", args.max_new_tokens >= 1, "1 or more"),
        ("num_beams", args.num_beams >= 1, "1 or more"),
        ("temperature", args.temperature >= 0, "0 or more"),
        ("top_k", args.top_k >= 0, "0 or more"),
        ("top_p", 0 < args.top_p <= 1, "above 0, and 1 at most"),
        ("repetition_penalty", args.repetition_penalty > 0, "above 0"),
    ):
        if not fine:
            raise ValueError(f"--{name} {getattr(args, name)}: it has to be {wanted}")
    sampling = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    sampling["repetition_penalty"] = args.repetition_penalty
    if args.greedy or args.num_beams > 1 or args.temperature == 0:
        return sampling | {"do_sample": False}
    return sampling | {
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
    }


def main(args: argparse.Namespace) -> None:
    """Answer one prompt, or chat until /exit."""
    from transformers import TextStreamer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    stages.require_input(args.directory, "config.json")
    model, tokenizer = load_for_generation(args.directory)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{args.directory} has no chat template. For a base model: pretrain.sample"
        )
    conversation = Conversation(model, tokenizer, make_sampling(args), args.system)
    streamer = None
    if args.num_beams == 1:  # beams are only known at the end
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.prompt is not None:
        reply = conversation.answer(args.prompt, streamer)
        if streamer is None:
            print(reply)
        return
    print(COMMANDS)
    chat(conversation, streamer)


def chat(conversation: Conversation, streamer: Any) -> None:
    """Read turns from the terminal until /exit or the end of the input."""
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = text.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            conversation.reset()
        elif command == "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
        elif command.startswith("/"):
            print(f"{command} is not a command: {COMMANDS}")
        elif text:
            try:
                reply = conversation.answer(text, streamer)
            except ValueError as error:
                print(error)
                continue
            if streamer is None:
                print(reply)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory or a Hub name of a chat model")
    parser.add_argument("--prompt", help="answer this and exit")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top_k", type=int, default=50, help="0 keeps every token")
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--num_beams", type=int, default=1, help="more than 1: beam search")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    with stages.plain_errors():
        main(parser.parse_args())
