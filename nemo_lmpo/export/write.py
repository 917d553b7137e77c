"""Write a run as a Hugging Face directory: weights, tokenizer, chat template, generation config and model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.evaluate.result import RESULT_FILE, Result, read_result
from nemo_lmpo.runtime import run_files
from nemo_lmpo.runtime.files import replace_file

if TYPE_CHECKING:
    from nemo_lmpo.formats.find_model import FoundModel
    from nemo_lmpo.runtime.chat_record import ChatRecord

CARD, PICTURES = "README.md", "figures"


def export_run(
    given: str | Path,
    output: Path | None = None,
    *,
    dtype: str | None = None,
    name: str | None = None,
    evaluations: Sequence[Path] = (),
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Path:
    """Export a run's newest checkpoint, or one that is named; returns ``output``, which `transformers` and vLLM load.

    Args:
        given: the run directory, or one of its checkpoints.
        output: appears when the weights are complete; by default `huggingface` in the run directory, and for a
            checkpoint that is named `huggingface_step_N`.
        dtype: `bf16`, `fp16` or `fp32`; by default as stored.
        name: of the model, or `OWNER/NAME` on the hub; by default the run directory's.
        evaluations: folders of :mod:`nemo_lmpo.evaluate` whose results the card shows.
        overwrite: replace an output that is there; without it, one with these very weights gets a new card.
        progress: hears of every tensor that is written.

    Raises:
        UserError: no run with a checkpoint, no room, or an output that holds something else.
    """
    from nemo_lmpo.answers.engine import open_prompting
    from nemo_lmpo.formats.conversion import holds, plan, renew_side_files, write_huggingface
    from nemo_lmpo.formats.find_model import find_model

    found = find_model(given)
    if found.run is None:
        raise CheckpointError(_not_of_a_run(found.path))
    directory, run = found.path, found.run
    output = output or run / export_name(given, found)
    prompting = open_prompting(directory)
    conversion = plan(prompting.files, output, dtype)
    # The same command again, after a push that failed or for new evaluations, has no weights to write.
    title = name or run.resolve().name
    place = title if "/" in title else output.resolve().name

    def write_about(folder: Path) -> None:
        write_card(run, folder, title, place, evaluations, prompting.files.chat)

    if overwrite or not holds(conversion):
        conversion.check([directory], overwrite=overwrite)
        write_huggingface(conversion, overwrite=overwrite, progress=progress, add_files=write_about)
    else:
        renew_side_files(conversion)
        write_about(output)
    return output


def export_name(given: str | Path, found: FoundModel) -> str:
    """The export's name in its run directory: a checkpoint that was named does not replace the newest one's export."""
    named = Path(given).expanduser().absolute() == found.path.absolute()
    return f"{run_files.HUGGINGFACE}_{found.path.name}" if named else run_files.HUGGINGFACE


def _not_of_a_run(path: Path) -> str:
    """Why a model cannot be exported, and what to do instead."""
    from nemo_lmpo.formats.model_files import open_model

    if open_model(path).kind == "huggingface":
        return f"{path} is a Hugging Face directory already; to publish it, use `hf upload`"
    return (
        f"{path} does not belong to a run, which the model card would describe; to get its weights, use `nemo-lmpo "
        f"convert nemo-to-hf --input {path} --output DIR`"
    )


def write_card(
    run: Path, folder: Path, name: str, place: str, evaluations: Sequence[Path], chat: ChatRecord | None = None
) -> None:
    """The card and the pictures that it shows.

    Args:
        run: the run directory.
        folder: where they are written.
        name: of the model; `OWNER/NAME` on the hub.
        place: what the card's example loads.
        evaluations: as for :func:`export_run`.
        chat: what the model was trained with.
    """
    from nemo_lmpo.export.card import build_card
    from nemo_lmpo.report.plots import draw_all
    from nemo_lmpo.report.read import read_run

    read = read_run(run)
    pictures = []
    for picture in draw_all([read]):
        path = folder / PICTURES / f"{picture.chart.name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, picture.png)
        pictures.append((picture.chart.title, f"{PICTURES}/{path.name}"))
    card = build_card(read, name.rpartition("/")[2], place, pictures, read_evaluations(evaluations), chat)
    replace_file(folder / CARD, card)


def read_evaluations(folders: Sequence[Path]) -> list[Result]:
    """Results in the folders and right below them.

    Raises:
        DataError: one cannot be read.
    """
    places = [place for folder in folders for place in (folder, *sorted(folder.glob("*/")))]
    return [read_result(place) for place in places if (place / RESULT_FILE).exists()]
