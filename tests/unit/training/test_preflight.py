"""What the dry run, `slurm submit`, `compare --list` and training see before anything starts."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_lmpo.compare import main as compare
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.data import first_look
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import UserError
from nemo_lmpo.slurm.submit import Submission, check
from nemo_lmpo.train import main
from nemo_lmpo.training.preflight import preflight

GOOD = {"prompt": "sort b a", "chosen": "a b", "rejected": "b a"}
# What the audit found to pass as valid and to be refused by the start, and more of its kind.
BAD = {
    "no_data": ("data.train.path=null", "data.train.path is not set"),
    "no_file": ("data.train.path=nowhere.jsonl", "nowhere.jsonl does not exist"),
    "one_of_two": ("data.train.path=[good.jsonl,nowhere.jsonl]", "nowhere.jsonl does not exist"),
    "no_validation_file": ("data.validation.path=nowhere.jsonl", "nowhere.jsonl does not exist"),
    "empty_file": ("data.train.path=empty.jsonl", "empty.jsonl is empty"),
    "kind": ("data.train.path=good.txt", "good.txt has an unknown ending"),
    "number": ("data.train.path=-1", "-1 does not exist"),
    "builtin": ("data.train.path=builtin:nothing", "builtin:nothing"),
    "split": ("data.train.split=nothing", "nothing"),
    "schema": ("data.train.schema=hh", "builtin:tiny row 1"),
    "row": ("data.train.path=bad.jsonl", "bad.jsonl line 2: the field 'rejected' is missing"),
    "template": ("data.chat_template=nowhere.jinja", "data.chat_template=nowhere.jinja"),
    "template_that_breaks": ("data.chat_template=broken.jinja", "data.chat_template"),
    "template_that_refuses_rows": ("data.chat_template=strict.jinja", "good.jsonl line 1: the chat template refuses"),
    "tokenizer": ("model.tokenizer=builtin:nothing", "model.tokenizer=builtin:nothing"),
    "model": ("model.restore_from_path=./nowhere", "model.restore_from_path: ./nowhere"),
    "vocabulary": ("model.architecture.vocab_size=8", "vocab_size"),
    "directory": ("run_dir=good.txt", "run_dir=good.txt is a file"),
}


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n" + json.dumps({"prompt": "x", "chosen": "y"}) + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    (tmp_path / "strict.jinja").write_text(
        "{% for m in messages %}{% if 'sort' in m.content %}{{ raise_exception('no sorting') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )


@pytest.mark.parametrize("case", BAD)
def test_a_dry_run_refuses_what_a_start_would(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    override, expected = BAD[case]
    more = {"model": ["model.architecture=null"], "template_that_refuses_rows": ["data.train.path=good.jsonl"]}
    extra = more.get(case, [])
    assert main(["--config-name", "lmpo_tiny", "dry_run=true", override, *extra]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in line


def test_bad_rows_are_not_looked_for_where_they_are_skipped() -> None:
    config = load_recipe("lmpo_tiny", ["data.train.path=bad.jsonl", "data.on_bad_row=skip"])
    assert preflight(config, 1, fetch=False).unseen == ()


def test_data_of_which_no_row_is_usable_is_refused_where_bad_rows_are_skipped() -> None:
    Path("bad.jsonl").write_text(json.dumps({"prompt": "x", "chosen": "y"}) + "\n" * 40)
    config = load_recipe("lmpo_tiny", ["data.train.path=bad.jsonl", "data.on_bad_row=skip"])
    with pytest.raises(UserError, match=r"bad.jsonl has no usable row \(the first: 1 missing field; "):
        preflight(config, 1, fetch=False)


def test_data_without_a_usable_row_is_not_valid_however_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_look, "MOST_SKIPPED", 20)
    Path("long.jsonl").write_text((json.dumps({"question": "x", "best": "y", "worst": "z"}) + "\n") * 30)
    config = load_recipe("lmpo_tiny", ["data.train.path=long.jsonl", "data.on_bad_row=skip"])
    with pytest.raises(UserError, match=r"no usable row among its first 20 .*columns={prompt: question, chosen: best"):
        preflight(config, 1, fetch=False)
    columns = "data.train.columns={prompt: question, chosen: best, rejected: worst}"
    config = load_recipe("lmpo_tiny", ["data.train.path=long.jsonl", columns])
    assert preflight(config, 1, fetch=False).unseen == ()


def test_a_usable_row_behind_many_bad_ones_suffices() -> None:
    bad = json.dumps({"prompt": "x", "chosen": "y"}) + "\n"
    Path("bad.jsonl").write_text(bad * 40 + json.dumps(GOOD) + "\n")
    config = load_recipe("lmpo_tiny", ["data.train.path=bad.jsonl", "data.on_bad_row=skip"])
    assert "    16  unusable: missing field" in preflight(config, 1, fetch=False).rows


def test_the_dry_run_shows_what_the_template_does_with_the_first_rows(capsys: pytest.CaptureFixture[str]) -> None:
    calls = [{"role": "assistant", "content": "a b", "tool_calls": [{"name": "f"}]}]
    rows = [{**GOOD, "chosen": calls}] * 3 + [{**GOOD, "score": 1, "id": "x"}] + [GOOD] * 20
    Path("calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("thinks.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant> <think> {% endif %}"
    )
    overrides = ["data.train.path=calls.jsonl", "data.validation.path=null", "data.chat_template=thinks.jinja"]
    assert main(["--config-name", "lmpo_tiny", "dry_run=true", *overrides]) == 0
    shown = capsys.readouterr().out
    assert (
        "  calls.jsonl: of the first 16 rows\n"
        "    16  generation starts with '<think> ', training does not\n"
        "     3  lose `tool_calls`\n"
        "    columns that nothing uses: score\n"
    ) in shown
    with pytest.raises(UserError, match=r"calls.jsonl line 1: `tool_calls`: not in what is trained"):
        preflight(load_recipe("lmpo_tiny", [*overrides, "data.on_unused_fields=error"]), 1, fetch=False)


def test_a_template_file_that_is_not_there_is_refused_where_the_tokenizer_is_not_here() -> None:
    config = load_recipe("lmpo_llama3_8b", ["data.chat_template=nowhere.jinja"])
    with pytest.raises(UserError, match=r"nowhere\.jinja is neither a readable file"):
        preflight(config, 4, fetch=False)


def test_hub_names_are_not_fetched_and_said_to_be_unseen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config-name", "lmpo_llama3_8b", "dry_run=true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "Not looked at, as they are not on this machine: princeton-nlp/llama3-ultrafeedback, "
        "meta-llama/Meta-Llama-3-8B-Instruct."
    )


def test_names_with_dots_are_hub_names_too() -> None:
    config = load_recipe("lmpo_tiny", ["data.train.path=[owner/llama-3.1-pairs,good.jsonl]"])
    assert preflight(config, 1, fetch=False).unseen == ("owner/llama-3.1-pairs",)


def test_submitting_and_comparing_refuse_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    for override in ("data.train.path=nowhere.jsonl", "trainer.max_epochs=0", "checkpoint.monitor=val/los"):
        with pytest.raises(UserError, match=override.partition("=")[2].replace("0", "=0")):
            check(Submission("lmpo_tiny", (override,), gpus_per_node=1))
        assert compare(["--suite", "figure2", "--list", override]) == 1
        assert override.partition("=")[2] in capsys.readouterr().err


def test_a_job_may_be_given_a_mode() -> None:
    plain = check(Submission("lmpo_tiny", gpus_per_node=1))
    assert check(Submission("lmpo_tiny", ("traceback=true", "dry_run=trace"), gpus_per_node=1)) == plain


def refuse_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network is asked")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_a_dry_run_never_asks_the_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither where the recipe says what model it expects, nor where it does not."""
    refuse_the_network(monkeypatch)
    common = ["--config-name", "lmpo_tiny", "dry_run=true", "model.restore_from_path=nobody/model"]
    assert main([*common, "data.train.path=nobody/pairs"]) == 0
    assert "nobody/pairs" in capsys.readouterr().out
    assert main([*common, "model.architecture=null"]) == 1
    assert "nobody/model is neither a local path nor in the hub's cache" in (said := capsys.readouterr().err)
    assert "hf download nobody/model" in said


def test_a_model_in_the_hubs_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_network(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    root = tmp_path / "hub" / "models--owner--model"
    snapshot = root / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)
    config = load_recipe("lmpo_tiny", [])
    (snapshot / "config.json").write_text(json.dumps({**dict(config.model.architecture or {}), "vocab_size": 97}))
    overrides = ["model.restore_from_path=owner/model"]
    # Of a model that is not all there, nothing is said.
    assert preflight(load_recipe("lmpo_tiny", overrides), 1, fetch=False).base.path is None
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(snapshot)).save_pretrained(snapshot)
    base = preflight(load_recipe("lmpo_tiny", [*overrides, "model.architecture=null"]), 1, fetch=False).base
    assert (base.architecture.vocab_size, base.path) == (97, snapshot)
    with pytest.raises(UserError, match=r"owner/model is another model .*hidden_size"):
        preflight(load_recipe("lmpo_tiny", [*overrides, "model.architecture.hidden_size=64"]), 1, fetch=False)
    # What the start would refuse, the dry run refuses: adapters that transformers would add to the model.
    (snapshot / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.restore_from_path: .* holds adapters beside a model"):
        preflight(load_recipe("lmpo_tiny", [*overrides, "model.architecture=null"]), 1, fetch=False)


def test_a_tokenizer_in_the_hubs_cache_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_the_network(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    overrides = ["model.tokenizer=owner/tokens", "model.architecture.vocab_size=100"]
    assert preflight(load_recipe("lmpo_tiny", overrides), 1, fetch=False).unseen == ("owner/tokens",)
    root = tmp_path / "hub" / "models--owner--tokens"
    snapshot = root / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("1" * 40)
    load_tokenizer("builtin:tiny").save_pretrained(snapshot)
    seen = preflight(load_recipe("lmpo_tiny", overrides), 1, fetch=False)
    assert seen.unseen == ()
    with pytest.raises(UserError, match="vocab"):
        preflight(load_recipe("lmpo_tiny", [overrides[0], "model.architecture.vocab_size=10"]), 1, fetch=False)
