"""Write a run as a Hugging Face directory: weights, tokenizer, chat template, generation config and model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_lmpo.errors import CheckpointError
from nemo_lmpo.evaluate.result import RESULT_FILE, Result, read_result
from nemo_lmpo.runtime.atomic import replace_file

CARD, PICTURES, TEMPLATE = "README.md", "figures", "chat_template.jinja"


def export_run(
    run: Path,
    output: Path,
    *,
    dtype: str | None = None,
    name: str | None = None,
    evaluations: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Export a run's newest checkpoint; returns ``output``, which `transformers` and vLLM load.

    Args:
        run: the run directory.
        output: appears when the weights are complete.
        dtype: `bf16`, `fp16` or `fp32`; by default as stored.
        name: of the model, or `OWNER/NAME` on the hub; by default the run directory's.
        evaluations: folders of :mod:`nemo_lmpo.evaluate` whose results the card shows.
        overwrite: replace an output that is there.

    Raises:
        UserError: no run with a checkpoint, no room, or an output that is there.
    """
    from nemo_lmpo.formats.conversion import plan, write_huggingface
    from nemo_lmpo.generate.engine import newest_checkpoint, open_prompting

    if not (run / "checkpoints").is_dir():
        raise CheckpointError(f"{run} is no run with checkpoints; give a run directory")
    directory = newest_checkpoint(run)
    prompting = open_prompting(directory)
    conversion = plan(prompting.files, output, dtype)
    conversion.check([directory], overwrite=overwrite)
    write_huggingface(conversion)
    # As trained: the tokenizer's own may be another.
    replace_file(output / TEMPLATE, prompting.encoder.chat.template)
    write_card(run, output, name or run.resolve().name, evaluations)
    return output


def write_card(run: Path, output: Path, name: str, evaluations: Sequence[Path]) -> None:
    """The card and the pictures that it shows."""
    from nemo_lmpo.export.card import Card, build_card
    from nemo_lmpo.report.plots import draw_all
    from nemo_lmpo.report.read import read_config, read_run

    read = read_run(run)
    pictures = []
    for picture in draw_all([read]):
        path = output / PICTURES / f"{picture.chart.name}.png"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, picture.png)
        pictures.append((picture.chart.title, f"{PICTURES}/{path.name}"))
    place = name if "/" in name else str(output)
    card = Card(name.rpartition("/")[2], place, read, read_config(run), pictures, read_evaluations(evaluations))
    replace_file(output / CARD, build_card(card))


def read_evaluations(folders: Sequence[Path]) -> list[Result]:
    """Results in the folders and right below them.

    Raises:
        DataError: one cannot be read.
    """
    places = [place for folder in folders for place in (folder, *sorted(folder.glob("*/")))]
    return [read_result(place) for place in places if (place / RESULT_FILE).exists()]


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Push an exported directory to the hub; returns its address.

    Raises:
        CheckpointError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api = HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message="Upload by nemo_lmpo")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"--push-to-hub {repository}: the hub refuses ({reason}); log in with `hf auth login` and check the name. "
            f"The export is kept in {directory}"
        ) from None
    return str(address)
