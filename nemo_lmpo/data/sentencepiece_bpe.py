"""A SentencePiece BPE file (`tokenizer.model` of Llama 2 and Mistral) as an exact fast tokenizer.

transformers builds fast tokenizers from such files too, but ranks merges of spaces in another order than
SentencePiece does and, for Mistral directories, loses the space in front of a text; both change ids silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
_PROBES = ("Hello  world, it's 1234.", "   a\n\n b", "caf\u00e9 \u65e5\u672c \U0001f600", "x     y\tz")


def load_sentencepiece_directory(directory: Path) -> PreTrainedTokenizerFast:
    """Load `tokenizer.model` and, where there is one, the chat template of `tokenizer_config.json`.

    A BOS is put in front of texts, as all models with such tokenizers expect.

    Raises:
        ConfigError: the file is not a SentencePiece BPE model.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    pieces = _read_pieces(directory / "tokenizer.model")
    backend = _build_backend(pieces)
    if any(backend.encode(text, add_special_tokens=False).ids != pieces.Encode(text) for text in _PROBES):
        raise ConfigError(
            f"{directory / 'tokenizer.model'} is not a BPE model as Llama 2 and Mistral have; "
            "use a tokenizer directory with tokenizer.json"
        )
    ids = {"unk_token": pieces.unk_id(), "bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
    names = {kind: pieces.IdToPiece(token_id) for kind, token_id in ids.items()}
    bos = names["bos_token"]
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, pieces.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(directory),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _read_pieces(path: Path) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise ConfigError(
            f"{path} needs the package sentencepiece; install it or use a directory with tokenizer.json"
        ) from None
    pieces = SentencePieceProcessor()
    try:
        pieces.Load(str(path))
    except (OSError, RuntimeError):
        raise ConfigError(
            f"{path} is not a SentencePiece model (Llama 3 ships a tiktoken file under this name); "
            "use the Hugging Face version of the tokenizer, with tokenizer.json"
        ) from None
    if pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise ConfigError(f"{path} has no BOS or EOS; use a tokenizer directory with tokenizer.json")
    return pieces


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order in which SentencePiece merges.

    SentencePiece merges by the score of the result. Among runs of spaces, which share one score, the split with
    the longest left part comes first, as it works from the left.
    """
    ranked = []
    for piece, piece_id in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                tie = -cut if not piece.strip(SPACE) else vocabulary[left]
                ranked.append((-scores[piece_id], piece_id, tie, vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _build_backend(pieces: Any) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    size = pieces.GetPieceSize()
    vocabulary = {pieces.IdToPiece(i): i for i in range(size)}
    control = [i for i in range(size) if pieces.IsControl(i) or pieces.IsUnknown(i)]
    mergeable = {piece: i for piece, i in vocabulary.items() if not (i in control or pieces.IsByte(i))}
    scores = [pieces.GetScore(i) for i in range(size)]
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(mergeable, scores),
            unk_token=pieces.IdToPiece(pieces.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    backend.add_special_tokens([AddedToken(pieces.IdToPiece(i), special=True, normalized=False) for i in control])
    return backend


def _chat_template(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    if not config.exists():
        return None
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ConfigError(f"{config} is not valid JSON ({error}); restore the file") from None
