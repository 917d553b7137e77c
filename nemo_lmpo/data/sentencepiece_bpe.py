"""A SentencePiece BPE file (`tokenizer.model` of Llama 2 and Mistral) as an exact fast tokenizer.

transformers builds fast tokenizers from such files too, but ranks merges of spaces in another order than
SentencePiece does and, for Mistral directories, loses the space in front of a text; both change ids silently.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_lmpo.errors import CheckpointError, ConfigError, shown
from nemo_lmpo.formats.fields import Fields
from nemo_lmpo.formats.token_files import SETTINGS, TOKEN_FILES, AddedToken, read_token_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
_PROBES = ("Hello  world, it's 1234.", "   a\n\n b", "caf\u00e9 \u65e5\u672c \U0001f600", "x     y\tz")


def load_sentencepiece_directory(directory: Path) -> PreTrainedTokenizerFast:
    """Load `tokenizer.model`, with the tokens and settings of the files beside it.

    These are `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`. A BOS is put in front of texts
    unless they say otherwise, as models with such tokenizers expect.

    Raises:
        ConfigError: the file is not a SentencePiece BPE model, or one beside it is damaged.
    """
    from transformers import PreTrainedTokenizerFast

    pieces = _read_pieces(directory / "tokenizer.model")
    names = [pieces.IdToPiece(number) for number in range(pieces.GetPieceSize())]
    ids = {"unk_token": pieces.unk_id(), "bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
    try:
        present = {name: (directory / name).read_bytes() for name in TOKEN_FILES if (directory / name).is_file()}
        usual = {duty: names[number] for duty, number in ids.items()}
        files = read_token_files(present, names, usual, str(directory))
        settings = Fields(files.settings, str(directory / SETTINGS))
        after_special = not settings.has("legacy") or settings.flag("legacy")
        front, end = (_flag(settings, f"add_{kind}_token", kind == "bos") for kind in ("bos", "eos"))
        prefix = not settings.has("add_prefix_space") or settings.flag("add_prefix_space")
        template = _chat_template(directory, settings)
        settings.require({"split_special_tokens": (False, None)}, "special tokens are found in texts")
        if files.duties.get("unk_token") != usual["unk_token"]:
            raise settings.error("unk_token", f"is not the model's own; set it to {usual['unk_token']}")
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    build = partial(_build_backend, pieces, _merges(pieces))
    backend = build({}, prefix=True, after_special=True)
    if any(backend.encode(text, add_special_tokens=False).ids != pieces.Encode(text) for text in _PROBES):
        raise ConfigError(
            f"{directory / 'tokenizer.model'} is not a BPE model as Llama 2 and Mistral have; "
            "use a tokenizer directory with tokenizer.json"
        )
    backend = build(files.added, prefix=prefix, after_special=after_special)
    _add_ends(backend, files.duties.get("bos_token") if front else None, files.duties.get("eos_token") if end else None)
    further = {"additional_special_tokens": list(files.further)} if files.further else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **files.duties,
        **further,
    )


def _flag(settings: Fields, name: str, absent: bool) -> bool:
    return settings.flag(name) if name in settings.values else absent


def _add_ends(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Puts the tokens that there are around every text."""
    from tokenizers.processors import TemplateProcessing

    front, end = f"{bos} " if bos else "", f" {eos}" if eos else ""
    special = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    if special:
        single = f"{front}$A{end}"
        backend.post_processor = TemplateProcessing(
            single=single, pair=f"{single} {front}$B{end}", special_tokens=special
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
    unused = [pieces.IdToPiece(number) for number in range(pieces.GetPieceSize()) if pieces.IsUnused(number)]
    if unused:
        raise ConfigError(
            f"{path} has pieces that it never gives, such as {shown(unused[0])}; use a tokenizer directory with "
            "tokenizer.json"
        )
    return pieces


def _user_defined(pieces: Any) -> list[str]:
    """Pieces that SentencePiece finds in a text before it merges anything, such as Mistral's `[REFERENCE_DOC_1]`."""
    model = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # has no types
    found = model.ModelProto.FromString(pieces.serialized_model_proto()).pieces
    return [piece.piece for piece in found if piece.type == model.ModelProto.SentencePiece.USER_DEFINED]


def _prefixed(symbols: list[str]) -> Any:
    """Puts a space in front of a text, but not of a symbol by itself.

    Symbols are found in the text behind this normalizer, which is applied to them as well. A text that is one symbol
    and nothing else has no space in front then. SentencePiece gives one; transformers' fast tokenizers, which users
    load, give none either (4.57 and 5).
    """
    from tokenizers import Regex, normalizers

    if not symbols:
        return normalizers.Prepend(SPACE)
    alone = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
    return normalizers.Replace(Regex(rf"\A(?!(?:{alone})\z)(?=[\s\S])"), SPACE)


def _merges(pieces: Any) -> list[tuple[str, str]]:
    """Every split of every piece into two pieces, in the order in which SentencePiece merges.

    SentencePiece merges by the score of the result. Among runs of spaces, which share one score, the split with
    the longest left part comes first, as it works from the left.
    """
    size = pieces.GetPieceSize()
    whole = {i for i in range(size) if pieces.IsControl(i) or pieces.IsUnknown(i) or pieces.IsByte(i)}
    vocabulary = {pieces.IdToPiece(i): i for i in range(size) if i not in whole}
    ranked = []
    for piece, piece_id in vocabulary.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                tie = -cut if not piece.strip(SPACE) else vocabulary[left]
                ranked.append((-pieces.GetScore(piece_id), piece_id, tie, vocabulary[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _build_backend(
    pieces: Any,
    merges: list[tuple[str, str]],
    added: Mapping[int, AddedToken],
    *,
    prefix: bool,
    after_special: bool,
) -> Tokenizer:
    """The pieces and ``added`` tokens.

    ``prefix`` puts a space in front of a text, ``after_special`` also behind every added token.
    """
    import tokenizers
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    size = pieces.GetPieceSize()
    vocabulary = {pieces.IdToPiece(i): i for i in range(size)}
    control = [i for i in range(size) if pieces.IsControl(i) or pieces.IsUnknown(i)]
    _place(vocabulary, added, set(control) - {pieces.unk_id(), pieces.bos_id(), pieces.eos_id()})
    backend = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=pieces.IdToPiece(pieces.unk_id()),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space, symbols = normalizers.Replace(" ", SPACE), _user_defined(pieces)
    if not prefix:
        backend.normalizer = space
    elif after_special:
        backend.normalizer = normalizers.Sequence([_prefixed(symbols), space])
    elif symbols:
        raise ConfigError(
            f"tokenizer.model has symbols of its own, such as {shown(symbols[0])}, which cannot be found as "
            "SentencePiece finds them with legacy=false; use a tokenizer directory with tokenizer.json"
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    tokens = {i: AddedToken(pieces.IdToPiece(i), special=True) for i in control} | dict(added)
    for _, token in sorted(tokens.items()):
        # Found in the text itself: what is done to the text comes after.
        backend.add_tokens([tokenizers.AddedToken(**vars(token), normalized=False)])
    given = {token.content for token in added.values()}
    backend.add_tokens([tokenizers.AddedToken(one, normalized=True) for one in symbols if one not in given])
    return backend


def _place(vocabulary: dict[str, int], added: Mapping[int, AddedToken], free: set[int]) -> None:
    """Give added tokens their ids; one may take the place of a piece that is ``free`` to be renamed.

    Raises:
        ConfigError: an id belongs to another piece, or the model has the token under another id.
    """
    texts = {number: piece for piece, number in vocabulary.items()}
    for number, token in added.items():
        piece, known = texts.get(number, token.content), vocabulary.get(token.content, number)
        if (piece != token.content and number not in free) or known != number:
            belongs = f"which belongs to {shown(piece)}" if known == number else f"but is {known} in tokenizer.model"
            raise ConfigError(
                f"the added token {shown(token.content)} has the id {number}, {belongs}; correct the ids of added "
                "tokens in the tokenizer's files"
            )
        vocabulary.pop(piece, None)
        vocabulary[token.content] = number


def _chat_template(directory: Path, settings: Fields) -> Any:
    """The template, or several with their names.

    Raises:
        CheckpointError: neither.
    """
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not a text ({error}); restore the file") from None
    template = settings.values.get("chat_template")
    named = template if isinstance(template, list) else []
    texts = [one.get(part) if isinstance(one, Mapping) else None for one in named for part in ("name", "template")]
    if not isinstance(template, str | list | None) or not all(isinstance(text, str) for text in texts):
        raise settings.error("chat_template", "is neither a template nor a list of named ones; correct it")
    return template
