"""lm-evaluation-harness on a directory: its numbers against log-likelihoods computed here."""

import json
import runpy
import shutil

import pytest
import torch
from conftest import ROOT, load_script
from transformers import AutoTokenizer

import stages
from sft.rendering import encode_prompt

pytest.importorskip("lm_eval", reason="pip install -r requirements-extras.txt")


@pytest.fixture(scope="module")
def harness():
    return load_script("harness")


PAIRS = [("The river runs.", "The river run."), ("Who are you?", "Who is you?"), ("a b", "b a")]
CHOICES = {"query": "Question: 12 + 30", "choices": ["42", "the river runs past the mill", "mill"]}


def write_tasks(folder, golds):
    pairs = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS]
    questions = [CHOICES | {"gold": gold} for gold in golds]
    for name, rows in (("pairs", pairs), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / "pairs.jsonl", folder / "questions.jsonl"]


def logp(model, tokenizer, context, text):
    """Log-probability of `text` behind <bos> and `context`."""
    before = [tokenizer.bos_token_id] + tokenizer(context)["input_ids"]
    ids = [tokenizer.bos_token_id] + tokenizer(context + text)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, ids[i]].item() for i in range(len(before), len(ids)))


def test_local_files_give_the_numbers_of_plain_likelihoods(
    harness, base_dir, tmp_path, monkeypatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(base_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record = {"finished": True, "stage": "pretrain", "outputs": stages.hash_outputs(directory)}
    stages.write_json(directory / "run.json", record)
    scores = [logp(model, tokenizer, CHOICES["query"] + "\nAnswer:", " " + choice)
              for choice in CHOICES["choices"]]  # fmt: skip
    a_letter = [score / len(c) for score, c in zip(scores, CHOICES["choices"], strict=True)]
    best = {"acc": scores.index(max(scores)), "acc_norm": a_letter.index(max(a_letter))}
    golds = [best["acc"], best["acc"], best["acc_norm"], (best["acc"] + 1) % 3]
    files = [str(path) for path in write_tasks(tmp_path, golds)]
    args = {"directory": str(directory), "files": files, "tasks": [], "limit": None}
    args |= {"num_fewshot": 0, "batch_size": 4, "apply_chat_template": False}
    harness.main(type("Arguments", (), args))
    found = stages.read_json(directory / "eval.json")
    right = sum(logp(model, tokenizer, "", a) > logp(model, tokenizer, "", b) for a, b in PAIRS)
    assert found["harness/pairs/acc"]["value"] == pytest.approx(right / 3, abs=1e-5)
    for name, said in best.items():
        metric = found[f"harness/questions/{name}"]
        assert metric["value"] == pytest.approx(golds.count(said) / 4, abs=1e-5)
        assert metric["n"] == 4 and metric["unit"] == "share" and metric["low"] < metric["high"]


def test_bos_stands_before_plain_texts_of_our_models_only(harness, base_dir, tmp_path):
    from lm_eval.models.huggingface import HFLM

    def encode(text, chat=False):
        given = harness.choose_model_args(str(directory), chat)
        return HFLM(**given, device="cpu").tok_encode(text)

    directory = shutil.copytree(base_dir, tmp_path / "model")
    plain = encode("The mill.")  # somebody else's
    (directory / "run.json").write_text("{}")
    assert encode("The mill.") == [2, *plain] and 2 not in plain
    tokenizer = AutoTokenizer.from_pretrained(directory)
    turn = [{"role": "user", "content": "Hi"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    assert encode(asked, chat=True) == encode_prompt(turn, tokenizer)


def test_a_file_of_another_layout_is_refused(harness, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(ValueError, match=r"x.jsonl:1: the row has \['question'\]; a task needs"):
        harness.describe_task(tmp_path / "x.jsonl")
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        harness.describe_task(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["gone", "--tasks", "x"], "gone does not exist"), (["{base}"], "name --tasks"),
     (["{base}", "--tasks", "nope"], "--tasks nope: no such task"),
     (["{base}", "--files", "{text}"], "a.txt:1: 'Hello.' is no JSON object")],
)  # fmt: skip
def test_a_wrong_command_ends_in_a_sentence(base_dir, tmp_path, monkeypatch, words, message):
    (tmp_path / "a.txt").write_text("Hello.")
    words = [word.format(base=base_dir, text=tmp_path / "a.txt") for word in words]
    monkeypatch.setattr("sys.argv", ["harness.py", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts/harness.py"), run_name="__main__")
    assert message in ended.value.code


def test_intervals_come_from_the_standard_error(harness):
    results = {"results": {"arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1,
                                   "word_perplexity,none": 20.0,
                                   "word_perplexity_stderr,none": "N/A"}},
               "n-samples": {"arc": {"original": 90, "effective": 25}}}  # fmt: skip
    found = harness.read_results(results)
    assert found["harness/arc/acc"] == {
        "value": 0.5, "low": pytest.approx(0.304), "high": pytest.approx(0.696), "n": 25,
        "unit": "share",
    }  # fmt: skip
    assert found["harness/arc/word_perplexity"]["low"] is None
