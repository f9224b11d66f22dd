"""Held-out numbers: sliding windows against a plain loop, bounded memory, BLEU, ROUGE, pass@k."""

import copy
import json
import math
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from conftest import read_lines
from transformers import AutoModelForCausalLM

import comparison
import stages
from pretrain import eval as held_out
from pretrain.modeling_gpt import GPT2LMHeadModel
from sft.eval import (
    EvalArguments,
    add_previous,
    estimate_pass_at,
    evaluate_chat,
    main,
    read_eval_config,
)
from sft.overlap import Words, measure_corpora, score_rouge
from sft.train import load_chat_tokenizer
from tokenizer.corpus import read_documents

LONG = "The river runs past the mill. 小河流过磨坊。12 + 30 = 42. " * 12


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(1)
    model = GPT2LMHeadModel(tiny_config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # far from uniform: a wrong context changes the loss
    return model


def plain_nats(model, tokenizer, text, context=64):
    """The definition, a token at a time: the window ends at a multiple of half a context."""
    ids = [tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False)["input_ids"]
    total = 0.0
    for position in range(1, len(ids)):
        end = context
        while end <= position:
            end += context // 2
        end = min(end, len(ids))
        start = max(end - context, 0)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[start:position]])).logits[0, -1]
        total -= logits.log_softmax(-1)[ids[position]].item()
    return total, len(ids) - 1


def test_long_texts_are_read_through_a_sliding_window(model, tokenizer):
    texts = [LONG, "Who are you?", "x", LONG[:300]]
    scored = held_out.score_documents(model, tokenizer, iter(texts))
    for text, document in zip(texts, scored, strict=True):
        nats, tokens = plain_nats(model, tokenizer, text)
        row = document.to_row()
        assert row["tokens"] == tokens and row["bytes"] == len(text.encode())
        assert row["nats"] == pytest.approx(nats, rel=1e-3)
    assert len(scored[0].pieces) == 1, "no more than one where the text is not that long"
    metrics = held_out.summarize(scored)
    total, count = (sum(document.to_row()[k] for document in scored) for k in ("nats", "tokens"))
    size = sum(len(text.encode()) for text in texts)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(total / math.log(2) / size, rel=1e-4)
    assert metrics["perplexity"]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert metrics["perplexity"]["unit"] == "per token"


def test_pieces_and_chunks_change_nothing(model, tokenizer, monkeypatch):
    whole = held_out.score_documents(model, tokenizer, [LONG, "Hi"])[0].to_row()
    monkeypatch.setattr(held_out, "LOGITS_AT_ONCE", model.config.vocab_size * 5)
    monkeypatch.setattr(held_out, "TOKENS_AT_ONCE", 100)
    monkeypatch.setattr(held_out, "TOKENS_SORTED", 150)
    cut = held_out.score_documents(model, tokenizer, [LONG, "Hi"])[0].to_row()
    assert cut["nats"] == pytest.approx(whole["nats"], rel=1e-5)
    assert cut["tokens"] == whole["tokens"]
    monkeypatch.setattr(held_out, "CUT", 50)
    parts = list(held_out.cut_text(LONG))
    assert "".join(parts) == LONG and max(map(len, parts)) <= 50
    assert all(part[0] in " \n" for part in parts[1:])


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_piece_has_the_nats_of_the_tokens_that_begin_in_it(
    model, tokenizer, monkeypatch, is_fast
):
    monkeypatch.setattr(held_out, "PIECE", 37)
    monkeypatch.setattr(held_out, "CUT", 50)
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: is_fast))
    text = "小河 flows past the old mill, 1234 步。 " * 4
    (document,) = held_out.score_documents(model, tokenizer, [text])
    sizes = [len(text[i : i + 37].encode()) for i in range(0, len(text), 37)]
    assert [piece.size for piece in document.pieces] == sizes
    row = document.to_row()
    assert row["tokens"] == len(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert row["pieces"] == [[round(p.nats, 4), p.size] for p in document.pieces]
    if is_fast:  # the beginning of a text up to a piece's end holds the same tokens
        ends = range(37, len(text), 37)
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [begin for begin, _ in offsets["offset_mapping"]]
        counts = [sum(start < end for start in starts) for end in (*ends, len(text))]
        done = 0
        for piece, count in zip(document.pieces, counts, strict=True):
            done += piece.tokens
            assert done == count


def test_two_runs_are_compared_on_one_long_text(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "PIECE", 100)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(3)
    for name, scored in (("a", model), ("b", other)):
        (tmp_path / name).mkdir()
        held_out.evaluate_language_model(scored, tokenizer, [LONG], tmp_path / name)
    (found,) = comparison.compare_directories(tmp_path / "a", tmp_path / "b")
    assert found.metric == "bits_per_byte" and found.n == math.ceil(len(LONG) / 100)
    (row,) = read_lines(tmp_path / "b" / "texts.jsonl")
    assert found.b == pytest.approx(row["nats"] / math.log(2) / row["bytes"], rel=1e-4)
    assert found.low < found.difference < found.high


def test_no_forward_pass_and_no_logits_are_larger_than_said(model, tokenizer, monkeypatch):
    monkeypatch.setattr(held_out, "LOGITS_AT_ONCE", model.config.vocab_size * 5)
    monkeypatch.setattr(held_out, "TOKENS_AT_ONCE", 128)
    rows, passes = [], []
    hooks = [
        model.lm_head.register_forward_hook(lambda m, i, out: rows.append(out.shape[:-1].numel())),
        model.transformer.register_forward_pre_hook(
            lambda m, a, kw: passes.append(kw["input_ids"].numel()), with_kwargs=True
        ),
    ]
    held_out.score_documents(model, tokenizer, [LONG] * 3)
    for hook in hooks:
        hook.remove()
    assert max(rows) == 5 and max(passes) <= 128


class Capped(GPT2LMHeadModel):
    """Caps its logits behind the head, as Gemma 2 does."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output


def test_a_model_that_changes_its_logits_is_asked_for_them(model, tokenizer, tiny_config):
    capped = Capped(tiny_config).eval()
    capped.load_state_dict(model.state_dict())
    assert held_out.find_plain_head(model, 2) is model.lm_head
    assert held_out.find_plain_head(capped, 2) is None
    row = held_out.score_documents(capped, tokenizer, [LONG[:200]])[0].to_row()
    assert row["nats"] == pytest.approx(plain_nats(capped, tokenizer, LONG[:200])[0], rel=1e-3)


def test_files_are_read_no_further_than_max_rows(base_dir, tmp_path):
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps({"text": f"The river {i}."}) for i in range(3)]
    path.write_text("\n".join([*lines, "this line is no JSON"]))
    tokenizer = load_chat_tokenizer(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    args = EvalArguments(text_files=[str(path)], max_rows=3)
    metrics, answers = evaluate_chat(model, tokenizer, args, tmp_path)
    assert answers == [] and metrics["bits_per_byte"]["n"] == 3
    rows = read_lines(tmp_path / "texts.jsonl")
    assert [row["text"] for row in rows] == [f"The river {i}." for i in range(3)]
    with pytest.raises(ValueError, match="malformed JSON"):
        list(read_documents([str(path)]))


@pytest.mark.parametrize("samples", [0, 2])
def test_a_measurement_takes_none_of_a_trainings_random_numbers(base_dir, tmp_path, samples):
    task = {"prompt": "17+25=?", "answer": "42"}
    (tmp_path / "tasks.jsonl").write_text(json.dumps(task))
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    args = EvalArguments(
        task_files=[str(tmp_path / "tasks.jsonl")], max_new_tokens=4, samples=samples
    )
    torch.manual_seed(5)
    before = torch.get_rng_state()
    _, (answer,) = evaluate_chat(model, load_chat_tokenizer(base_dir), args)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(answer.get("samples", [])) == samples


def test_rouge_reads_chinese_by_character():
    assert Words().tokenize("GPT-2 走过 the Mill's 桥。") == [
        "gpt", "2", "走", "过", "the", "mill", "s", "桥",
    ]  # fmt: skip
    chinese, english, none = score_rouge([("小河边", "小河流"), ("the mill", "A mill!"), ("", "x")])
    assert chinese["rouge1"] == pytest.approx(2 / 3) and chinese["rouge2"] == pytest.approx(1 / 2)
    assert english["rougeL"] == pytest.approx(1 / 2) and none["rougeL"] == 0


def test_bleu_of_answers_that_are_nearly_all_wrong():
    wrong = {"answer": "", "reference": "a b c d", "lang": "en"}
    metrics = measure_corpora([wrong] * 7 + [wrong | {"answer": "a b c d"}])
    for name in ("bleu/en", "chrf/en"):
        assert 0 == metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"] < 100


def test_bleu_is_sacrebleus_with_its_signature():
    row = {"answer": "小河流过磨坊。", "reference": "小河流过磨坊。", "lang": "zh"}
    other = {"answer": "the mill by the river", "reference": "by the river", "lang": "en"}
    metrics = measure_corpora([row, row | {"answer": "小河。"}, other])
    assert set(metrics) == {"bleu/zh", "chrf/zh", "bleu/en", "chrf/en"}
    bounds = [metric[end] for metric in metrics.values() for end in ("value", "low", "high")]
    assert {type(bound) for bound in bounds} == {float}  # numpy's would not survive JSON
    assert "tok:zh" in metrics["bleu/zh"]["signature"]
    assert "tok:13a" in metrics["bleu/en"]["signature"]
    whole = measure_corpora([row])["bleu/zh"]
    assert whole["value"] == pytest.approx(100) and whole["n"] == 1
    # One of two answers is 3 characters for 7: precisions near 1, brevity exp(1 - 14 / 10).
    assert metrics["bleu/zh"]["value"] == pytest.approx(100 * math.exp(1 - 14 / 10), abs=8)
    assert 0 <= metrics["bleu/zh"]["low"] <= metrics["bleu/zh"]["value"] <= 100


def test_pass_at_k_is_the_share_of_lucky_draws():
    from itertools import combinations

    n, right = 6, 2
    for k in (1, 2, 5, 6):
        draws = list(combinations(range(n), k))
        lucky = sum(any(i < right for i in draw) for draw in draws) / len(draws)
        assert estimate_pass_at(k, n, right) == pytest.approx(lucky)
    assert estimate_pass_at(2, 4, 0) == 0.0 and estimate_pass_at(1, 4, 4) == 1.0


@pytest.fixture
def two_models(base_dir, tmp_path, tiny_config):
    """Two stages, of which the second started from the first; and the data to measure them on."""
    tokenizer = load_chat_tokenizer(base_dir)
    names = [tmp_path / "sft", tmp_path / "dpo"]
    for seed, directory in enumerate(names):
        torch.manual_seed(seed)
        GPT2LMHeadModel(tiny_config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    roles = {"user": "你是谁？", "assistant": "我是天梯。"}
    turns = [{"role": role, "content": text} for role, text in roles.items()]
    chat = {"messages": turns, "kind": "who"}
    task = {"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2", "verifier": "number"}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat))
    (tmp_path / "task.jsonl").write_text(json.dumps(task))
    args = EvalArguments([str(tmp_path / "chat.jsonl")], task_files=[str(tmp_path / "task.jsonl")],
                         max_new_tokens=6, samples=3, temperature=1.0)  # fmt: skip
    return names, args


def test_answers_stand_beside_the_reference_and_the_answer_before(two_models, capsys):
    (sft, dpo), args = two_models
    stages.write_json(dpo / "eval.json", {"kept": {"value": 1}, "length": {"value": -1}})
    main([str(sft), str(dpo)], args)
    before, after = (read_lines(path / "answers.jsonl") for path in (sft, dpo))
    assert [row["reference"] for row in after] == ["我是天梯。", "2"]
    assert [row["previous"] for row in after] == [row["answer"] for row in before]
    assert "previous" not in before[0]
    assert [len(row.get("samples", [])) for row in after] == [0, 3]
    numbers = stages.read_json(dpo / "eval.json")
    assert numbers["kept"] == {"value": 1} and numbers["length"]["value"] > 0
    assert {"pass@1", "pass@2", "pass@3", "rougeL/zh", "bleu/zh", "chrf/zh"} <= set(numbers)
    assert numbers["length"]["value"] == sum(row["scores"]["length"] for row in after) / 2
    assert f"{dpo} -> {dpo}/eval.json" in capsys.readouterr().out


def test_other_questions_do_not_replace_a_stages_numbers(two_models, tmp_path):
    (sft, _), args = two_models
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"chat_files: {args.chat_files[0]}\ntask_files: {args.task_files[0]}\nmax_new_tokens: 6\n"
    )
    record = {"finished": True, "stage": "sft", "outputs": stages.hash_outputs(sft)}
    record |= {"arguments": {"eval_config": str(config)}}
    stages.write_json(sft / "run.json", record)
    main([str(sft)], args)  # the same, and samples besides
    own = (sft / "answers.jsonl").read_bytes()
    for changes in ({"max_rows": 5}, {"max_new_tokens": 5}, {"chat_files": []}):
        with pytest.raises(ValueError, match=r"numbers of its own stage.*--output_dir"):
            main([str(sft)], replace(args, **changes))
    assert (sft / "answers.jsonl").read_bytes() == own
    main([str(sft)], replace(args, chat_files=[], output_dir=str(tmp_path / "mine")))
    assert len(read_lines(tmp_path / "mine/sft/answers.jsonl")) == 1
    stages.write_json(sft / "run.json", record | {"stage": "pretrain", "arguments": {}})
    with pytest.raises(ValueError, match="eval_config=None"):
        main([str(sft)], args)


def test_a_base_model_without_answers_is_asked_once_a_kind(two_models, base_dir):
    (sft, _), args = two_models
    tokenizer = load_chat_tokenizer(base_dir)
    turn = [{"role": "user", "content": "Who are you?"}]
    rows = [{"prompt": turn, "source": "chat", "lang": "en", "kind": "who"},
            {"prompt": [*turn, *turn], "source": "chat", "lang": "en", "kind": "who"}]  # fmt: skip
    add_previous(rows, str(sft), tokenizer, args)
    assert "previous" in rows[0] and "previous" not in rows[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["gone"], "gone does not exist"), (["{sft}", "--bad", "1"], "unknown key"), ([], 2),
     (["{sft}"], "nothing to measure"), (["--help"], 0)],
)  # fmt: skip
def test_a_wrong_command_ends_in_a_sentence(two_models, monkeypatch, capsys, words, message):
    words = [word.format(sft=two_models[0][0]) for word in words]
    monkeypatch.setattr("sys.argv", ["eval.py", *words])
    monkeypatch.delitem(sys.modules, "sft.eval")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sft.eval", run_name="__main__")
    said = ended.value.code
    assert said == message if isinstance(message, int) else message in said
    if words == ["--help"]:
        assert "sft.eval DIRECTORY" in (shown := capsys.readouterr().out) and "--max_rows" in shown


def test_an_eval_config_is_checked_before_the_training(tmp_path):
    path = tmp_path / "eval.yaml"
    with pytest.raises(FileNotFoundError, match=r"eval\.yaml: no such file"):
        read_eval_config(str(path))
    path.write_text(f"task_files: {tmp_path}/tasks.jsonl\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"tasks\.jsonl"):
        read_eval_config(str(path))
    assert read_eval_config(None) is None
