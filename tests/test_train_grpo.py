"""Which tasks GRPO trains on, in which order, that reward and metric are one, and the probe."""

import json

import pytest
import torch
from trl import GRPOConfig

from pretrain.hardware import training_defaults
from rlhf.probe import Outcome, check_outcomes, choose_rows, require_mixed_outcomes, show_outcomes
from rlhf.reward_functions import verifiable_reward
from rlhf.train_grpo import (
    GRPOArguments,
    check_settings,
    choose_tasks,
    lay_out_run,
    load_data,
    order_prompts,
)
from sft.data import DataSummary
from sft.model import load_model
from sft.train import load_chat_tokenizer
from sft.verifiers import verify

TASKS = [{"kind": k, "level": n} for k, n in [("sum", 1), ("sum", 3), ("logic", 1), ("logic", 2)]]


def make_args(tmp_path, **settings):
    given = training_defaults() | {
        "output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": [],
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 6,
    }  # fmt: skip
    return GRPOConfig(**given | settings)


def test_tasks_are_chosen_by_kind_and_level_and_the_rest_is_counted():
    summary = DataSummary()
    assert choose_tasks(TASKS, ["logic"], 1, summary) == [TASKS[2]]
    dropped = {reason: len(sources) for reason, sources in summary.dropped.items()}
    assert dropped == {"kind not in ['logic']": 2, "level above max_level=1": 1}
    assert choose_tasks(TASKS, [], None, DataSummary()) == TASKS


@pytest.mark.parametrize("pays", ["verifier", "answer_format"])
def test_tasks_are_chosen_whoever_pays(base_dir, tmp_path, pays):
    path = tmp_path / "tasks.jsonl"
    rows = [task | {"prompt": f"{n}?", "answer": "1"} for n, task in enumerate(TASKS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = GRPOArguments([str(path)], [pays], kinds=["sum"], max_level=2)
    chosen, summary = load_data(args, load_chat_tokenizer(base_dir), 60)
    assert [row["prompt"][0]["content"] for row in chosen] == ["0?"]
    assert sum(map(len, summary.dropped.values())) == 3


def test_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match=r"kind \['logik'\]; there are \['logic', 'sum'\]"):
        choose_tasks(TASKS, ["logik"], None, DataSummary())


def test_reward_is_the_metric():
    answers = ["48", "It is 47.", "no", "是的"]
    right, names = ["48", "48", "yes", "是"], ["number", "number", "yes_no", "yes_no"]
    rewards = verifiable_reward(answers, answer=right, verifier=names)
    assert rewards == [1.0, 0.0, 0.0, 1.0]
    assert rewards == [float(verify(*row)) for row in zip(answers, right, names, strict=True)]
    chat = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert verifiable_reward(chat, answer=right, verifier=names) == rewards


def test_an_order_passes_over_all_rows_before_it_repeats_one():
    order = order_prompts([1] * 7, 17, curriculum=False, seed=3)
    assert len(order) == 17 and order == order_prompts([1] * 7, 17, False, 3)
    assert sorted(order[:7]) == sorted(order[7:14]) == list(range(7))
    assert order[:7] != order[7:14] and order != order_prompts([1] * 7, 17, False, 4)
    assert order_prompts([1, 3, 1], 7, curriculum=False, seed=None) == [0, 1, 2, 0, 1, 2, 0]


def test_a_curriculum_opens_a_level_after_the_other():
    levels = [1, 2, 3] * 10
    order = order_prompts(levels, 120, curriculum=True, seed=0)
    seen = [levels[i] for i in order]
    assert len(seen) == 120 and set(seen[:20]) == {1}, "a sixth of the run"
    assert set(seen[20:40]) == {1, 2} and 3 in seen[40:60]
    assert [seen[60:].count(level) for level in (1, 2, 3)] == pytest.approx([20] * 3, abs=7)
    assert order_prompts(levels, 120, curriculum=False, seed=0)[:30].count(2) == 1


def test_the_whole_run_is_laid_out(tmp_path):
    rows = [{"prompt": str(n), "level": 1} for n in range(5)]
    args = make_args(tmp_path, num_train_epochs=3, gradient_accumulation_steps=2)
    data = lay_out_run(rows, args, curriculum=False)  # a rollout: 16 answers, 4 prompts, 1 step
    assert (len(data), args.max_steps, args.shuffle_dataset) == (12, 3, False)
    args = make_args(tmp_path, max_steps=5, num_iterations=2, save_strategy="no")
    assert len(lay_out_run(rows, args, curriculum=False)) == 3 * 2  # of 2 prompts for 2 steps


    args = make_args(tmp_path, max_steps=8, save_steps=0.5, num_iterations=4)
    lay_out_run(rows, args, curriculum=False)  # half of the run: step 4, the end of a rollout
    with pytest.raises(ValueError, match="save_steps=2 would save in the middle of a rollout"):
        lay_out_run(rows, make_args(tmp_path, max_steps=8, save_steps=0.25, num_iterations=4), 0)


@pytest.mark.parametrize(
    ("own", "settings", "message"),
    [
        ({}, {"temperature": 0.0}, "learns from their differences"),
        ({}, {"max_steps": 0}, "max_steps=0 trains nothing"),
        ({}, {"beta": -0.1}, "beta=-0.1 pays for distance"),
        ({}, {"reward_weights": [1.0, 2.0]}, "give one to each of reward_funcs=.'verifier'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tmp_path, own, settings, message):
    check_settings(GRPOArguments(), make_args(tmp_path))
    with pytest.raises(ValueError, match=message):
        check_settings(GRPOArguments(**own), make_args(tmp_path, **settings))


def outcome(level, rewards, cut=False):
    return Outcome(level, rewards, rewards, [cut] * len(rewards))


def test_the_probe_refuses_where_nothing_can_be_learned(tmp_path):
    args = make_args(tmp_path)
    wrong, right, mixed = [0.0] * 4, [1.0] * 4, [0.0, 1.0, 0.0, 0.0]
    check_outcomes([outcome(1, mixed)] + [outcome(1, wrong)] * 19, args)
    for outcomes, advice in (
        ([outcome(1, mixed)] + [outcome(2, wrong)] * 20, "1 of 21.*20 all wrong, 0 .*max_level"),
        ([outcome(1, right)] * 9, "0 of 9 .*0 all wrong, 9 all right.*take harder ones"),
        ([outcome(1, wrong, cut=True)] * 9, r"raise max_completion_length \(6\)"),
    ):
        with pytest.raises(ValueError, match=advice + ".*--probe_prompts 0"):
            check_outcomes(outcomes, args)


def test_the_probe_shows_the_levels(tmp_path):
    outcomes = [outcome(1, [1.0, 0.0, 1.0, 1.0]), outcome(1, [1.0] * 4)]
    outcomes.append(outcome(2, [0.0] * 4, cut=True))
    lines = show_outcomes(outcomes, make_args(tmp_path)).splitlines()
    assert lines[1].split() == "level prompts reward all right all wrong mixed".split()
    assert lines[2].split() == ["1", "2", "0.875", "1", "0", "50%"]
    assert lines[3].split() == ["2", "1", "0.000", "0", "1", "0%"]
    assert lines[4] == "33% of the answers are cut off at 6 tokens"


def test_the_probe_tries_the_levels_evenly():
    rows = [{"level": 1, "n": n} for n in range(90)] + [{"level": 2, "n": n} for n in range(10)]
    chosen = choose_rows(rows, 16, seed=0)
    assert [row["level"] for row in chosen].count(2) == 8
    assert len({(row["level"], row["n"]) for row in chosen}) == 16
    assert chosen != choose_rows(rows, 16, seed=1) and len(choose_rows(rows, 999, 0)) == 100


def test_a_probe_samples_as_the_training_does(base_dir, tmp_path, capsys):
    from trl import ModelConfig

    rows = [{"prompt": [{"role": "user", "content": text}], "answer": "9009", "verifier": "number",
             "level": 1} for text in ("Who are you?", "12 + 30 =")]  # fmt: skip
    args = make_args(tmp_path, reward_weights=[2.0, 1.0])
    tokenizer = load_chat_tokenizer(base_dir)
    model = load_model(ModelConfig(model_name_or_path=str(base_dir)), tokenizer)
    given = []

    def length(completions, completion_ids, prompts, **columns):
        given.append((completions, completion_ids, prompts, columns))
        return [0.5] * len(completion_ids)

    functions = [length, verifiable_reward]
    found = require_mixed_outcomes(model, tokenizer, rows, functions, args, prompts=0)
    assert found == {} and not given, "0 prompts try none"
    with pytest.raises(ValueError, match="0 of 2 prompts"):
        require_mixed_outcomes(model, tokenizer, rows, functions, args, prompts=9)
    ((completions, ids, prompts, columns),) = given
    assert [len(one) for one in (completions, ids, prompts, columns["answer"])] == [8] * 4
    assert prompts[:4] == [rows[0]["prompt"]] * 4 or prompts[:4] == [rows[1]["prompt"]] * 4
    assert all(1 <= len(one) <= 6 for one in ids) and model.training
    ended = [one[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") for one in ids]
    assert f"{1 - sum(ended) / 8:.0%} of the answers are cut off" in capsys.readouterr().out
    random = torch.rand(1)
    torch.manual_seed(args.seed)
    assert random == torch.rand(1), "the probe leaves the random state of the seed"
    model.generation_config.eos_token_id = list(range(len(tokenizer)))  # as TRL: each of them ends
    with pytest.raises(ValueError, match="0 of 2 prompts"):
        require_mixed_outcomes(model, tokenizer, rows, functions, args, prompts=9)
    assert [len(one) for one in given[1][1]] == [1] * 8
    assert "\n0% of the answers are cut off" in capsys.readouterr().out
