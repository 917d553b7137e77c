"""Generation: exact, from every form of a model, with prompts as in training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_lmpo.answers.answer import Answer
from nemo_lmpo.answers.engine import Generator, load_generator
from nemo_lmpo.answers.prompts import Prompt, encode_prompts, read_prompts
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.data.encode import PairEncoder
from nemo_lmpo.errors import CheckpointError, ConfigError, DataError
from nemo_lmpo.formats.conversion import plan, write_huggingface
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.generate.__main__ import main
from nemo_lmpo.runtime.launch import LaunchInfo
from nemo_lmpo.training.session import TrainingSession, open_session
from tests.fuzz.mutated_rows import byte_tokenizer

OVERRIDES = [
    "model.global_batch_size=16",
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=128",
    "model.architecture.num_hidden_layers=2",
    "data.train.limit=64",
    "data.validation.path=null",
    "optim.lr=3e-3",
    "trainer.max_steps=12",
    "trainer.num_threads=1",
    "checkpoint.save_interval=0",
    "logging.tensorboard=false",
    "logging.report=false",
    "logging.progress_bar=false",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """A finished run, the ids of its prompts, and the policy as saved from the process that trained it."""
    root = tmp_path_factory.mktemp("generate")
    config = load_recipe("sft_tiny", [*OVERRIDES, f"run_dir={root / 'run'}", f"data.cache_dir={root / 'cache'}"])
    with open_session(config, LaunchInfo()) as session:
        session.train(0.0)
        session.files.save_to(root / "policy")
        pairs = [session.data.train[index] for index in range(6)]
        texts = [row.split("<user>")[1].split("<assistant>")[0].strip() for row in map(_prompt_text(session), pairs)]
    return root, [pair.prompt_ids for pair in pairs], texts


def _prompt_text(session: TrainingSession) -> Callable[..., Any]:
    return lambda pair: session.data.tokenizer.decode(pair.prompt_ids)


def greedy_by_hand(generator: Generator, prompt: list[int], most: int) -> list[int]:
    """The definition: the most likely next token, one at a time, no cache and no padding."""
    ids = list(prompt)
    for _ in range(most):
        with torch.inference_mode():
            logits = generator.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in generator.stop_ids:
            break
    return ids[len(prompt) :]


def test_greedy_is_the_likeliest_token_each_time(run: tuple[Any, ...]) -> None:
    root, prompts, _ = run
    generator = load_generator(root / "run")
    responses = generator.respond(prompts, Sampling(max_new_tokens=12, batch_size=4))
    assert [response.token_ids for response in responses] == [greedy_by_hand(generator, ids, 12) for ids in prompts]
    for response in responses:
        assert response.finished == (response.token_ids[-1] in generator.stop_ids)
        assert "<" not in response.text  # special tokens are no text


def test_every_form_of_the_model_answers_alike(run: tuple[Any, ...]) -> None:
    root, prompts, _ = run
    write_huggingface(plan(open_model(find_model(root / "run").path), root / "hf"))
    sampling = Sampling(max_new_tokens=10)
    forms = [root / "run", find_model(root / "run").path, root / "hf", root / "policy"]
    answers = [load_generator(form).respond(prompts, sampling) for form in forms]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize(
    ("model_type", "own"), [("qwen2", "self_attn.q_proj.bias"), ("qwen3", "self_attn.k_norm.weight")]
)
def test_a_qwen_trains_converts_and_answers(model_type: str, own: str, tmp_path: Path) -> None:
    """What its family has beside Llama's is trained, kept by every form, and exported as transformers has it."""
    overrides = [*OVERRIDES, f"model.architecture.model_type={model_type}", "trainer.max_steps=2"]
    config = load_recipe(
        "lmpo_tiny", [*overrides, f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"]
    )
    with open_session(config, LaunchInfo()) as session:
        session.train(0.0)
        session.files.save_to(tmp_path / "policy.nemo")
        prompts = [session.data.train[index].prompt_ids for index in range(3)]
    write_huggingface(plan(open_model(find_model(tmp_path / "run").path), tmp_path / "hf"))
    forms = [tmp_path / name for name in ("run", "policy.nemo", "hf")]
    answers = [load_generator(form).respond(prompts, Sampling(max_new_tokens=6)) for form in forms]
    assert answers[0] == answers[1] == answers[2]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.config.model_type == model_type
    trained = theirs.state_dict()[f"model.layers.1.{own}"]
    assert not torch.equal(trained, torch.full_like(trained, float(own.endswith("weight")))), "as it began"


def test_sampling_repeats_with_its_seed_only(run: tuple[Any, ...]) -> None:
    root, prompts, _ = run
    generator = load_generator(root / "run")

    def sample(seed: int) -> list[Answer]:
        return generator.respond(prompts, Sampling(max_new_tokens=12, temperature=2.0, seed=seed))

    assert sample(1) == sample(1) != sample(2)


def test_temperature_near_zero_is_greedy(run: tuple[Any, ...]) -> None:
    root, prompts, _ = run
    generator = load_generator(root / "run")
    cold = generator.respond(prompts, Sampling(max_new_tokens=8, temperature=1e-4))
    assert cold == generator.respond(prompts, Sampling(max_new_tokens=8))


def test_prompts_are_encoded_as_in_training(run: tuple[Any, ...]) -> None:
    root, ids, texts = run
    generator = load_generator(root / "run")
    prompts = [Prompt("here", text, [{"role": "user", "content": text}]) for text in texts]
    assert encode_prompts(prompts, generator.encoder) == ids


def test_command_writes_a_line_a_prompt(
    run: tuple[Any, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, texts = run
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    messages = [{"role": "user", "content": texts[1]}]
    prompts.write_text(json.dumps({"prompt": texts[0]}) + "\n\n" + json.dumps({"prompt": messages, "x": 1}) + "\n")
    common = ["--checkpoint", str(root / "run"), "--prompts", str(prompts), "--max-new-tokens", "5", "--quiet"]
    assert main([*common, "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [texts[0], messages]
    assert all(1 <= line["tokens"] <= 5 for line in lines)
    assert main([*common, "--limit", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{nope', "line 2 is not JSON"),
        ('{"question": "a"}', "line 1 has no field `prompt`"),
        ('{"prompt": 3}', "neither text nor a list of messages"),
        ('{"prompt": [{"role": "usr", "content": "a"}]}', "has the role 'usr'; known: system, developer, user"),
        ('{"prompt": [{"role": "assistant", "content": "a"}]}', "does not end with a text of the user"),
        ('{"prompt": " "}', "does not end with a text of the user"),
        ('{"prompt": "a\\ud800"}', "line 1 holds half a surrogate pair"),
        ('{"prompt": [{"role": "user", "content": "a", "\\udc00": 1}]}', "half a surrogate pair"),
        ('{"prompt": "a", "tools": ["\\ud83d"]}', "half a surrogate pair"),
        ('{"prompt": ' + "[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_bad_prompts_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_line_separators_of_unicode_are_text(tmp_path: Path) -> None:
    """JSON allows them within texts; only newlines end a line."""
    texts = [f"a{separator}b" for separator in "\u2028\u2029\u0085\x1c\x0b\x0c\r"]
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    path.write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8", newline="")
    assert [prompt.given for prompt in read_prompts(path)] == texts
    assert [prompt.place for prompt in read_prompts(path)][-1] == f"{path}, line {len(texts)}"


def test_bad_prompts_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_prompts(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "binary")


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"temperature": -1.0}, "--temperature -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p 0"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k -1"),
        ({"top_p": 0.5}, "no effect without --temperature"),
        ({"temperature": 1e-40}, "--temperature 1e-40"),
        ({"temperature": float("nan")}, "--temperature nan"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"seed": 2**70}, f"--seed {2**70} must be at least 0 and at most {2**63 - 1}"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
    ],
)
def test_bad_sampling_names_the_option(values: dict[str, Any], option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        Sampling(**values).validate()


def test_bad_checkpoints(tmp_path: Path, run: tuple[Any, ...]) -> None:
    with pytest.raises(CheckpointError, match="is not a model"):
        load_generator(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_generator(tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            load_generator(run[0] / "run", device="cuda")


def test_too_long_for_the_positions(run: tuple[Any, ...]) -> None:
    root, prompts, _ = run
    with pytest.raises(DataError, match="more than the model's 128 positions"):
        load_generator(root / "run").respond(prompts, Sampling(max_new_tokens=128))
    with pytest.raises(DataError, match=r"a prompt of 128 tokens leaves no room in the model's 128 positions"):
        load_generator(root / "run").respond([[5] * 128], Sampling())


def test_without_a_limit_answers_end_at_the_models_positions(run: tuple[Any, ...]) -> None:
    root, _, _ = run
    generator = load_generator(root / "run")
    generator.stop_ids = []
    (response,) = generator.respond([[5] * 124], Sampling())
    assert len(response.token_ids) == 4
    assert not response.finished


def test_command_reports_errors_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    assert main(["--checkpoint", str(tmp_path / "none"), "--prompts", str(prompts)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_prompts_with_tools_and_variables_are_rendered_with_them(tmp_path: Path) -> None:
    template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}{{ mood }}|{% for m in messages %}"
    template += "{{ m.content }}{{ m.tool_calls or '' }}{% endfor %}"
    tokenizer = byte_tokenizer()
    encoder = PairEncoder(tokenizer, template, max_length=99, max_prompt_length=98)
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [1]},
        {"role": "tool", "content": "b"},
    ]
    line = {"prompt": turns, "tools": [{"name": "f"}], "chat_template_kwargs": {"mood": "calm"}}
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(line))
    (ids,) = encode_prompts(read_prompts(path), encoder)
    assert tokenizer.decode(ids) == "[f]calm|a[1]b"
