"""What pretraining measures beside the loss: held-out bits per byte, samples, and a broken loss."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from pretrain.callbacks import LogFile, say
from pretrain.data import PackedCollator
from pretrain.sample import SAMPLE_PROMPTS, continue_text

SAMPLE_TOKENS = 40
SHOWN_CHARACTERS = 100
UNCHECKED_BATCHES = 64  # that a GPU may run ahead of the check of their losses
ROWS_AT_ONCE = 4096
NAMED_BLOCKS = 16


class HeldOut(TrainerCallback):
    """Add perplexity and bits per byte to every log of a held-out loss.

    The bytes are those of the evaluated blocks' text. The ends of documents (<eos>) are predicted
    too and stand for no byte, so the value lies a little above that of `pretrain.eval`.

    Args:
        blocks: what the trainer evaluates.
    """

    def __init__(self, blocks: Dataset, tokenizer):
        tokens, size = count_predicted(blocks, tokenizer)
        self.bits_per_nat = tokens / size / math.log(2)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """exp(loss), and the loss in bits times tokens per byte."""
        if logs is not None and "eval_loss" in logs:
            loss = logs["eval_loss"]
            logs["eval_perplexity"] = math.exp(loss) if loss < 700 else math.inf
            logs["eval_bits_per_byte"] = loss * self.bits_per_nat


def count_predicted(blocks: Dataset, tokenizer) -> tuple[int, int]:
    """(tokens with a loss, UTF-8 bytes they stand for) of packed blocks.

    The first token of a block and every <bos> are not predicted. A character that a block's edge
    cuts counts as one byte.
    """
    collate, tokens, size = PackedCollator(tokenizer.bos_token_id, tokenizer.eos_token_id), 0, 0
    for ids in blocks["input_ids"]:
        labels = collate([{"input_ids": ids}])["labels"]
        predicted = labels[labels != -100].tolist()
        text = tokenizer.decode(predicted, skip_special_tokens=True)
        tokens += len(predicted)
        size += len(text.encode()) - 2 * text.count("\N{REPLACEMENT CHARACTER}")
    if not size:
        raise ValueError("the held-out blocks hold no text: bits per byte cannot be measured")
    return tokens, size


class Samples(LogFile):
    """After each evaluation, continue a few prompts: shown, and kept in samples.jsonl.

    The likeliest token is taken each time: no random number is drawn, so that a run with samples
    ends with the same weights as a run without. All processes take part, since under ZeRO-3 each
    holds a part of the weights.

    Args:
        trainer: its TensorBoard file, where there is one, gets the texts too.
    """

    def __init__(self, trainer, tokenizer, prompts: tuple[str, ...] = SAMPLE_PROMPTS):
        super().__init__(trainer.args.output_dir, "samples.jsonl")
        self.trainer, self.tokenizer, self.prompts = trainer, tokenizer, prompts

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        """One continuation of each prompt."""
        was_training = model.training
        model.eval()
        texts = [
            continue_text(model, self.tokenizer, prompt, SAMPLE_TOKENS, temperature=0)
            for prompt in self.prompts
        ]
        model.train(was_training)
        if not state.is_world_process_zero:
            return
        for prompt, text in zip(self.prompts, texts, strict=True):
            self.append({"step": state.global_step, "prompt": prompt, "text": text})
            say(f"    {text[:SHOWN_CHARACTERS]!r}")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                shown = "\n\n---\n\n".join(texts)
                callback.tb_writer.add_text("samples", shown, state.global_step)


class LossGuard(TrainerCallback):
    """Stop at the first batch whose loss is not a number, and name its blocks.

    The trainer shows it every training loss. On a CPU each is looked at before its gradients are
    made; a GPU would have to wait for that, so there they are looked at when the trainer logs.

    Args:
        data_dir: output of `pretrain.prepare`.
        blocks: its training blocks, in which those of a batch are found by their content.
    """

    def __init__(self, data_dir: str, blocks: Dataset):
        self.data_dir, self.blocks = data_dir, blocks
        self.batches: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # step, loss, input_ids

    def see(self, model, loss: torch.Tensor, input_ids: torch.Tensor, step: int) -> None:
        """Take a training loss, a scalar; input_ids is (B, T), `step` the one it belongs to."""
        self.batches.append((step, loss.detach(), input_ids))
        if loss.device.type == "cpu" or len(self.batches) >= UNCHECKED_BATCHES:
            self.check(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look at the losses before the trainer logs their mean."""
        if control.should_log and self.batches:
            self.check(model)

    def check(self, model) -> None:
        """Raise a ValueError where one of the losses is not finite."""
        losses = torch.stack([loss for _, loss, _ in self.batches])
        if not torch.isfinite(losses).all():
            first = int((~torch.isfinite(losses)).nonzero()[0])
            step, loss, input_ids = self.batches[first]
            raise ValueError(self.explain(model, step, float(loss), input_ids))
        self.batches.clear()

    def explain(self, model, step: int, loss: float, input_ids: torch.Tensor) -> str:
        """What happened, where, and what to do."""
        rows = find_blocks(self.blocks, input_ids)
        places = [locate_block(self.data_dir, row) for row in rows[:NAMED_BLOCKS]]
        more = f" and {len(rows) - NAMED_BLOCKS} more" if len(rows) > NAMED_BLOCKS else ""
        spoilt = [n for n, p in model.named_parameters() if not torch.isfinite(p).all()]
        cause = (
            f"Weights were not finite any more, {spoilt[0]} first: an update before it was too "
            "large. Lower learning_rate or max_grad_norm, or lengthen warmup_steps"
            if spoilt and input_ids.device.type == "cpu"
            else "Look at these blocks, or lower learning_rate"
        )
        return (
            f"the loss is {loss} at step {step}, on blocks {', '.join(places)}{more} of "
            f"{self.data_dir}. {cause}"
        )


def find_blocks(blocks: Dataset, input_ids: torch.Tensor) -> list[int]:
    """Indices of the blocks that a batch (B, T) holds, in the batch's order.

    Reads all blocks, once: for the end of a run, not for its steps. Where several blocks are equal
    the first is named.
    """
    wanted = [tuple(row) for row in input_ids.tolist()]
    missing, found = set(wanted), {}
    for start in range(0, len(blocks), ROWS_AT_ONCE):
        for offset, row in enumerate(blocks[start : start + ROWS_AT_ONCE]["input_ids"].tolist()):
            if (ids := tuple(row)) in missing:
                missing.remove(ids)
                found[ids] = start + offset
        if not missing:
            break
    return [found[ids] for ids in wanted if ids in found]


def locate_block(data_dir: str, index: int) -> str:
    """`17 (train-00000.parquet, row 17)` of the index of a training block."""
    row = index
    for path in sorted(Path(data_dir).glob("train-*.parquet")):
        rows = pq.ParquetFile(path).metadata.num_rows
        if row < rows:
            return f"{index} ({path.name}, row {row})"
        row -= rows
    raise AssertionError(f"{data_dir} has no block {index}")
