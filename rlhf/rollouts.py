"""Rollouts: the answers that PPO and GRPO learn from, sampled several times as fast on a CPU.

`generate` of transformers spends most of a small model's time between the matrix products. Here:

    a copy of the policy     in bf16 where the training forward is, a LoRA merged  `policy_copy`
    prefill                  once for a prompt, however many answers it gets     `prefill`
    a preallocated cache     keys stored the way that the product reads them     `RolloutCache`
    one step, one function   model, temperature, choice; compiled where it pays  `decode_one_token`
    rows that have ended     leave the batch                                     `sample_answers`

The model is called as any transformers model with a cache of plain layers: GPT-2, Llama, Qwen, ...
What is trained does not change: ratios and KL come from the training forward, as before.

Shapes: B answers, P prompt tokens (padded left), T answer tokens, S places in the cache, V
vocabulary, H key-value heads of width d.
"""

import math

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import GRPOTrainer

import stages
from pretrain.hardware import choose_attention
from rlhf.policy_copy import copy_policy, copy_weights, why_not_copied

PLACES = 64  # the cache grows by so many tokens
ENDED = 0.25  # of the rows, before they leave: moving the cache costs about a step
# Compiling takes about 2 s a layer and saves about 1 ms a layer and step, on two cores.
COMPILED_STEPS = 4000


class RolloutLayer(CacheLayerMixin):
    """Keys (B, H, S, d) and values (B, H, S, d) of one layer, with room for what is to come.

    The keys lie in memory as (B, H, d, S): their product with one query is four times as fast.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor):
        super().__init__()
        self.turned_keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states) -> None:
        """Nothing to do: a layer is made of what the prefill computed."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Write one token (B, H, 1, d) at `place`; all keys and values, the empty ones too."""
        self.turned_keys.index_copy_(3, self.place, key_states.transpose(2, 3))
        self.values.index_copy_(2, self.place, value_states)
        return self.turned_keys.transpose(2, 3), self.values

    def get_seq_length(self) -> int:
        """Places; positions and masks are given with each call, so no model counts by it."""
        return self.values.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask is for, and where they begin."""
        return self.values.shape[2], 0

    def get_max_length(self) -> int:
        """Places."""
        return self.values.shape[2]


class RolloutCache:
    """Keys, values and mask of the rows that are still being written.

    Args:
        prefilled: transformers' cache of the prompts.
        attention_mask: (prompts, P), 0 on the padding.
    """

    def __init__(self, prefilled: DynamicCache, attention_mask: torch.Tensor):
        layers, dtype = prefilled.layers, prefilled.layers[0].keys.dtype
        self.used = attention_mask.shape[1]
        self.keys = [layer.keys.transpose(2, 3) for layer in layers]
        self.values = [layer.values for layer in layers]
        self.mask = torch.zeros_like(attention_mask, dtype=dtype)
        self.mask.masked_fill_(attention_mask == 0, torch.finfo(dtype).min)
        self.mask = self.mask[:, None, None]  # (B, 1, 1, S), added to the scores
        self.positions = attention_mask.sum(dim=1, keepdim=True)  # of the next token
        self.place = torch.tensor([self.used], device=attention_mask.device)

    def move(self, rows: torch.Tensor, room: int) -> None:
        """Keep these rows, in this order, with `room` free places at least."""
        places = math.ceil((self.used + room) / PLACES) * PLACES
        for i, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            _, heads, width, _ = keys.shape
            # Zeros: what is masked is multiplied by 0, and 0 times an old NaN would be NaN.
            self.keys[i] = keys.new_zeros(len(rows), heads, width, places)
            self.keys[i][..., : self.used] = keys[rows, ..., : self.used]
            self.values[i] = values.new_zeros(len(rows), heads, places, width)
            self.values[i][:, :, : self.used] = values[rows, :, : self.used]
        mask = self.mask[rows, ..., : self.used]
        hidden = torch.finfo(mask.dtype).min
        self.mask = torch.nn.functional.pad(mask, (0, places - self.used), value=hidden)
        self.positions = self.positions[rows]
        pairs = zip(self.keys, self.values, strict=True)
        self.layers = Cache(layers=[RolloutLayer(*pair, self.place) for pair in pairs])

    def take_place(self) -> None:
        """Make the next free place that of the token which is about to be read."""
        self.place.fill_(self.used)
        self.mask[..., self.used] = 0
        self.used += 1


def rollout_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention for transformers' registry; one query is two products over ungrouped heads.

    Args:
        query: (B, heads, T, d); key, value: (B, H, S, d). T > 1 goes to this machine's kernel.
        attention_mask: (B, 1, 1, S), added to the scores.
    """
    batch, heads, time, width = query.shape
    if time > 1:
        kernel = ALL_ATTENTION_FUNCTIONS[choose_attention()]
        return kernel(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = width**-0.5 if scaling is None else scaling
    groups = (query * scaling).reshape(batch, key.shape[1], -1, width)  # (B, H, heads / H, d)
    weights = (groups @ key.transpose(2, 3) + attention_mask).softmax(dim=-1)
    return (weights @ value).reshape(batch, 1, heads, -1), None


def choose_token(logits: torch.Tensor, chance: torch.Tensor, temperature: float, warpers=()):
    """Sample from softmax(logits / temperature) by inverting its distribution function.

    One random number a row, where `torch.multinomial` draws one a token of the vocabulary.

    Args:
        logits: (B, V); chance: (B, 1), uniform in [0, 1). `temperature` 0 takes the likeliest.
        warpers: transformers' logits warpers (top-k and so on), which need no earlier tokens.

    Returns:
        Tokens (B, 1), and the log-probability (B, 1) that each was sampled with.
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.log_softmax(dim=-1).max(dim=-1, keepdim=True)
        return best.indices, best.values
    logits = logits / temperature
    for warper in warpers:
        logits = warper(None, logits)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    sums = weights.cumsum(dim=-1)
    total = sums[:, -1:]
    # right=True: never a token of weight 0. Rounding may reach the total: the last with weight.
    below = torch.minimum(chance * total, total * (1 - 1e-7))
    tokens = torch.searchsorted(sums, below, right=True)
    return tokens, (weights.gather(1, tokens) / total).log()


def decode_one_token(model, tokens, positions, mask, cache, chance, temperature, warpers=()):
    """Read `tokens` (B, 1) at `positions` (B, 1) and choose the next: as `choose_token`."""
    output = model(input_ids=tokens, position_ids=positions, attention_mask=mask,
                   past_key_values=cache, use_cache=True)  # fmt: skip
    return choose_token(output.logits[:, -1], chance, temperature, warpers)


def prefill(model, prompts: list[list[int]]) -> tuple[RolloutCache, torch.Tensor]:
    """Read the prompts, each text once: the cache of all rows, and their next logits (B, V)."""
    unique = {tuple(prompt): i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.tensor([unique[tuple(prompt)] for prompt in prompts], device=model.device)
    width = max(2, *map(len, unique))  # one token would look like a step of decoding
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in unique]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique]
    ids, mask = torch.tensor(ids, device=model.device), torch.tensor(mask, device=model.device)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    cache = RolloutCache(output.past_key_values, mask)
    cache.move(rows, room=1)
    return cache, output.logits[rows, -1]


@torch.no_grad()
def sample_answers(
    model, prompts: list[list[int]], max_new_tokens: int, eos_token_ids: list[int],
    temperature: float = 1.0, warpers=(), step=decode_one_token,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """Answer every prompt: token ids, the end token included, and their log-probabilities.

    Args:
        model: as `copy_for_rollouts` makes it.
        prompts: token ids, of any length.
        temperature, warpers: as of `choose_token`.
        step: `decode_one_token`, or its compiled form.
    """
    count, device = len(prompts), model.device
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(count, max_new_tokens, device=device)
    lengths = torch.full((count,), max_new_tokens, device=device)
    ends = torch.tensor(eos_token_ids, device=device)
    cache, logits = prefill(model, prompts)
    rows, ended = torch.arange(count, device=device), torch.zeros_like(lengths, dtype=torch.bool)
    chance = torch.rand(count, 1, device=device)
    token, logp = choose_token(logits, chance, temperature, warpers)
    for i in range(max_new_tokens):
        tokens[rows, i], logps[rows, i] = token[:, 0], logp[:, 0]
        ends_now = torch.isin(token[:, 0], ends) & ~ended
        lengths[rows[ends_now]] = i + 1
        ended |= ends_now
        left = len(rows) - int(ended.sum())
        if left == 0 or i + 1 == max_new_tokens:
            break
        leave = left <= len(rows) * (1 - ENDED)
        if leave or cache.used == cache.mask.shape[-1]:
            kept = (~ended).nonzero()[:, 0] if leave else torch.arange(len(rows), device=device)
            cache.move(kept, room=1)
            rows, ended, token = rows[kept], ended[kept], token[kept]
        cache.take_place()
        chance = torch.rand(len(rows), 1, device=device)
        token, logp = step(
            model, token, cache.positions, cache.mask, cache.layers, chance, temperature, warpers
        )
        cache.positions = cache.positions + 1
    lengths = lengths.tolist()
    return tuple([row[:n] for row, n in zip(table.tolist(), lengths, strict=True)]
                 for table in (tokens, logps))  # fmt: skip


def copy_for_rollouts(policy, dtype: torch.dtype):
    """A model for `sample_answers`, which attends by `rollout_attention`."""
    AttentionInterface.register("rollout", rollout_attention)
    AttentionMaskInterface.register("rollout", ALL_MASK_ATTENTION_FUNCTIONS[choose_attention()])
    return copy_policy(policy, dtype, attn_implementation="rollout")


def compile_step(model, count: int, temperature: float, warpers=()):
    """`decode_one_token` compiled for any number of rows and places, or as it is where it fails.

    It is compiled here, on rows that hold nothing, and not on the first answers: a resumed run
    compiles the same code again, and samples the same.
    """
    compiled = torch.compile(decode_one_token)

    def step(model, tokens, positions, mask, cache, chance, *args):
        if len(tokens) == 1:  # torch.compile takes a size of 1 for a constant
            return decode_one_token(model, tokens, positions, mask, cache, chance, *args)
        for tensor in (tokens, positions, mask, chance):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(mask, 3)
        for layer in cache.layers:
            for tensor, places in ((layer.turned_keys, 3), (layer.values, 2)):
                torch._dynamo.mark_dynamic(tensor, 0)
                torch._dynamo.mark_dynamic(tensor, places)
        return compiled(model, tokens, positions, mask, cache, chance, *args)

    try:
        with torch.random.fork_rng():
            sample_answers(model, [[0]] * count, 2, [], temperature, warpers, step)
    except Exception as error:  # no compiler, or a model that it cannot take
        say(f"rollouts are not compiled: {str(error).splitlines()[0][:200]}")
        return decode_one_token
    return step


def say(message: str) -> None:
    """Print, in the main process."""
    if stages.is_main_process():
        print(message)


class FastRollouts:
    """Put before one of TRL's trainers with rollouts: `class Mine(FastRollouts, GRPOTrainer)`.

    Where these rollouts cannot serve (vLLM, ZeRO-3, ...) TRL's own are used, and the reason is
    printed once.
    """

    _rollout_model = None
    _why_not_fast: str | None = None

    def _generate_single_turn(self, prompt_ids, images, *args, **kwargs):
        if self._rollout_model is None and self._why_not_fast is None:
            self._set_up_rollouts()
        if self._why_not_fast is not None:
            return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)
        copy_weights(self.model, self._rollout_model)
        with torch.autocast(self.accelerator.device.type, enabled=False):
            answers, _ = sample_answers(
                self._rollout_model, prompt_ids, self.max_completion_length, self.eos_token_ids,
                self.temperature, self._rollout_warpers, self._rollout_step,
            )  # fmt: skip
        return answers, None  # as from `generate`: the training forward computes log-probabilities

    def _set_up_rollouts(self) -> None:
        self._why_not_fast = self._find_obstacle() or why_not_copied(self.model)
        if self._why_not_fast is not None:
            return say(f"rollouts by transformers' generate or vLLM: {self._why_not_fast}")
        args = self.args
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else self.model.dtype
        self._rollout_model = copy_for_rollouts(self.model, dtype)
        self._rollout_warpers = tuple(
            kind(value)
            for kind, value in (
                (TopKLogitsWarper, self.top_k or None),
                (TopPLogitsWarper, None if self.top_p == 1.0 else self.top_p),
                (MinPLogitsWarper, self.min_p),
            )
            if value is not None
        )
        self._rollout_step = decode_one_token
        batches = self.state.max_steps * args.gradient_accumulation_steps
        rounds = batches / (args.steps_per_generation * self.num_iterations)
        if rounds * args.max_completion_length >= COMPILED_STEPS:
            copy_weights(self.model, self._rollout_model)
            rows = args.per_device_train_batch_size * args.steps_per_generation
            chosen = max(rows, 2), self.temperature, self._rollout_warpers
            self._rollout_step = compile_step(self._rollout_model, *chosen)

    def _find_obstacle(self) -> str | None:
        """What the trainer was asked for that these rollouts do not do."""
        args = self.args
        stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
        return next((reason for reason, there in (
            ("vLLM was asked for", self.use_vllm),
            ("continuous batching was asked for", self.use_transformers_continuous_batching),
            ("the model is sharded", stage == 3 or self.is_fsdp_enabled),
            ("the model reads images", self._is_vlm),
            (f"repetition_penalty={self.repetition_penalty}", self.repetition_penalty != 1.0),
            ("generation_kwargs were given", bool(args.generation_kwargs)),
            ("cache_implementation was given", args.cache_implementation is not None),
        ) if there), None)  # fmt: skip


class FastGRPOTrainer(FastRollouts, GRPOTrainer):
    """TRL's `GRPOTrainer`, with these rollouts; answers that teach nothing are not computed."""

    _name = "GRPO"

    def _compute_loss(self, model, inputs):
        if self.model.training and self._is_loss_zero_without_advantage():
            inputs = keep_rows_with_advantage(inputs)
        return super()._compute_loss(model, inputs)

    def _is_loss_zero_without_advantage(self) -> bool:
        """Whether the loss is a sum over tokens, each multiplied by its answer's advantage.

        What it is divided by counts all answers, and comes with the batch (`num_items_in_batch`).
        """
        return (
            self.loss_type in ("dapo", "cispo", "vespo")
            and self.beta == 0.0
            and self.top_entropy_quantile == 1.0
            and not (self._entropy_bonus_enabled or self.aux_loss_enabled or self._is_vlm)
        )


def keep_rows_with_advantage(inputs: dict) -> dict:
    """Of a batch of TRL's, the answers whose advantage is not 0; at least one, for the backward.

    In a group whose answers were all paid the same every advantage is 0, and so is the gradient.
    """
    rows = inputs["advantages"].nonzero()[:, 0]
    rows = rows if len(rows) else rows.new_zeros(1)
    return {
        key: value[rows] if torch.is_tensor(value) and value.dim() else value
        for key, value in inputs.items()
    }
