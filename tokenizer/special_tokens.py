"""The special tokens: their ids are fixed, so that every stage and every tool means the same.

They exist from the first day. A chat token that is added after pretraining has to be trained from
noise, and LoRA would not train it at all.
"""

PAD = "<pad>"  # fills a batch; never trained, never generated
UNK = "<unk>"  # byte-level BPE never needs it; some tools insist on one
BOS = "<bos>"  # opens a pretraining document
EOS = "<eos>"  # closes a pretraining document
IM_START = "<|im_start|>"  # opens a chat turn
IM_END = "<|im_end|>"  # closes a chat turn: what a chat model must learn to say

RESERVED = ("<|tool_call|>", "<|tool_result|>", "<|think|>", "<|reserved|>")  # for later use

SPECIAL_TOKENS = (PAD, UNK, BOS, EOS, IM_START, IM_END, *RESERVED)  # position = id
