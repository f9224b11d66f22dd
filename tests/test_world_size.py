"""ZeRO's checkpoints on another number of processes: nothing of the optimizer is lost."""

import json

import pytest
from conftest import ROOT
from processes import PRETRAIN, Processes
from test_resume import EXACT, assert_close

import stages

pytestmark = pytest.mark.launchers


@pytest.mark.parametrize(
    ("zero", "ranks"), [(zero, ranks) for zero in (1, 2, 3) for ranks in ((2, 1), (1, 2))]
)
def test_another_number_of_processes_goes_on(blocks_dir, tmp_path, zero, ranks):
    settings = PRETRAIN | EXACT | {"data_dir": blocks_dir, "per_device_train_batch_size": 2}
    settings["save_total_limit"] = 9
    settings["weight_decay"] = 0.5  # of matrices, not of the second group
    settings["deepspeed"] = ROOT / f"configs/deepspeed/zero{zero}.json"
    whole, changed = tmp_path / "whole", tmp_path / "changed"

    def begin(directory, count):
        batches = {"gradient_accumulation_steps": 4 // count, "output_dir": directory}
        return Processes("pretrain.train", settings | batches, count)

    begin(whole, ranks[0]).finish()
    written = changed / "checkpoint-6" / stages.WHOLE
    assert begin(changed, ranks[0]).kill(written.is_file), "too late"
    half = written.parent / "global_step6_universal/zero"
    half.mkdir(parents=True)  # as a conversion leaves it that was killed
    record = begin(changed, ranks[1]).finish()
    assert len(record["resumed_from"]) == 1
    assert (half / "optimizer_state.pt").is_file()
    assert_close(changed, whole)


def test_adapters_over_a_frozen_base_go_on_too(base_dir, tmp_path):
    rows = [{"prompt": f"{i} + {i}?", "completion": f"It is {2 * i}."} for i in range(40)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": base_dir, "data_files": data, "validation_files": data,
        "use_peft": "true", "load_in_4bit": "true", "lora_r": 4, "lora_dropout": 0.0,
        "max_length": 64, "max_steps": 9, "per_device_train_batch_size": 2, "bf16": "false",
        "save_steps": 2, "save_total_limit": 9, "logging_steps": 1, "learning_rate": 1e-2,
        "deepspeed": ROOT / "configs/deepspeed/zero2.json",
    }  # fmt: skip

    def begin(directory, count):
        batches = {"gradient_accumulation_steps": 4 // count, "output_dir": directory}
        return Processes("sft.train", settings | batches, count)

    whole, changed = tmp_path / "whole", tmp_path / "changed"
    begin(whole, 2).finish()
    assert begin(changed, 2).kill((changed / "checkpoint-4" / stages.WHOLE).is_file), "too late"
    begin(changed, 1).finish()
    assert_close(changed, whole)
