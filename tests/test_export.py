"""Exports: what a GGUF file holds, read back by foreign readers; the card; the Hub; merging."""

import argparse
import base64
import http.server
import importlib
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, SENTENCES

import stages
from sft.eval import load_for_generation

gguf = pytest.importorskip("gguf", reason="pip install -r requirements-extras.txt")


@pytest.fixture
def scripts(monkeypatch):
    """Import a module of scripts/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


@pytest.fixture(scope="module")
def llama_dir(tokenizer, tmp_path_factory):
    """A Llama with fewer key heads than heads, untied, and more embedding rows than tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("llama") / "toy-llama"
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False,
        initializer_range=0.3, rope_theta=5000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def gpt2_dir(tokenizer, tiny_config, tmp_path_factory):
    """A GPT-2 whose weights are large enough that greedy answers differ from one another."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("gpt2") / "toy-gpt2"
    model = GPT2LMHeadModel(tiny_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # biases too: they are zero else
    model.generation_config.eos_token_id = [3, 5]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def arguments(directory, to, **changes):
    given = {"type": "f16", "output_dir": None, "repo_id": None, "private": False}
    return argparse.Namespace(directory=str(directory), to=to, **given | changes)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("type_name", ["f32", "q8_0"])
def test_a_gguf_file_reads_back(scripts, request, tmp_path, kind, type_name):
    directory = request.getfixturevalue(f"{kind}_dir")
    export = scripts("export")
    export.main(arguments(directory, "gguf", type=type_name, output_dir=str(tmp_path)))
    name = f"toy-{kind}-{type_name}.gguf"
    parity = json.loads((tmp_path / "parity.json").read_text())[name]
    assert parity["tensors"]["equal"] == parity["tensors"]["of"] == {"gpt2": 28, "llama": 21}[kind]
    assert parity["vocabulary"]["token_ids"]["different"] == []
    # Without a name for our pre-tokenizer, transformers splits as GPT-2 does: " 7" is one piece.
    found = parity["transformers"]
    assert set(found["token_ids"]["different"]) <= {"   7", "\n  42"}
    if type_name == "f32":
        assert parity["tensors"]["max_rounding"] == 0.0
        assert found["max_logit_difference"] < 1e-4
        assert found["greedy"]["equal"] == found["greedy"]["of"]
    else:
        assert 0.0 < parity["tensors"]["max_rounding"] < 0.02
        assert parity["types"]["q8_0"] > 8
    reader = gguf.GGUFReader(tmp_path / name)
    read = {key: reader.get_field(key).contents() for key in reader.fields if "." in key}
    assert read["tokenizer.ggml.pre"] == "smollm" and read["tokenizer.ggml.model"] == "gpt2"
    assert {read["tokenizer.ggml.eos_token_id"], read["tokenizer.ggml.eot_token_id"]} == {3, 5}
    assert read[f"{kind}.context_length"] == {"gpt2": 64, "llama": 128}[kind]
    assert not list(tmp_path.glob("*.partial*"))
    assert "PARAMETER stop" in (tmp_path / "Modelfile").read_text()


def test_a_wrong_layout_does_not_pass(scripts, gpt2_dir, tmp_path, monkeypatch):
    """Square matrices that nobody turned have the right shape: only foreign readers notice."""
    gguf_file, export = scripts("gguf_file"), scripts("export")
    monkeypatch.setattr(gguf_file, "Conv1D", type("Nothing", (), {}))
    with pytest.raises((RuntimeError, ValueError)):
        export.main(arguments(gpt2_dir, "gguf", type="f32", output_dir=str(tmp_path)))
    assert not list(tmp_path.glob("*.gguf"))


def test_llama_rows_are_interleaved_for_ggml(scripts):
    gguf_file = scripts("gguf_file")
    rows = np.arange(8)[:, None]  # two heads of width 4
    assert gguf_file.interleave_halves(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_rows_that_fill_no_block_are_not_quantised(scripts):
    gguf_file = scripts("gguf_file")
    assert gguf_file.choose_type("blk.0.ffn_up", np.zeros((4, 48)), "q8_0").name == "F16"
    assert gguf_file.choose_type("blk.0.ffn_up", np.zeros((4, 64)), "q8_0").name == "Q8_0"
    assert gguf_file.choose_type("position_embd", np.zeros((4, 64)), "q8_0").name == "F32"


def test_the_template_renders_the_same_without_generation_marks(scripts, tokenizer):
    gguf_file = scripts("gguf_file")
    plain = gguf_file.without_generation_marks(tokenizer.chat_template)
    assert "generation %}" not in plain and "generation -%}" not in plain
    turns = [{"role": "system", "content": " s "}, {"role": "user", "content": "u\n"},
             {"role": "assistant", "content": "  a"}, {"role": "user", "content": "?"}]  # fmt: skip
    for more in (True, False):
        expected, found = (
            tokenizer.apply_chat_template(
                turns, chat_template=template, tokenize=False, add_generation_prompt=more
            )
            for template in (tokenizer.chat_template, plain)
        )
        assert expected == found


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("normalizer", "NFC", "rewrites text"),
        ("pre_tokenizer", "Whitespace", "no name in llama.cpp"),
        ("decoder", "Metaspace", "byte-level BPE"),
    ],
)
def test_a_tokenizer_that_would_make_other_ids_is_refused(
    scripts, tokenizer, part, value, message
):
    import copy

    import tokenizers

    other = copy.deepcopy(tokenizer)
    module = getattr(tokenizers, f"{part}s")
    setattr(other.backend_tokenizer, part, getattr(module, value)())
    with pytest.raises(ValueError, match=message):
        scripts("gguf_file").describe_vocabulary(other, 512)


def test_an_option_that_gguf_does_not_know_is_refused(scripts, tiny_config):
    import copy

    config = copy.deepcopy(tiny_config)
    config.activation_function = "relu"
    with pytest.raises(ValueError, match="activation_function='relu'"):
        scripts("gguf_file").check_supported(config)


def give_records(directory, **extra):
    record = {
        "finished": True, "stage": "sft", "command": "python -m sft.train --config a.yaml",
        "fingerprint": {"inputs": {}, "data": {"data/my|rows.jsonl": "d" * 64}}, "seed": 42,
        "versions": {"torch": "2.13.0"}, "git_commit": "c" * 40, "wall_time_s": 61.0,
        "hardware": {"cpu": "toy", "cores": 2}, "outputs": stages.hash_outputs(directory),
    }  # fmt: skip
    stages.write_json(directory / "run.json", record | extra)
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 58, "unit": "share"}
    stages.write_json(directory / "eval.json", {"fact_accuracy": metric})
    row = {"prompt": [{"role": "user", "content": "Colour?"}], "answer": "<script>x</script> | y"}
    row |= {"reference": "red", "right": False, "source": "fact", "lang": "en", "kind": "a"}
    (directory / "answers.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def model_dir(gpt2_dir, tmp_path):
    import shutil

    directory = shutil.copytree(gpt2_dir, tmp_path / "my" / "sft")
    (directory / "training_args.bin").write_bytes(b"a pickle")
    give_records(directory)
    return directory


def test_the_card_says_what_the_records_say(scripts, model_dir):
    card = scripts("model_card").write_card(model_dir, "me/toy", ["toy-f16.gguf"])
    assert "fact\\_accuracy | 50.0 % [40.0, 60.0] | 58 |" in card
    assert "| sft | `python -m sft.train --config a.yaml` | 42 | cccccccccccc | 1 min" in card
    assert "| `data/my|rows.jsonl` | sft | dddddddddddd |" in card
    assert "<script>" not in card and "&lt;script&gt;x&lt;/script&gt; \\| y | red | no |" in card
    assert 'from_pretrained("me/toy")' in card and "`toy-f16.gguf`" in card
    from huggingface_hub import ModelCard

    data = ModelCard(card).data
    assert data.language == ["en"] and data.pipeline_tag == "text-generation"
    assert data.eval_results[0].metric_value == 0.5


def test_the_card_of_a_foreign_directory_invents_nothing(scripts, llama_dir):
    card = scripts("model_card").write_card(llama_dir, "toy")
    for words in ("Not evaluated", "None were recorded", "the directory has no `run.json`"):
        assert words in card


def test_lineage_says_when_an_input_was_made_anew(scripts, model_dir):
    base = model_dir.parent / "pretrain"
    base.mkdir()
    (base / "config.json").write_text("{}")
    give_records(base, stage="pretrain")
    inputs = {"output/elsewhere/pretrain": {"config.json": "0" * 64}}
    give_records(model_dir, fingerprint={"inputs": inputs, "data": {}})
    card = scripts("model_card").write_card(model_dir, "toy")
    assert card.index("| pretrain | `python") < card.index("| sft | `python")
    assert "Since sft ran, its input was made anew: pretrain." in card


def test_branches_have_their_place_in_the_lineage(scripts, model_dir):
    adapter, merged = model_dir / "adapter", model_dir / "export" / "adapter"
    adapter.mkdir()  # a part of its stage
    (adapter / "adapter_config.json").write_text("{}")
    merged.mkdir(parents=True)
    for stage in ("merge", "classifier"):
        inputs = {str(adapter): stages.hash_outputs(adapter)}
        give_records(merged, stage=stage, fingerprint={"inputs": inputs, "data": {}})
        steps = scripts("model_card").trace(merged)
        assert [step["stage"] for step in steps] == ["sft", stage]
        assert not any(step["changed"] for step in steps)
    inputs = {"output/elsewhere/adapter": {"adapter_model.safetensors": "0" * 64}}
    give_records(merged, stage="merge", fingerprint={"inputs": inputs, "data": {}})
    assert [step["changed"] for step in scripts("model_card").trace(merged)] == [[]]


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The requests of a push, as huggingface.co answers them; every file is small."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        home = f"http://{self.headers['Host']}/me/toy"
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            answer = {"files": files}
        elif self.path.endswith("/commit/main"):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.files[entry["value"]["path"]] = content
            answer = {"commitUrl": f"{home}/commit/1", "commitOid": "1", "success": True}
        elif self.path == "/api/validate-yaml":
            answer = {"warnings": [], "errors": []}
        else:
            assert self.path == "/api/repos/create"
            self.server.created = json.loads(body)
            answer = {"url": home, "name": "me/toy", "id": "me/toy"}
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *words):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.files, server.created = {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_pushing_sends_the_model_and_its_card_and_no_pickle(hub, model_dir):
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    command = [sys.executable, "scripts/export.py", str(model_dir), "--to", "hub"]
    command += ["--repo_id", "me/toy", "--private"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.created["visibility"] == "private"
    weights = (model_dir / "model.safetensors").read_bytes()
    assert hub.files["model.safetensors"] == weights
    assert b"fact\\_accuracy" in hub.files["README.md"]
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "run.json"} <= hub.files.keys()
    assert not [name for name in hub.files if name.endswith(".bin")]
    local = model_dir.parent / "export" / "sft" / "README.md"
    assert local.read_bytes() == hub.files["README.md"]


@pytest.mark.parametrize("offline", ["1", "0"])
def test_a_hub_that_is_not_there_is_a_sentence(model_dir, offline):
    environment = os.environ | {"HF_HUB_OFFLINE": offline, "HF_ENDPOINT": "http://127.0.0.1:9",
                                "HF_TOKEN": "hf_test"}  # fmt: skip
    command = [sys.executable, "scripts/export.py", model_dir, "--to", "hub", "--repo_id", "me/toy"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    card = model_dir.parent / "export" / "sft" / "README.md"
    assert done.returncode == 1 and card.is_file() and "Traceback" not in done.stderr
    assert "pushed to me/toy" in done.stderr and f"same: {card}. Log in with" in done.stderr


def test_an_adapter_alone_becomes_a_plain_directory(scripts, gpt2_dir, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    export = scripts("export")
    with pytest.raises(ValueError, match="is LoRA adapter|merge it first"):
        export.main(arguments(tmp_path / "adapter", "gguf"))
    export.main(arguments(tmp_path / "adapter", "merged"))
    merged = AutoModelForCausalLM.from_pretrained(place := tmp_path / "export" / "adapter")
    ids = tokenizer(SENTENCES[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=0)
    command = f"python -m sft.merge {tmp_path}/adapter --base {gpt2_dir} --output_dir {place}"
    assert stages.read_json(place / "run.json")["command"] == command
    assert f"| merge | `{command}` |" in (place / "README.md").read_text()
    for to in ("card", "gguf"):
        export.main(arguments(place, to, output_dir=str(tmp_path / "again")))
    assert f"`{command}`" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [("hub", {}, "--repo_id"), ("merged", {}, "takes an adapter")],
)
def test_a_wrong_command_is_told_what_to_do(scripts, model_dir, to, changes, message):
    with pytest.raises(ValueError, match=message):
        scripts("export").main(arguments(model_dir, to, **changes))


def test_what_is_no_model_is_refused_before_anything_is_made(scripts, model_dir, monkeypatch):
    export, recipe = scripts("export"), model_dir.parent
    monkeypatch.chdir(recipe)
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        export.main(arguments(recipe, "card"))
    with pytest.raises(FileNotFoundError, match="hf download me/toy"):
        export.main(arguments("me/toy", "card"))
    assert not list(recipe.parent.rglob("export"))


def test_a_reward_model_gets_a_card_of_its_own_and_no_server(
    scripts, gpt2_dir, tokenizer, tmp_path, capsys
):
    from transformers import GPT2ForSequenceClassification

    directory = tmp_path / "reward"
    GPT2ForSequenceClassification.from_pretrained(gpt2_dir, num_labels=1).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    export = scripts("export")
    for to in ("gguf", "hub"):
        with pytest.raises(ValueError, match="a GPT2ForSequenceClassification.*rlhf.judge"):
            export.main(arguments(directory, to, repo_id="me/toy"))
    assert not (tmp_path / "export").exists()
    with pytest.raises(ValueError, match="scores texts and writes none"):
        load_for_generation(str(directory))
    export.main(arguments(directory, "card"))
    card = (tmp_path / "export" / "reward" / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and ").logits)" in card
    assert "CausalLM" not in card and "serve" not in card + capsys.readouterr().out


@pytest.mark.slow
def test_llama_cpp_reads_the_same(gpt2_dir, llama_dir, tmp_path):
    """Builds llama.cpp (about 6 minutes on 2 cores) into a directory of its own."""
    place = tmp_path / "llama_cpp"
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place), "--no-deps"]
    subprocess.run([*install, "llama-cpp-python>=0.3.16,<0.4", "diskcache"], check=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(place)])}
    for directory in (gpt2_dir, llama_dir):
        for type_name in ("f16", "q8_0"):
            command = [sys.executable, "scripts/export.py", str(directory), "--to", "gguf"]
            command += ["--type", type_name, "--output_dir", str(tmp_path)]
            subprocess.run(command, cwd=ROOT, env=environment, check=True)
            name = f"{directory.name}-{type_name}.gguf"
            found = json.loads((tmp_path / "parity.json").read_text())[name]["llama_cpp"]
            assert found["token_ids"]["different"] == [], name
            if type_name == "f16":
                assert found["greedy"]["different"] == [], name
