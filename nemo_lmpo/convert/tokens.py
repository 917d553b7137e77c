"""Compare the tokenizers of two models: the ids of texts, of every added token, and what stands at the ends."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.data.tokenizer import load_tokenizer
from nemo_lmpo.errors import CheckpointError, ConfigError, first_line
from nemo_lmpo.formats.model_files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Q: If I have 3 apples and buy 4 more, how many apples do I have?\nA:",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller staatlichen Gewalt.",
)
_DUTIES = ("bos_token_id", "eos_token_id", "pad_token_id")


def model_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model's files; None if it has none.

    Raises:
        CheckpointError: its files are damaged.
    """
    if not any(name.startswith("tokenizer") for name in model.sidecars):
        return None
    with tempfile.TemporaryDirectory(prefix="nemo_lmpo_tokenizer_") as directory:
        model.save_sidecars(Path(directory))
        try:
            return load_tokenizer(directory)
        except ConfigError as error:
            reason = first_line(error).replace(directory, "its files")
            raise CheckpointError(
                f"{model.origin}: its tokenizer cannot be read ({reason}); restore its files"
            ) from None


def compare_tokenizers(reference: ModelFiles, converted: ModelFiles) -> tuple[bool, str]:
    """Whether both make the same ids, and a line that says so.

    Raises:
        CheckpointError: the files of a tokenizer are damaged.
    """
    tokenizers = {model.origin: model_tokenizer(model) for model in (reference, converted)}
    lacking = [origin for origin, tokenizer in tokenizers.items() if tokenizer is None]
    if lacking:
        return True, f"tokenizer: not compared; {' and '.join(lacking)} holds none"
    left, right = (tokenizer for tokenizer in tokenizers.values() if tokenizer is not None)
    added = [str(token) for tokenizer in (left, right) for token in tokenizer.added_tokens_decoder.values()]
    texts = [*PROMPTS, *(f"a{token}b {token} c" for token in dict.fromkeys(added))]
    different = [text for text in texts if left(text)["input_ids"] != right(text)["input_ids"]]
    duties = [name for name in _DUTIES if getattr(left, name) != getattr(right, name)]
    line = f"tokenizer: {len(texts)} texts, {len(different)} differ"
    if different:
        line += f" (first {different[0][:40]!r})"
    for name in duties:
        line += f"; {name} {getattr(left, name)} and {getattr(right, name)}"
    return not different and not duties, line
