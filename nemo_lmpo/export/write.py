"""Write a run as a Hugging Face directory: weights, tokenizer, chat template, generation config and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.errors import CheckpointError, UserError, first_line
from nemo_lmpo.evaluate.result import RESULT_FILE, Result, read_result
from nemo_lmpo.runtime.files import replace_file

if TYPE_CHECKING:
    from nemo_lmpo.formats.conversion import Plan
    from nemo_lmpo.runtime.chat_record import ChatRecord

CARD, PICTURES = "README.md", "figures"


def export_run(
    run: Path,
    output: Path,
    *,
    dtype: str | None = None,
    name: str | None = None,
    evaluations: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Export a run's newest checkpoint; returns ``output``, which `transformers` and vLLM load.

    Args:
        run: the run directory.
        output: appears when the weights are complete.
        dtype: `bf16`, `fp16` or `fp32`; by default as stored.
        name: of the model, or `OWNER/NAME` on the hub; by default the run directory's.
        evaluations: folders of :mod:`nemo_lmpo.evaluate` whose results the card shows.
        overwrite: replace an output that is there; without it, one with these very weights gets a new card.
        progress: hears of every tensor that is written.

    Raises:
        UserError: no run with a checkpoint, no room, or an output that holds something else.
    """
    from nemo_lmpo.answers.engine import open_prompting
    from nemo_lmpo.formats.conversion import hf_files, plan, write_huggingface
    from nemo_lmpo.formats.find_model import find_model

    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run} is no run with checkpoints; give a run directory")
    directory = find_model(run).path
    prompting = open_prompting(directory)
    conversion = plan(prompting.files, output, dtype)
    # The same command again, after a push that failed or for new evaluations, has no weights to write.
    if overwrite or not holds(output, conversion):
        conversion.check([directory], overwrite=overwrite)
        write_huggingface(conversion, overwrite=overwrite, progress=progress)
    else:
        _renew_side_files(output, hf_files(conversion))
    write_card(run, output, name or run.resolve().name, evaluations, prompting.files.chat)
    return output


def _renew_side_files(output: Path, files: Mapping[str, bytes]) -> None:
    """An export of an earlier version may have another template beside the same weights."""
    for path in output.glob("additional_chat_templates/*.jinja"):
        if path.relative_to(output).as_posix() not in files:
            path.unlink()
    for name, content in files.items():
        if not (output / name).is_file() or (output / name).read_bytes() != content:
            (output / name).parent.mkdir(exist_ok=True)
            replace_file(output / name, content)


def holds(output: Path, conversion: Plan) -> bool:
    """Whether ``output`` is a model with the very weights that would be written."""
    from nemo_lmpo.formats.conversion import tensor_names
    from nemo_lmpo.formats.model_files import open_model
    from nemo_lmpo.formats.source import get_fitting

    try:
        there = open_model(output)
    except UserError:
        return False
    model, dtype = conversion.model, conversion.dtype
    return there.architecture == model.architecture and all(
        there.source.dtype(name) == dtype
        and there.source.get(name).equal(get_fitting(model.source, name, dtype).to(dtype))
        for name in tensor_names(model)
    )


def write_card(run: Path, output: Path, name: str, evaluations: Sequence[Path], chat: ChatRecord | None = None) -> None:
    """The card and the pictures that it shows; ``chat`` is what the model was trained with."""
    from nemo_lmpo.export.card import build_card
    from nemo_lmpo.report.plots import draw_all
    from nemo_lmpo.report.read import read_run

    read = read_run(run)
    pictures = []
    for picture in draw_all([read]):
        path = output / PICTURES / f"{picture.chart.name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, picture.png)
        pictures.append((picture.chart.title, f"{PICTURES}/{path.name}"))
    place = name if "/" in name else str(output)
    card = build_card(read, name.rpartition("/")[2], place, pictures, read_evaluations(evaluations), chat)
    replace_file(output / CARD, card)


def read_evaluations(folders: Sequence[Path]) -> list[Result]:
    """Results in the folders and right below them.

    Raises:
        DataError: one cannot be read.
    """
    places = [place for folder in folders for place in (folder, *sorted(folder.glob("*/")))]
    return [read_result(place) for place in places if (place / RESULT_FILE).exists()]


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Push an exported directory to the hub in one commit; returns its address.

    Repeated after a failure, it sends what the hub does not hold yet.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    # The base of all that the hub's HTTP library raises: requests, httpx or httpx2, by its version.
    from huggingface_hub.errors import HTTPError

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload by nemo_lmpo")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"--push-to-hub {repository}: {_why_not_pushed(error, api.endpoint)}. The export is kept in {directory}"
        ) from None
    return str(address)


def _why_not_pushed(error: BaseException, endpoint: str) -> str:
    """Who has to do what; threads that upload hide the reason behind another error."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    responses = [found for one in chain if (found := getattr(one, "response", None)) is not None]
    status = responses[0].status_code if responses else None
    said = ": ".join(dict.fromkeys(first_line(one).rstrip(".") for one in (chain if status is None else chain[:1])))
    if status == 401:
        return f"{endpoint} does not accept the token ({said}); log in with `hf auth login` or set HF_TOKEN"
    if status == 403:
        return f"the token may not write there ({said}); take one that may, or another name"
    if isinstance(error, ValueError) or (status is not None and status < 500):
        return f"{endpoint} refuses ({said}); check the name"
    return f"{endpoint} cannot be reached or broke off ({said}); repeat the command, which sends what is missing"
