"""Who loads an exported model gets the conversations of its training, and stops where the answers of training end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LogitsProcessor, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from nemo_lmpo.answers.engine import open_prompting
from nemo_lmpo.checkpoint.run_directory import RunDirectory
from nemo_lmpo.config.recipe import load_recipe
from nemo_lmpo.config.schema import Config
from nemo_lmpo.convert.command import nemo_to_hf
from nemo_lmpo.data import template_day
from nemo_lmpo.data.encode import EncodedRow
from nemo_lmpo.data.messages import PLAIN_INPUTS
from nemo_lmpo.data.preference import pair_encoder
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.data.templates import TEMPLATES
from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.evaluate.leaderboard import export as evaluate_export
from nemo_lmpo.export import write
from nemo_lmpo.formats import chat_files
from nemo_lmpo.formats.chat_files import renders_with_default, served_template
from nemo_lmpo.formats.conversion import plan, write_nemo
from nemo_lmpo.formats.model_files import open_model
from nemo_lmpo.runtime.chat_record import ChatRecord
from nemo_lmpo.training.preflight import preflight
from nemo_lmpo.training.start_model import find_start_model
from tests.unit.checkpoint.runs import TINY, one_process, open_session

MARKS = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|turn_end|>")
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "zephyr": "</s>", "plain": "</s>"}
FILE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn_end|>\n{% endfor %}"
OLD = "{% for m in messages %}<|im_start|>OLD {{ m['content'] }}<|im_end|>{% endfor %}"
SYSTEM = 'Answer "briefly",\nin {{ one }} \\ word: ünïcode 😀 {% if %}.'
STARTS = ("none", "inline", "jinja", "both", "named")
QUESTION = [{"role": "user", "content": "hello"}]


def tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """One token per byte, one merge (llama.cpp wants one), and the marks of all templates."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    backend = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>", "<pad>", *MARKS)]
    )
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def start_model(directory: Path, kind: str) -> Path:
    """A random base model whose own template is in the place that ``kind`` says, with its EOS only as its end."""
    words = tokenizer(adds_bos=kind in ("none", "inline"))
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=512, **sizes, eos_token_id=words.eos_token_id)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words.save_pretrained(directory)
    if kind == "none":
        (directory / "generation_config.json").unlink()
    if kind in ("jinja", "both"):
        (directory / "chat_template.jinja").write_text(OLD)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    if kind in ("inline", "both"):
        settings["chat_template"] = OLD.replace("OLD", "OLDER") if kind == "both" else OLD
    if kind == "named":
        settings["chat_template"] = [{"name": "default", "template": OLD}, {"name": "tool_use", "template": OLD}]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "both":
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tool_use.jinja").write_text(OLD)
        (directory / "chat_template.json").write_text(json.dumps({"chat_template": OLD}))
    return directory


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("starts")
    return {kind: start_model(root / kind, kind) for kind in STARTS}


@pytest.fixture(scope="module")
def state(starts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of a checkpoint, whose files decide the rest."""
    folder = tmp_path_factory.mktemp("state") / "run"
    with one_process() as place:
        overrides = ["data.chat_template=chatml", "trainer.max_steps=1", "data.max_length=256"]
        session = open_session(place, folder, *from_start(starts["none"]), *overrides)
        session.train(0.0)
    return folder / "checkpoints" / "step_0000001" / "state"


def from_start(start: Path) -> list[str]:
    return [f"model.restore_from_path={start}", "model.architecture=null", "model.tokenizer=null"]


def trained(folder: Path, state: Path, start: Path, template: str | None, system: str | None, *more: str) -> Config:
    """A run's directory with a checkpoint, as training leaves it."""
    overrides = [f"run_dir={folder}", *from_start(start), "data.max_length=400", "data.max_prompt_length=300", *more]
    config = load_recipe("lmpo_tiny", [*TINY, *overrides])
    config.data.chat_template, config.data.system_prompt = template, system
    run, words = RunDirectory(config), load_tokenizer(str(start))
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    shutil.copytree(state, checkpoint / "state")
    run.write_sidecars(checkpoint, find_start_model(config.model), words, pair_encoder(config.data, words).record())
    return config


def by_nemo(run: Path, output: Path) -> None:
    write_nemo(plan(open_model(run / "checkpoints" / "step_0000001"), output.with_suffix(".nemo")))
    assert nemo_to_hf(["--input", str(output.with_suffix(".nemo")), "--output", str(output)]) == 0


def by_conversion(run: Path, output: Path) -> None:
    assert nemo_to_hf(["--input", str(run / "checkpoints" / "step_0000001"), "--output", str(output)]) == 0


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "export": write.export_run,
    "convert": by_conversion,
    "evaluate": lambda run, output: evaluate_export(str(run), output),
    "nemo": by_nemo,
}


class Script(LogitsProcessor):
    """Makes the model say these tokens."""

    def __init__(self, tokens: list[int], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return forced


def check_rendering(output: Path, config: Config, start: Path) -> None:
    """`transformers` and llama.cpp's converter find the template of training; both give the ids of training."""
    from gguf import SpecialVocab

    loaded = AutoTokenizer.from_pretrained(output)
    encoder = pair_encoder(config.data, load_tokenizer(str(start)))
    for prompt in (QUESTION, [{"role": "system", "content": "Own."}, *QUESTION]):
        (row,) = encoder.encode([PreferenceRow(prompt, "yes", "no")])
        assert isinstance(row, EncodedRow)
        ids = loaded.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids == row.prompt_ids, (loaded.decode(ids), loaded.decode(row.prompt_ids))
    assert SpecialVocab(output).chat_template == loaded.chat_template
    assert not list(output.glob("additional_chat_templates/*"))


def check_stopping(output: Path, end: str) -> None:
    """`transformers` stops there, vLLM knows it as a stop token, llama.cpp as the EOS."""
    from gguf import SpecialVocab

    loaded, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    wanted = loaded.convert_tokens_to_ids(end)
    prompt = loaded("hello", return_tensors="pt")["input_ids"]
    said = [5, wanted, 6, 7, 8]
    answer = model.generate(
        prompt, max_new_tokens=5, do_sample=False, logits_processor=[Script(said, prompt.shape[1])]
    )[0, prompt.shape[1] :]
    assert answer.tolist() == said[:2]
    settings = json.loads((output / "config.json").read_text())
    named = model.generation_config.eos_token_id
    assert wanted in {loaded.eos_token_id, *(named if isinstance(named, list) else [named])}
    assert SpecialVocab(output).special_token_ids["eos"] == wanted
    assert settings["eos_token_id"] == wanted


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("template", [*ENDS, "file"])
def test_every_way_of_leaving_gives_the_chat_of_training(
    template: str, start: str, starts: dict[str, Path], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, end = template, ENDS.get(template, "<|turn_end|>")
    if template == "file":
        choice = str(tmp_path / "own.jinja")
        Path(choice).write_text(FILE)
    system = None if template == "plain" else SYSTEM
    config = trained(tmp_path / "run", state, starts[start], choice, system)
    monkeypatch.setattr(write, "write_card", lambda *arguments: None)
    before: dict[str, bytes] = {}
    for name, leave in WAYS.items():
        leave(tmp_path / "run", tmp_path / name)
        files = {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        assert files == (before or files), name
        before = files
    check_rendering(tmp_path / "convert", config, starts[start])
    check_stopping(tmp_path / "convert", end)
    # Here as there: the checkpoint answers from the same ids.
    prompting = open_prompting(tmp_path / "run")
    assert prompting.encoder.chat.template == AutoTokenizer.from_pretrained(tmp_path / "convert").get_chat_template()
    if template == "file":
        Path(choice).write_text(OLD)
        assert open_prompting(tmp_path / "run").encoder.chat.template == prompting.encoder.chat.template
        Path(choice).unlink()
        assert open_prompting(tmp_path / "run").encoder.chat.template == prompting.encoder.chat.template


def test_the_released_form_leaves_as_it_was_trained(starts: dict[str, Path], state: Path, tmp_path: Path) -> None:
    """Its Mistral template writes no BOS, and its encoder puts one there."""
    config = trained(tmp_path / "run", state, starts["jinja"], "mistral", None, "data.compat=released_code")
    by_conversion(tmp_path / "run", tmp_path / "hf")
    check_rendering(tmp_path / "hf", config, starts["jinja"])
    check_stopping(tmp_path / "hf", "</s>")


def test_files_that_say_the_same_already_are_not_touched(starts: dict[str, Path], state: Path, tmp_path: Path) -> None:
    start = shutil.copytree(starts["jinja"], tmp_path / "start")
    end = load_tokenizer(str(start)).convert_tokens_to_ids("<|im_end|>")
    for name in ("generation_config.json", "config.json"):
        values = json.loads((start / name).read_text())
        (start / name).write_text(json.dumps({**values, "eos_token_id": end}, indent=3))
    settings = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}, indent=3))
    assert load_tokenizer(str(start)).eos_token_id == end
    trained(tmp_path / "run", state, start, None, None)
    model = open_model(tmp_path / "run" / "checkpoints" / "step_0000001")
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        assert model.side_file(name) == (start / name).read_bytes(), name


def test_an_eos_that_the_template_writes_stays_one(starts: dict[str, Path], state: Path, tmp_path: Path) -> None:
    """Another token in its place would change the ids of training; answers end at both all the same."""
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ m['content'] }}{{ '<|turn_end|>' if m['role'] == 'assistant' else eos_token }}"
        "{% endfor %}"
    )
    config = trained(tmp_path / "run", state, starts["inline"], str(own), None)
    by_conversion(tmp_path / "run", tmp_path / "hf")
    check_rendering(tmp_path / "hf", config, starts["inline"])
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    end, eos = loaded.convert_tokens_to_ids("<|turn_end|>"), loaded.convert_tokens_to_ids("</s>")
    assert loaded.eos_token_id == eos
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["eos_token_id"] == [eos, end]


def test_checkpoints_of_earlier_versions_name_their_template_only(
    starts: dict[str, Path], state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(FILE)
    config = trained(tmp_path / "run", state, starts["both"], str(own), SYSTEM)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000001"
    (checkpoint / "chat.json").unlink()
    by_conversion(tmp_path / "run", tmp_path / "hf")
    check_rendering(tmp_path / "hf", config, starts["both"])
    check_stopping(tmp_path / "hf", "<|turn_end|>")
    own.unlink()
    assert nemo_to_hf(["--input", str(checkpoint), "--output", str(tmp_path / "other")]) == 1
    assert f"{checkpoint} was trained with the chat template {own}" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    prompting = open_prompting(tmp_path / "run", chat_template="chatml")
    assert (prompting.encoder.chat.template, prompting.encoder.system_prompt) == (TEMPLATES["chatml"], SYSTEM)


def test_a_run_goes_on_with_the_template_it_began_with(
    starts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever becomes of its file: the pairs are the same, and so is what its checkpoints say."""
    own = tmp_path / "own.jinja"
    own.write_text(FILE)
    overrides = [*from_start(starts["none"]), f"data.chat_template={own}", "data.max_length=256"]
    records = []
    with one_process() as place:
        for step, content in ((1, FILE), (2, OLD), (3, None)):
            own.unlink() if content is None else own.write_text(content)
            config = load_recipe("lmpo_tiny", [*TINY, f"run_dir={tmp_path / 'run'}", *overrides])
            preflight(config, 1, fetch=True)
            session = open_session(place, tmp_path / "run", *overrides, f"trainer.max_steps={step}")
            session.train(0.0)
            records.append((tmp_path / "run" / "checkpoints" / f"step_000000{step}" / "chat.json").read_text())
            assert records[-1] == (tmp_path / "run" / "chat.json").read_text()
    assert json.loads(records[0])["template"] == FILE
    assert records == records[:1] * 3
    said = [record.message for record in caplog.records if "data.chat_template" in record.message]
    assert [f"data.chat_template={own} " in line for line in said] == [True, True]
    assert "has another content" in said[0]
    assert "cannot be read any more" in said[1]


def test_evaluate_export_takes_no_other_model_for_the_one_that_is_asked(
    starts: dict[str, Path], state: Path, tmp_path: Path
) -> None:
    trained(tmp_path / "run", state, starts["none"], "chatml", None)
    output = tmp_path / "hf"
    output.mkdir()
    assert evaluate_export(str(tmp_path / "run"), output) == output  # an empty place is taken
    weights = output / "model.safetensors"
    before = weights.stat()
    (output / "chat_template.jinja").write_text(OLD)  # as an earlier version left it
    (output / ".config.json.1.tmp").write_text("half")
    assert evaluate_export(str(tmp_path / "run"), output) == output
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert (output / "chat_template.jinja").read_text() == open_prompting(tmp_path / "run").encoder.chat.template
    assert not (output / ".config.json.1.tmp").exists()
    shutil.copy(starts["none"] / "model.safetensors", weights)  # the start, before it was trained
    kept = weights.read_bytes()
    with pytest.raises(CheckpointError, match=f"{output} holds something else than .*remove it, or choose another"):
        evaluate_export(str(tmp_path / "run"), output)
    assert weights.read_bytes() == kept


def test_a_run_goes_on_with_the_day_it_began_on(
    starts: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with a fresh cache, where the pairs of another day would be refused as others."""
    own = tmp_path / "own.jinja"
    own.write_text("{{ strftime_now('%Y-%m-%d') }} " + FILE)
    with one_process() as place:
        for step, day in ((1, "2026-12-01"), (2, "2026-12-02")):
            monkeypatch.setattr(template_day, "today", lambda day=day: day)
            overrides = [*from_start(starts["none"]), f"data.chat_template={own}", "data.max_length=256"]
            overrides.append(f"data.cache_dir={tmp_path / day}")
            session = open_session(place, tmp_path / "run", *overrides, f"trainer.max_steps={step}")
            session.train(0.0)
    assert not [record.message for record in caplog.records if "data.chat_template" in record.message]
    ids = open_prompting(tmp_path / "run").encoder.encode_prompts([(QUESTION, PLAIN_INPUTS)])[0]
    assert session.data.tokenizer.decode(ids).removeprefix("<s>").startswith("2026-12-01 user: hello")


def test_every_template_takes_a_default_system_text_and_a_bos() -> None:
    """Those that TRL brings along: the text of training, from messages that have no system message."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rendered = 0
    for path in sorted(folder.glob("*.jinja"))[::4]:
        record = ChatRecord(path.read_text(), SYSTEM, adds_bos=True, end_of_turn="<e>", end_of_turn_id=1)
        for messages in (turns[:1], turns, [*turns, turns[0]], [{"role": "system", "content": "Own."}, turns[0]]):
            own = messages[0]["role"] == "system"
            given = messages if own else [{"role": "system", "content": SYSTEM}, *messages]
            try:
                wanted = "<b>" + rendered_by(record.template, given)
            except (TemplateError, TypeError):
                continue  # it knows no system messages
            assert renders_with_default(record), path.name
            assert rendered_by(served_template(record), messages) == wanted, path.name
            rendered += 1
    assert rendered > 40


def rendered_by(template: str, messages: list[dict[str, str]]) -> str:
    asks = messages[-1]["role"] == "user"
    tokens = {"bos_token": "<b>", "eos_token": "<e>"}
    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=asks, **tokens)
    return str(texts[0])


def test_a_system_prompt_that_the_template_cannot_take_is_named(
    starts: dict[str, Path], state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the card; the checkpoint's own answers have it all the same."""
    monkeypatch.setattr(chat_files, "_default_system", lambda prompt: "{{ broken")
    trained(tmp_path / "run", state, starts["none"], "chatml", SYSTEM)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    write.export_run(tmp_path / "run", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "which the chat template does not write. Give it as the first message" in card
    assert f"\n{SYSTEM}\n" in card
    assert "briefly" not in (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert open_prompting(tmp_path / "run").encoder.system_prompt == SYSTEM
