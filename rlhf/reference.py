"""A reference that moves with the policy (`sync_ref_model`): a checkpoint has to hold it.

TRL reads the reference from where the policy began. A run that was killed would go on with that one
instead of the one that it had moved to.
"""

from pathlib import Path

from safetensors.torch import load_model, save_model
from transformers import Trainer, TrainerCallback

import stages
from pretrain.checkpoints import zero_stage

FILE = "reference/model.safetensors"


def keep_reference(trainer: Trainer, checkpoint: str | None) -> None:
    """Let checkpoints hold a moving reference, and take it from the one that a run goes on from.

    Call it before `train_or_resume`, which counts a checkpoint as whole when all is written.

    Raises:
        ValueError: under ZeRO-3 no process has the reference whole.
    """
    if not trainer.args.sync_ref_model:
        return
    if zero_stage(trainer) == 3:
        raise ValueError("sync_ref_model under ZeRO-3 could not be resumed: take ZeRO-2")
    if checkpoint is not None:
        load_model(trainer.accelerator.unwrap_model(trainer.ref_model), Path(checkpoint, FILE))
    trainer.add_callback(SaveReference(trainer))


class SaveReference(TrainerCallback):
    """Write the reference into each checkpoint."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        """One process writes: all have the same."""
        if stages.is_main_process():
            path = Path(args.output_dir, f"checkpoint-{state.global_step}", FILE)
            path.parent.mkdir(exist_ok=True)
            save_model(self.trainer.accelerator.unwrap_model(self.trainer.ref_model), path)
