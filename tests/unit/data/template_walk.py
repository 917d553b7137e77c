"""Chat templates of real models, times kinds of conversations and answers, judged by transformers' own rendering.

The judge knows nothing of how pairs are laid: it compares the ids' text with `apply_chat_template` of the finished
conversation and of the generation prompt, and asks whether the answer stands in it whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nemo_lmpo.data.encode import EncodedRow, PairEncoder
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.schema import PreferenceRow

USER = {"role": "user", "content": "What is it?"}
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [USER, {"role": "assistant", "content": "Two things."}, {"role": "user", "content": "Which ones?"}]
PROMPTS = {"single": [USER], "multi": TURNS, "system": [SYSTEM, USER], "both": [SYSTEM, *TURNS]}
ANSWERS = {
    "plain": ("Good answer.", "Bad one"),
    "blanks": (" yes\n", "  no "),
    "letters": ("A", "B"),
    "s and t": ("s", "t"),
    "code": ("```python\nx = {'a': 1}\n```", "    def f():\n        pass\n"),
    "thought": ("<think>\nHm, I see.\n</think>\n\nGood.", "<think>\nWell.\n</think>\n\nBad."),
    "empty thought": ("<think>\n\n</think>\n\nGood.", "<think>\n\n</think>\n\nBad."),
}
_MARKS = re.compile(
    r"<\|[^|<>\s'\"{}]+\|?>|<[a-z]+\|>|[<\u3008][\uff5c|][^\uff5c|<>'\"{}]+[\uff5c|][>\u3009]"
    r"|</?[a-z]+(?:_[a-z]+)+>|\[/?[A-Z_]{3,}\]|<(?:end|eos|sep)>|<SPECIAL_\d+>|</assistant>|\[e~\[|<seed:[be]os>"
)
RIGHT, DIFFERENT, REFUSED, WRONG = "right", "different", "refused", "wrong"


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one pair."""

    kind: str
    why: str = ""


def byte_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and one for each mark that the template writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    marks = ["<s>", "</s>", *sorted(set(_MARKS.findall(template)))]
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    if "eos_token" not in template:  # as in the models' own tokenizers: what a finished conversation ends with
        try:
            ended = _rendered(tokenizer, template, [USER, {"role": "assistant", "content": "Yes"}])
            asked = _rendered(tokenizer, template, [USER], generate=True)
        except Exception:
            return tokenizer
        next_header = _shared_end(ended, asked)
        if len(next_header) > 20:  # written behind finished conversations, too; what it begins with ends any turn
            ended = ended.removesuffix(next_header) + "".join(_MARKS.findall(next_header)[:1])
        ends = _MARKS.findall(ended[ended.rfind("Yes") :])
        if ends:  # it may be put together from parts of the template
            tokenizer.add_special_tokens({"eos_token": ends[-1]})
    return tokenizer


def _shared_end(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 0)
    return one[len(one) - length :]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]], generate: bool = False
) -> str | None:
    rendered: str | None = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    )
    return rendered


def judged(template: str, **settings: Any) -> dict[str, Any] | None:
    """A verdict for every combination, by the names of its parts; one for all where the template is refused."""
    tokenizer = byte_tokenizer(template)
    encoder = PairEncoder(tokenizer, template, max_length=9000, max_prompt_length=8000, **settings)
    cases = [(p, a) for p in PROMPTS for a in ANSWERS]
    rows = encoder.encode([PreferenceRow(PROMPTS[prompt], *ANSWERS[answer]) for prompt, answer in cases])
    return {
        f"{prompt}, {answer}": _judge(tokenizer, template, PROMPTS[prompt], ANSWERS[answer], row)
        for (prompt, answer), row in zip(cases, rows, strict=True)
    }


def _judge(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[dict[str, Any]],
    answers: tuple[str, str],
    row: EncodedRow | RowError,
) -> Verdict:
    try:
        prompt = _rendered(tokenizer, template, messages, generate=True)
        finished = [_rendered(tokenizer, template, [*messages, {"role": "assistant", "content": a}]) for a in answers]
    except Exception as error:
        refused = isinstance(row, RowError) and row.reason == "refused by the chat template"
        return Verdict(REFUSED if refused else WRONG, str(error))
    if isinstance(row, RowError):
        lost = [
            a for a, whole in zip(answers, finished, strict=True) if "".join(a.split()) not in "".join(whole.split())
        ]
        return Verdict(REFUSED if lost else WRONG, row.detail)
    start = tokenizer.decode(row.prompt_ids)
    if not prompt.startswith("<s>"):
        start = start.removeprefix("<s>")
    told = " ".join(row.notes)
    bare = _rendered(tokenizer, template, messages)
    tail = _shared_end(*finished)
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    differences = []
    for answer, whole, ids in zip(answers, finished, (row.chosen_ids, row.rejected_ids), strict=True):
        response = tokenizer.decode(ids)
        if tokenizer.eos_token in tail and not response.endswith(tokenizer.eos_token):
            return Verdict(WRONG, f"{response!r} does not end with {tokenizer.eos_token!r} of {whole!r}")
        if not response.endswith(tuple(marks)):
            return Verdict(WRONG, f"{response!r} has no end")
        if not any(mark in tail for mark in marks):
            response = response.removesuffix(tokenizer.eos_token)  # appended
        if answer not in response and not (start == prompt and answer in (start + response)[len(bare) :]):
            laid_on = "behind the generation prompt" in told  # which may open an answer, with other blanks
            if ("blanks" not in told and not laid_on) or "".join(answer.split()) not in "".join(
                (start + response)[len(bare) :].split()
            ):
                return Verdict(WRONG, f"{answer!r} is not in {response!r} ({told})")
            differences.append("blanks")
        if start == prompt and whole.startswith(start + response):
            continue
        if start == prompt and ("behind the generation prompt" in told or "trained as it stands" in told):
            differences.append("on the generation prompt")
        elif start == prompt and "leave out part of the prompt" in told:
            if not whole.rstrip().endswith(response):
                return Verdict(WRONG, f"{whole!r} does not end with {response!r}")
            differences.append("laid on the generation prompt")
        elif start != prompt and "generation starts with" in told and whole.startswith(start + response):
            differences.append("generation starts otherwise")
        else:
            return Verdict(WRONG, f"{start!r} + {response!r} of {whole!r}, generation {prompt!r} ({told})")
    return Verdict(DIFFERENT, ", ".join(dict.fromkeys(differences))) if differences else Verdict(RIGHT)


def templates_in(folder: Path) -> dict[str, str]:
    """The templates in a folder by name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
