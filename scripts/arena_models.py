"""The contestants of the arena: found on disk, answering token by token, with what they weighed.

Nothing of the web page is in here.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import stages
from rlhf.eval import load_reward_model, score_conversations
from sft.eval import load_for_generation
from sft.model import context_length
from sft.rendering import encode_messages, encode_prompt
from sft.verifiers import verify
from tokenizer.vocabulary import readable

ANSWERING = ("pretrain", "sft", "dpo", "ppo", "grpo")  # the stages that say something
ALTERNATIVES = 5
ROOM = 32  # tokens for an answer; older turns are forgotten until they fit


@dataclass
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0

    def processors(self) -> LogitsProcessorList:
        """transformers' own, in the order of `generate`."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature > 0:
            if self.temperature != 1.0:
                chain.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k > 0:
                chain.append(TopKLogitsWarper(int(self.top_k)))
            if self.top_p < 1.0:
                chain.append(TopPLogitsWarper(float(self.top_p)))
        return chain


@dataclass
class Token:
    """A token of an answer: what the model gave it, and what it would have said instead.

    Probabilities are the model's own, before temperature, top-k and top-p.
    """

    id: int
    text: str
    probability: float
    alternatives: list[tuple[str, float]]


@dataclass
class Answer:
    """What one contestant says, as far as it has come."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    state: str = "waiting"  # "writing", "stopped" (by itself), "cut" (no room left), "failed"
    note: str = ""
    first_token_s: float | None = None
    elapsed_s: float = 0.0
    reward_score: float | None = None
    right: bool | None = None


@dataclass
class Contestant:
    """A model that answers. A base model continues the text instead."""

    name: str
    directory: str
    model: Any
    tokenizer: Any
    is_base: bool

    def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], str]:
        """The prompt's ids, and a note where older turns were left out.

        Raises:
            ValueError: the last turn alone leaves no room for an answer.
        """
        messages, dropped = list(messages), 0
        room = min(ROOM, context_length(self.model) // 4)
        while True:
            ids = self._render(messages)
            if context_length(self.model) - len(ids) >= room:
                note = f"{dropped} older turns forgotten 忘记了更早的对话" if dropped else ""
                return ids, note
            if len(messages) < 3:
                raise ValueError(f"the prompt has {len(ids)} tokens: too long 提问太长")
            messages, dropped = messages[2:], dropped + 2

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if not self.is_base:
            return encode_prompt(messages, self.tokenizer)
        ids = self.tokenizer(
            messages[-1]["content"], add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        bos = self.tokenizer.bos_token_id
        return ids if bos is None else [bos, *ids]

    def answer(self, messages: Sequence[dict[str, str]], sampling: Sampling) -> Iterator[Answer]:
        """Yield the growing answer after every token. The same seed gives the same answer."""
        answer, started_at = Answer(), time.perf_counter()
        try:
            prompt, answer.note = self.prompt_ids(messages)
        except ValueError as error:
            answer.state, answer.note = "failed", str(error)
            yield answer
            return
        room = min(sampling.max_new_tokens, context_length(self.model) - len(prompt))
        answer.state, ids = "writing", []
        for token in self._tokens(prompt, sampling, room):
            answer.tokens.append(token)
            ids.append(token.id)
            answer.text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answer.elapsed_s = time.perf_counter() - started_at
            answer.first_token_s = answer.first_token_s or answer.elapsed_s
            if token.id in self.stop_ids:
                answer.state = "stopped"
            elif len(ids) == room:
                answer.state = "cut"
            yield answer

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end an answer."""
        stops = self.model.generation_config.eos_token_id
        return set(stops if isinstance(stops, list) else [stops])

    def _tokens(self, prompt: list[int], sampling: Sampling, room: int) -> Iterator[Token]:
        device = self.model.device
        chance = torch.Generator(device).manual_seed(int(sampling.seed or 0))  # None: emptied
        processors = sampling.processors()
        ids, cache = torch.tensor([prompt], device=device), None
        for _ in range(room):
            with torch.inference_mode():
                fresh = ids if cache is None else ids[:, -1:]
                output = self.model(input_ids=fresh, past_key_values=cache, use_cache=True)
                cache, logits = output.past_key_values, output.logits[:, -1].float()
                scores = processors(ids, logits.clone())
                if sampling.temperature > 0:
                    chosen = torch.multinomial(scores.softmax(-1), 1, generator=chance)
                else:
                    chosen = scores.argmax(-1, keepdim=True)
                ids = torch.cat([ids, chosen], dim=1)
                probabilities = logits.softmax(-1)[0]
                top = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
            token = int(chosen)
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            others = [(self.show(i), p) for i, p in pairs]
            yield Token(token, self.show(token), float(probabilities[token]), others)
            if token in self.stop_ids:
                return

    def show(self, token: int) -> str:
        """A token as text; bytes that are no whole character as <E4B8>."""
        text = self.tokenizer.decode([token])
        return readable(self.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text


def find_contestants(directories: Sequence[str]) -> dict[str, str]:
    """Name -> directory of every model that answers.

    Args:
        directories: recipes (`output/tiny`), whose stages are taken, or single models.

    Raises:
        FileNotFoundError: a directory holds neither; the message has the command.
    """
    found = {}
    for directory in map(Path, directories):
        if (directory / "config.json").is_file():
            models = [stages.require_input(directory, "tokenizer.json")]
        else:
            models = [directory / name for name in ANSWERING]
            models = [path for path in models if (path / "config.json").is_file()]
        if not models:
            raise FileNotFoundError(
                f"{directory} holds no model. Make some with: "
                f"python scripts/pipeline.py configs/{directory.name or 'tiny'}"
            )
        for path in models:
            name = "base" if path.name == "pretrain" else path.name
            found[name if name not in found else str(path)] = str(path)
    return found


def load(name: str, directory: str) -> Contestant:
    """A contestant, warmed up: its first answer is as fast as the next ones."""
    model, tokenizer = load_for_generation(directory)
    stage = (stages.read_json(Path(directory) / "run.json") or {}).get("stage")
    is_base = tokenizer.chat_template is None or stage == "pretrain"
    contestant = Contestant(name, directory, model, tokenizer, is_base)
    for _ in contestant.answer([{"role": "user", "content": "1"}], Sampling(max_new_tokens=2)):
        pass
    return contestant


def answer_together(
    contestants: Sequence[Contestant],
    conversations: Sequence[list[dict[str, str]]],
    sampling: Sampling,
) -> Iterator[list[Answer]]:
    """All contestants write at once, a token each in turn; yields all answers after each round."""
    answers = [Answer() for _ in contestants]
    running = dict(enumerate(
        contestant.answer(messages, sampling)
        for contestant, messages in zip(contestants, conversations, strict=True)
    ))  # fmt: skip
    while running:
        for i, writer in list(running.items()):
            try:
                answers[i] = next(writer)
            except StopIteration:
                del running[i]
        yield answers


def find_judge(directories: Sequence[str]) -> tuple[Any, Any] | None:
    """The reward model and tokenizer of the first recipe that has one."""
    for directory in map(Path, directories):
        for path in (directory / "reward", directory.parent / "reward"):
            if (path / "config.json").is_file():
                return load_reward_model(str(path))
    return None


def judge(
    answer: Answer, messages: list[dict], scorer: tuple | None, right: str, verifier: str
) -> None:
    """Enter the reward model's score and, where the prompt is a task, the verifier's verdict.

    Raises:
        ValueError: the right answer is none that this verifier can accept.
    """
    if answer.state == "failed":
        return
    if right.strip():
        answer.right = verify(answer.text, right.strip(), verifier)
    if scorer:
        said = [*messages, {"role": "assistant", "content": answer.text.strip()}]
        model, tokenizer = scorer
        if len(encode_messages(said, tokenizer)) <= context_length(model):
            answer.reward_score = score_conversations(model, tokenizer, [said])[0]
        else:
            too_long = "too long for the reward model 对奖励模型太长"
            answer.note = ", ".join(filter(None, [answer.note, too_long]))


def as_record(answer: Answer) -> dict[str, Any]:
    """An answer for the session's JSON."""
    return asdict(answer)
