"""A GPT-2-style language model, written to be read.

    tokens (B, T) -> embeddings (B, T, C) -> n_layer x [attention, MLP] -> logits (B, T, V)

B batch rows, T positions, C channels (`n_embd`), V vocabulary. Pre-norm residual blocks, learned
positions, tied input and output embeddings (Radford et al. 2019). Parameter names and shapes are
those of GPT-2, so what this model saves is a GPT-2 checkpoint: transformers, PEFT, vLLM, llama.cpp
and lm-eval load it without this file, and this file loads any GPT-2 checkpoint.
"""

import math

import torch
from torch import nn
from transformers import GenerationMixin, GPT2Config, PreTrainedModel, initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D  # a linear layer whose weight is (in, out)
from transformers.utils.generic import can_return_tuple

from pretrain.loss import next_token_loss


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Plain attention, softmax(Q K^T / sqrt(d) + mask) V (Vaswani et al. 2017, equation 1).

    transformers' registry replaces it by a fused kernel (`attn_implementation`); it is the
    reference, and what runs under `attn_implementation="eager"`.

    Args:
        query: (B, heads, T, d).
        key, value: (B, heads, S, d); S is longer than T while a cache is in use.
        attention_mask: (B, 1, T, S), added to the scores, or None.

    Returns:
        The mixture (B, T, heads, d), and the weights (B, heads, T, S).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class GPT2Attention(nn.Module):
    """Causal self-attention: each position mixes what it and earlier positions say."""

    is_causal = True

    def __init__(self, config: GPT2Config, layer_idx: int):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.scaling = self.head_dim**-0.5
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)  # query, key and value in one
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.c_proj.is_residual_projection = True
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states, past_key_values, attention_mask, **kwargs):
        """(B, T, C) -> (B, T, C); keys and values are appended to the cache if there is one."""
        batch, time, channels = hidden_states.shape
        query, key, value = (
            part.view(batch, time, -1, self.head_dim).transpose(1, 2)
            for part in self.c_attn(hidden_states).split(channels, dim=2)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, attend)
        dropout = self.config.attn_pdrop if self.training else 0.0
        mixed, _ = attention(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs
        )
        return self.resid_dropout(self.c_proj(mixed.reshape(batch, time, channels)))


class GPT2MLP(nn.Module):
    """Two layers with GELU (its tanh approximation, as in GPT-2), four times as wide inside."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(inner, config.n_embd)
        self.c_proj = Conv1D(config.n_embd, inner)
        self.c_proj.is_residual_projection = True
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states):
        """(B, T, C) -> (B, T, C)."""
        inner = nn.functional.gelu(self.c_fc(hidden_states), approximate="tanh")
        return self.dropout(self.c_proj(inner))


class GPT2Block(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, layer_idx: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPT2Attention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = GPT2MLP(config)

    def forward(self, hidden_states, past_key_values, attention_mask, **kwargs):
        """(B, T, C) -> (B, T, C)."""
        attended = self.attn(self.ln_1(hidden_states), past_key_values, attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class GPT2PreTrainedModel(PreTrainedModel):
    """What transformers needs to know: config, initialisation, kernels that may serve."""

    config_class = GPT2Config
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2Block"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = ["attn.bias", "attn.masked_bias"]  # old files' masks

    @torch.no_grad()
    def _init_weights(self, module):
        """Normal(0, 0.02); the residual projections by 1 / sqrt(2 n_layer) of it (GPT-2, 2.3).

        Only through `initialization`: it skips parameters that came from a checkpoint.
        """
        std = self.config.initializer_range
        if isinstance(module, Conv1D | nn.Linear):
            if getattr(module, "is_residual_projection", False):
                std /= math.sqrt(2 * self.config.n_layer)
            initialization.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            initialization.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, nn.LayerNorm):
            initialization.ones_(module.weight)
            initialization.zeros_(module.bias)


class GPT2Model(GPT2PreTrainedModel):
    """Embeddings, blocks, final norm."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        if config.activation_function != "gelu_new" or config.scale_attn_by_inverse_layer_idx:
            raise ValueError(
                "this file is plain GPT-2 (activation_function='gelu_new', no scaling by layer); "
                f"got {config.activation_function!r}, {config.scale_attn_by_inverse_layer_idx=}. "
                "Load such a model with AutoModelForCausalLM"
            )
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(GPT2Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        """The token embeddings."""
        return self.wte

    def set_input_embeddings(self, value):
        """Replace the token embeddings."""
        self.wte = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every position.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds` (B, T, C).
            past_key_values: keys and values of earlier positions.
            attention_mask: (B, T + past), 1 where there is a token, 0 where there is padding.
            position_ids: (B, T). Where they start again at 0 inside a row, a new document starts:
                without an attention mask no position attends across such a border.
            use_cache: return keys and values for generation.
        """
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (position_ids + past).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.drop(inputs_embeds + self.wpe(position_ids))
        for block in self.h:
            hidden_states = block(
                hidden_states, past_key_values, causal_mask, position_ids=position_ids, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class GPT2LMHeadModel(GPT2PreTrainedModel, GenerationMixin):
    """The language model: hidden states to logits by the transposed token embeddings."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) and, with labels, the mean cross-entropy in nats a token.

        Args:
            labels: (B, T), not shifted; -100 is ignored. `labels[:, t]` is predicted at t - 1.
            logits_to_keep: compute logits of the last so many positions only; 0 is all.

        In training, with labels, the loss is fused with the head and the logits are None.

        The other arguments are those of `GPT2Model.forward`.
        """
        if use_cache is None:  # a loss needs no cache, and a cache hides packed documents
            use_cache = self.config.use_cache and labels is None and not self.training
        outputs = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if isinstance(logits_to_keep, torch.Tensor):
            hidden_states = hidden_states[:, logits_to_keep]
        elif logits_to_keep:
            hidden_states = hidden_states[:, -logits_to_keep:]
        logits = loss = None
        if self.training and labels is not None:
            count = kwargs.get("num_items_in_batch")
            loss = next_token_loss(hidden_states, self.lm_head.weight, labels, count)
        else:
            logits = self.lm_head(hidden_states)
            if labels is not None:
                vocab_size = self.config.vocab_size
                loss = self.loss_function(logits, labels, vocab_size=vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )
