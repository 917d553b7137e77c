"""Scores of a reward model against transformers' own, one conversation at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from nemo_lmpo.answers.journal import Journal
from nemo_lmpo.errors import CheckpointError, ConfigError
from nemo_lmpo.pairs.candidate import AskedPrompt, Candidate
from nemo_lmpo.pairs.score import Keep
from nemo_lmpo.pairs.scorers.conversation import TOO_LONG
from nemo_lmpo.pairs.scorers.reward_model import RewardModelScorer, RewardOptions, load_reward_model, open_reward_model
from tests.unit.pairs.models import save_policy, save_reward_model

TEXTS = ["a b c", "a", "c b a well so indeed really very quite", "d e f g h", "a b c d e f g h i j k l m n", "sure ok"]
PROMPTS = [
    (AskedPrompt(f"p{place}", [{"role": "user", "content": f"sort {letters}"}]), candidates)
    for place, letters in enumerate(("c b a", "b a", "f e d"))
    for candidates in [[Candidate(f"p{place}/{n}", 0, n, text, 1, True) for n, text in enumerate(TEXTS)]]
]
NAMES = [one.name for _, them in PROMPTS for one in them]


def scores(scorer: RewardModelScorer, path: Path, missing: set[str] | None = None) -> dict[str, float]:
    with Journal(path, "id") as journal:
        scorer.score(PROMPTS, set(NAMES) if missing is None else missing, Keep(journal, lambda _: None))
        return {name: row["score"] for name, row in journal.rows.items()}


def by_transformers(folder: Path, dtype: torch.dtype) -> dict[str, float]:
    """As the published script does it: the chat template's ids, one conversation, no padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {}
    for prompt, candidates in PROMPTS:
        for one in candidates:
            messages = [*prompt.messages, {"role": "assistant", "content": one.text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.inference_mode():
                found[one.name] = float(model(ids).logits[0, 0])
    return found


@pytest.mark.parametrize("pad", [None, 0, "end of turn"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_padded_batches_are_transformers_one_by_one(
    dtype: str, tolerance: float, pad: int | str | None, tmp_path: Path
) -> None:
    """Also where the padding is the token that ends answers, of which transformers takes the one before."""
    folder = save_reward_model(tmp_path / "rm", pad=2 if pad == "end of turn" else pad)  # type: ignore[arg-type]
    expected = by_transformers(folder, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    spread = max(expected.values()) - min(expected.values())
    assert spread > 0.5  # or equal scores would hide any fault
    for size in (1, 4, 64):
        scorer = open_reward_model(RewardOptions(str(folder), size, dtype=dtype))
        assert scores(scorer, tmp_path / f"{size}.jsonl") == pytest.approx(expected, abs=tolerance * spread)


def test_a_batch_is_made_whole_again(tmp_path: Path) -> None:
    """What a command that goes on computes is to the bit what it would have computed at once."""
    scorer = open_reward_model(RewardOptions(str(save_reward_model(tmp_path / "rm")), 4))
    whole = scores(scorer, tmp_path / "whole.jsonl")
    again = scores(scorer, tmp_path / "again.jsonl", {NAMES[3], NAMES[11]})
    assert NAMES[3] in again
    assert len(again) <= 8
    assert all(whole[name] == value for name, value in again.items())


def test_conversations_beyond_the_models_positions_have_no_score(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 96', '"max_position_embeddings": 16'))
    with Journal(tmp_path / "j", "id") as journal:
        scorer = open_reward_model(RewardOptions(str(folder)))
        scorer.score(PROMPTS, set(NAMES), Keep(journal, lambda _: None))
        without = {name for name, row in journal.rows.items() if row["score"] is None}
        assert {name for name in NAMES if name.endswith("/4")} <= without < set(NAMES)
        assert {journal.rows[name]["why"] for name in without} == {TOO_LONG}


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    save_policy(tmp_path / "policy")
    config = tmp_path / "policy" / "config.json"
    config.write_text(config.read_text().rstrip().removesuffix("}") + ', "num_labels": 1}')
    options = RewardOptions(str(tmp_path / "policy"))
    with pytest.raises(CheckpointError, match=r"has no weights for score\.weight: it is a model without a head"):
        load_reward_model(tmp_path / "policy", options, torch.float32)


def test_a_model_with_several_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has 3 labels; .*--score-field names"):
        open_reward_model(RewardOptions(str(save_reward_model(tmp_path / "rm", labels=3))))


def test_a_model_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for given in (str(tmp_path / "nowhere"), str(Path(__file__))):
        with pytest.raises(CheckpointError, match=r"--reward-model .* does not exist"):
            open_reward_model(RewardOptions(given))


CODE = '''
import torch
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput
from dataclasses import dataclass

@dataclass
class Output(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None

class Gated(LlamaPreTrainedModel):
    """Several objectives and one score of them, as multi-objective reward models have; knows no padding."""

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = torch.nn.Linear(config.hidden_size, 19, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None):
        rewards = self.objectives(self.model(input_ids).last_hidden_state[:, -1])
        return Output(rewards=rewards, score=rewards.mean(dim=1))
'''


def test_heads_of_the_models_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = save_reward_model(tmp_path / "rm", labels=19)
    (folder / "gated.py").write_text(CODE)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if name != "score.weight"}
    from safetensors.torch import save_file

    torch.manual_seed(2)
    head = torch.randn(19, 32)
    save_file({**state, "objectives.weight": head}, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    entry = '"auto_map": {"AutoModelForSequenceClassification": "gated.Gated"}, '
    config.write_text(config.read_text().replace("{", "{" + entry, 1))
    scorer = open_reward_model(RewardOptions(str(folder), trust_remote_code=True, field="score"))
    assert scorer.batch_size == 1
    found = scores(scorer, tmp_path / "j")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, candidates in PROMPTS[:1]:
        for one in candidates:
            messages = [*prompt.messages, {"role": "assistant", "content": one.text}]
            ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)["input_ids"]
            with torch.inference_mode():
                hidden = model.model(ids).last_hidden_state[0, -1]
            assert found[one.name] == pytest.approx(float((head @ hidden).mean()), abs=1e-5)
    wrong = open_reward_model(RewardOptions(str(folder), trust_remote_code=True, field="reward"))
    with pytest.raises(ConfigError, match=r"--score-field reward is not in .* its fields are rewards, score"):
        scores(wrong, tmp_path / "k")
    several = open_reward_model(RewardOptions(str(folder), trust_remote_code=True, field="rewards"))
    with pytest.raises(ConfigError, match=r"the shape \[1, 19\] for 1 conversations"):
        scores(several, tmp_path / "l")


def test_a_language_model_is_not_taken_for_a_reward_model(tmp_path: Path) -> None:
    """Its configuration says two labels, transformers' default."""
    assert LlamaForCausalLM.__name__ in (save_policy(tmp_path / "policy") / "config.json").read_text()
    with pytest.raises(ConfigError, match="2 labels"):
        open_reward_model(RewardOptions(str(tmp_path / "policy")))
