"""Templates that write the date write one day for all of a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from nemo_lmpo.config.schema import DataConfig
from nemo_lmpo.data import template_day
from nemo_lmpo.data.preference import PreferenceDataset, load_preference_dataset, pair_encoder
from nemo_lmpo.data.schema import PreferenceRow
from nemo_lmpo.data.template_day import with_day, without_day, writes_day
from tests.unit.data.template_walk import byte_tokenizer, templates_in

USER = {"role": "user", "content": "Hi"}
DATED = "<today {{ strftime_now('%d %b %Y') }}>{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def rendered(template: str) -> str:
    text: str = byte_tokenizer(template).apply_chat_template([USER], chat_template=template, tokenize=False)
    return text


def test_real_templates_write_what_they_would_on_that_day() -> None:
    trl = pytest.importorskip("trl")
    found = templates_in(Path(trl.__file__).parent / "chat_templates")
    dated = {name: text for name, text in found.items() if writes_day(text)}
    assert {"llama3_2", "gptoss"} <= set(dated)
    for name, template in dated.items():
        assert rendered(with_day(template)) == rendered(template), name
        then = rendered(with_day(template, "1987-07-26"))
        assert then.count("1987") == 1, name
        assert without_day(with_day(template)) == template
        assert with_day(with_day(template, "2024-07-26"), "2025-01-01") == with_day(template, "2024-07-26")


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%A, %-d. %B", "100%% of %j", "no day", "%y%m%d %%d"])
def test_formats_that_are_put_together_while_rendering(form: str) -> None:
    template = f"{{% set form = '{form}' ~ '!' %}}{{{{ strftime_now(form) }}}}"
    assert rendered(with_day(template, "2024-03-05")) == date(2024, 3, 5).strftime(form) + "!"


def test_templates_without_a_day_stay_as_they_are() -> None:
    assert with_day("{{ messages[0].content }}") == "{{ messages[0].content }}"


def test_pairs_and_the_cache_depend_on_the_day_and_the_run_keeps_it(
    data_config: Callable[..., DataConfig],
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "dated.jinja"
    path.write_text(DATED)
    config = data_config(write_jsonl([{"prompt": "Q", "chosen": "a", "rejected": "b"}]), chat_template=str(path))
    tokenizer = byte_tokenizer(DATED)

    def load(day: str, template: str | None = None, **settings: Any) -> PreferenceDataset:
        monkeypatch.setattr(template_day, "today", lambda: day)
        for name, value in settings.items():
            setattr(config, name, value)
        return load_preference_dataset(config, config.train, tokenizer, template=template)

    first, next_day = load("2026-12-01"), load("2026-12-02")
    assert tokenizer.decode(first[0].prompt_ids) == "<today 01 Dec 2026>Q</s>"
    assert tokenizer.decode(next_day[0].prompt_ids) == "<today 02 Dec 2026>Q</s>"
    assert first.fingerprint != next_day.fingerprint
    kept = pair_encoder(config, tokenizer, with_day(DATED, "2026-12-01")).record().template
    assert load("2026-12-05", kept).token_hash() == first.token_hash()
    again = load("2026-12-05", cache_dir=str(tmp_path / "fresh"), template_date="2026-12-01")
    assert again.token_hash() == first.token_hash()


def test_prompts_of_generation_have_the_day_of_the_template(
    data_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder: Any = pair_encoder(data_config("x"), byte_tokenizer(DATED), with_day(DATED, "2026-12-01"))
    monkeypatch.setattr(template_day, "today", lambda: "2027-01-01")
    (ids,) = encoder.encode_prompts([([USER], PreferenceRow([USER], "", "").inputs)])
    assert encoder.tokenizer.decode(ids) == "<today 01 Dec 2026>Hi</s>"
