"""What `quickstart.sh --auto` chooses for machines that are not there."""


import pytest
from conftest import load_script


@pytest.fixture(scope="module")
def auto():
    return load_script("auto")


def machine(auto, **changes):
    given = {"cores": 4, "memory": 16e9, "free": 12e9, "device": "cpu", "gpu_memory": 0}
    return auto.Machine(**{**given, "dtype": "bf16", "peak": auto.REFERENCE_PEAK, **changes})


def test_a_laptop_gets_tiny_and_the_rest_of_the_time_for_pretraining(auto):
    choice = auto.choose(machine(auto), 10)
    assert choice.recipe == "tiny"
    assert choice.settings == ["pretrain.minutes=4.6"]  # 10 minutes less 325 s
    ample = auto.choose(machine(auto), 20)
    assert (ample.recipe, ample.settings) == ("tiny", [])  # its steps: more would be repetition
    assert "about 10 of 20 minutes" in ample.reasons[-1]


def test_a_machine_without_bf16_gets_what_it_took_on_one(auto):
    choice = auto.choose(machine(auto, peak=0.33e12, dtype="fp32"), 30)
    assert choice.settings == [], "710 s of pretraining, 582 s of the rest"
    assert "about 22 of 30 minutes" in choice.reasons[-1]
    assert auto.choose(machine(auto, peak=0.33e12, dtype="fp32"), 15).settings == [
        "pretrain.minutes=5.3"
    ]


def test_no_time_or_a_slow_machine_gets_smoke_with_the_reason(auto):
    assert auto.choose(machine(auto), 5).recipe == "smoke"
    choice = auto.choose(machine(auto, peak=0.1e12, dtype="fp32"), 25)
    assert choice.recipe == "smoke" and "alone take about 24 of 25 minutes" in choice.reasons[-1]
    for minutes in (0, float("nan")):
        with pytest.raises(ValueError, match=f"minutes is {minutes}"):
            auto.choose(machine(auto), minutes)


def test_little_memory_cuts_batches_and_keeps_what_a_step_learns_from(auto):
    choice = auto.choose(machine(auto, memory=4e9, free=3.2e9), 15)  # a ceiling of 2.2 GB
    settings = dict(setting.split("=") for setting in choice.settings)
    assert settings["sft.per_device_train_batch_size"] == "16"
    assert settings["sft.gradient_accumulation_steps"] == "2"
    assert settings["grpo.per_device_train_batch_size"] == "32"
    assert settings["ppo.per_device_train_batch_size"] == "16"
    roomy = auto.choose(machine(auto, memory=8e9, free=7e9), 15)  # 4.8 GB: GRPO takes 4.9
    assert {setting.split(".")[0] for setting in roomy.settings} == {"grpo"}
    assert any("sft: its batch in 2 parts" in reason for reason in choice.reasons)
    least = auto.choose(machine(auto, memory=2e9, free=1.5e9), 15)
    settings = dict(setting.split("=") for setting in least.settings)
    assert settings["sft.per_device_train_batch_size"] == "4"
    keys = ("per_device_train_batch_size", "steps_per_generation")
    rows = [int(settings[f"ppo.{key}"]) for key in keys]
    assert rows[0] < 16 and rows[0] * rows[1] == 128, "a rollout has as many rows as before"


def test_small_needs_time_a_large_machine_and_leave_to_download(auto):
    large = machine(auto, device="cuda", gpu_memory=24e9)
    assert auto.choose(large, 180, network=True).recipe == "small"
    assert auto.choose(large, 180).recipe == "tiny"
    assert auto.choose(large, 60, network=True).recipe == "tiny"
    assert auto.choose(machine(auto), 180, network=True).recipe == "tiny"


def test_the_command_holds_back(auto):
    one = machine(auto, memory=8e9)
    words = " ".join(auto.make_command(auto.Choice("tiny", ["a.b=1"], []), one, limits=True))
    assert words == (
        "prlimit --data=6800000000 nice -n 10 python scripts/pipeline.py configs/tiny --set a.b=1"
    )
    words = auto.make_command(auto.Choice("smoke", [], []), one, limits=False)
    assert " ".join(words) == "nice -n 10 python scripts/pipeline.py configs/smoke"
