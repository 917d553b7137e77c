"""The models that are sampled: their prompts as token ids, their identity, and where their answers come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_lmpo.answers.completions import CompletionRequests
from nemo_lmpo.answers.endpoint import Endpoint, choose_model
from nemo_lmpo.answers.engine import Prompting, choose_device, open_prompting
from nemo_lmpo.answers.identity import check_one_bos, weights_hash
from nemo_lmpo.answers.in_process import InProcessSource, default_dtype
from nemo_lmpo.answers.sampling import Sampling
from nemo_lmpo.answers.sources import AnswerSource, EndpointSource
from nemo_lmpo.data.messages import RowError
from nemo_lmpo.data.tokenizer import tokenizer_fingerprint
from nemo_lmpo.errors import DataError
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.pairs.candidate import AskedPrompt
from nemo_lmpo.runtime.files import content_hash

NO_ROOM = "longer than the model's positions"
NOUN = "answer"
_SPREAD = 1_000_003
"""Seeds of batches begin so far apart: those of one published seed never meet those of another."""


@dataclass(frozen=True)
class SampledModel:
    """One of the models, without its weights."""

    given: str
    """As on the command line."""
    name: str | None
    """On the hub, if it came from there."""
    prompting: Prompting
    prompts: Mapping[str, list[int]]
    """Token ids by the prompt's id; those that it cannot answer are left out."""
    weights_sha256: str
    source: EndpointSource | InProcessSource
    """With the sampling of the first seed."""

    def identity(self) -> dict[str, Any]:
        """What decides its answers beside the seed."""
        chat = self.prompting.encoder.chat
        generation = dict(self.source.generation())
        for name in ("seed", "endpoint", "served_name", "left to the server"):
            generation.pop(name, None)
        return {
            "weights": self.weights_sha256,
            "template": content_hash([chat.template, chat.system_prompt]),
            "tokenizer": tokenizer_fingerprint(self.prompting.tokenizer),
            **generation,
        }

    def of_seed(self, seed: int, names: Mapping[str, str]) -> AnswerSource:
        """Answers with a seed.

        Args:
            seed: one of the published ones, or the user's.
            names: of answers, by the prompt's id.
        """
        prompts = {names[id]: ids for id, ids in self.prompts.items()}
        if isinstance(self.source, EndpointSource):
            requests = replace(self.source.requests, sampling=replace(self.source.requests.sampling, seed=seed))
            return replace(self.source, prompts=prompts, requests=requests)
        return replace(self.source, prompts=prompts, sampling=replace(self.source.sampling, seed=seed * _SPREAD))

    def unload(self) -> None:
        """Give back the memory of the weights, if they were loaded."""
        if isinstance(self.source, InProcessSource):
            self.source.loaded.clear()


@dataclass(frozen=True)
class HowToLoad:
    """Options that say how models run."""

    sampling: Sampling
    chat_template: str | None = None
    system_prompt: str | None = None
    device: str | None = None
    dtype: str | None = None
    quiet: bool = False


def open_model(
    given: str,
    place: int,
    asked: Sequence[AskedPrompt],
    work: Path,
    how: HowToLoad,
    server: tuple[Endpoint, str | None] | None,
    left_out: Counter[str],
) -> SampledModel:
    """Open a model, and make token ids of the prompts exactly as training does.

    Args:
        given: MODEL of the command line.
        place: which of the models it is.
        asked: the prompts.
        work: where the hash of its weights is kept.
        how: it runs.
        server: that has it, and its name there; unset: it runs in this process.
        left_out: counts prompts that it cannot answer.

    Raises:
        UserError: no such model, or its server does not answer.
        DataError: it can answer none of the prompts.
    """
    found = find_model(given)
    prompting = open_prompting(found.path, chat_template=how.chat_template, system_prompt=how.system_prompt)
    ids = _encoded(asked, prompting, left_out, given)
    with tqdm(desc="hash", unit="tensor", disable=True if how.quiet else None) as bar:
        weights = weights_hash(prompting.files, prompting.directory, work, bar.update, f"weights_{place}.json")
    positions = prompting.files.architecture.max_position_embeddings
    source: EndpointSource | InProcessSource
    if server is None:
        device = choose_device(how.device)
        source = InProcessSource(prompting, {}, how.sampling, device, how.dtype or default_dtype(device), NOUN)
    else:
        # A name that is given is not looked up: where all answers are there, the server may be gone.
        served = server[1] or choose_model(server[0], None, "--served-name")
        requests = CompletionRequests(served, prompting.stop_ids, how.sampling)
        source = EndpointSource(server[0], {}, requests, positions, NOUN)
    return SampledModel(given, found.hub_name, prompting, ids, weights, source)


def _encoded(
    asked: Sequence[AskedPrompt], prompting: Prompting, left_out: Counter[str], given: str
) -> dict[str, list[int]]:
    encoded = prompting.encoder.encode_prompts([(prompt.messages, prompt.inputs) for prompt in asked])
    positions = prompting.files.architecture.max_position_embeddings
    found: dict[str, list[int]] = {}
    problem = ""
    for prompt, ids in zip(asked, encoded, strict=True):
        if isinstance(ids, RowError):
            left_out[ids.reason] += 1
            problem = problem or ids.detail
        elif not 0 < len(ids) < positions:
            left_out[NO_ROOM if ids else "without tokens"] += 1
            problem = problem or f"a prompt has {len(ids)} tokens, and the model {positions} positions"
        else:
            found[prompt.id] = ids
    if not found:
        raise DataError(f"--model {given} can answer none of the {len(asked)} prompts ({problem})")
    check_one_bos(found, prompting.tokenizer.bos_token_id, "prompt")
    return found
