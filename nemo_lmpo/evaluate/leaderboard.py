"""Ten tasks of the Open LLM Leaderboard, by `lm_eval` in the scoring environment."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from nemo_lmpo.answers.completions import check_can_echo, refused_neutral
from nemo_lmpo.answers.endpoint import choose_model
from nemo_lmpo.answers.identity import claim_folder
from nemo_lmpo.errors import CheckpointError, ConfigError, DataError, UserError
from nemo_lmpo.evaluate.environment import NO_PROXY, all_packages, run_program
from nemo_lmpo.evaluate.model import default_name, describe
from nemo_lmpo.evaluate.pairwise import LOCK_SECONDS, lasting, open_endpoint
from nemo_lmpo.evaluate.relay import Relay
from nemo_lmpo.evaluate.result import RESULT_FILE, SETTINGS_FILE, Model, Result, Value, write_result
from nemo_lmpo.evaluate.suites import LEADERBOARD, TASKS, Task
from nemo_lmpo.formats.find_model import find_model
from nemo_lmpo.runtime.files import content_hash, directory_lock, read_json

if TYPE_CHECKING:
    from nemo_lmpo.answers.engine import Prompting

_RELAY_SECONDS = 10**6
"""That the harness waits for a reply: longer than all tries may take."""
TASKS_FOLDER, EXPORT_FOLDER = "tasks", "huggingface"

_logger = logging.getLogger("nemo_lmpo")


def find_tasks(names: str) -> list[Task]:
    """Tasks by name, or those of `v1` or `v2`, each once and in the paper's order.

    Raises:
        ConfigError: an unknown name.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {task.name for task in TASKS}
    unknown = [name for name in wanted if name not in known | {"v1", "v2"}]
    if unknown or not wanted:
        raise ConfigError(
            f"--tasks {unknown[0] if unknown else names!r} is unknown; choose v1, v2, {', '.join(sorted(known))}"
        )
    return [task for task in TASKS if task.name in wanted or task.version in wanted]


def run(options: argparse.Namespace, command: str) -> Path:
    """Run the tasks that are missing; returns the folder with `result.json`.

    Raises:
        UserError: names what is wrong; finished tasks are kept.
    """
    tasks = find_tasks(options.tasks)
    versions = all_packages()
    if options.task_data is not None and not options.task_data.is_dir():
        raise ConfigError(
            f"--task-data {options.task_data} is not a directory; give one with a TASK.jsonl for each task"
        )
    path = find_model(options.model).path
    from nemo_lmpo.answers.engine import open_prompting

    prompting = open_prompting(path)
    folder = (options.output or Path("evals") / (options.name or default_name(options.model))) / LEADERBOARD
    folder.mkdir(parents=True, exist_ok=True)
    with directory_lock(folder, patience=LOCK_SECONDS, option="--output "):
        model = describe(options, prompting, folder)
        with _harness_model(options, prompting, folder) as (told, generation):
            claim_folder(folder, SETTINGS_FILE, _identity(options, model, generation))
            _run_tasks(options, tasks, folder, told)
        _write(options, folder, model, generation, versions, command)
    return folder


def _identity(options: argparse.Namespace, model: Model, generation: Mapping[str, Any]) -> dict[str, Any]:
    hashes = (model.weights_sha256, model.template_sha256, model.tokenizer_sha256)
    rows = str(options.task_data.resolve()) if options.task_data else "the Hub"
    return {"model": hashes, "limit": options.limit, "task rows": rows, "generation": lasting(generation)}


@contextmanager
def _harness_model(
    options: argparse.Namespace, prompting: Prompting, folder: Path
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The harness's description of the model, and what of it decides numbers; a server is relayed meanwhile."""
    bos = prompting.tokenizer.bos_token_id
    chat = prompting.encoder.chat
    told = {
        "chat_template": chat.template,
        "system_prompt": chat.system_prompt,
        "adds_bos": bos is not None and prompting.tokenizer("a")["input_ids"][:1] == [bos],
    }
    exported = str(huggingface_form(prompting, folder / EXPORT_FOLDER, weights=options.endpoint is None))
    arguments: dict[str, Any] = {"max_length": prompting.files.architecture.max_position_embeddings}
    if options.endpoint is None:
        own, generation = _in_process(options, exported)
        yield {**told, "kind": "hf", "arguments": {**arguments, **own}}, generation
        return
    endpoint = open_endpoint("--endpoint", options.endpoint, options, options.key)
    served = choose_model(endpoint, options.served_name, "--served-name")
    probe = prompting.tokenizer("What is it?")["input_ids"]
    check_can_echo(endpoint, served, probe)
    left_out = refused_neutral(endpoint, served, probe)
    generation = {"backend": "endpoint", "endpoint": endpoint.shown, "served_name": served, "dtype": "the server's"}
    if left_out:
        generation["left to the server"] = left_out
    with Relay(endpoint, left_out).open() as relay:
        arguments |= {"model": served, "base_url": f"{relay.base}/completions", "tokenizer": exported}
        # The relay tries again, and has the deadlines.
        arguments |= {"num_concurrent": options.concurrency, "max_retries": 1, "timeout": _RELAY_SECONDS}
        arguments["tokenizer_backend"] = "huggingface"
        try:
            yield {**told, "kind": "endpoint", "arguments": arguments, "token": relay.token}, generation
        except UserError:
            relay.failures.raise_first()
            raise


def _in_process(options: argparse.Namespace, exported: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's arguments for its own `transformers`, and what of them decides numbers."""
    from nemo_lmpo.answers.engine import choose_device
    from nemo_lmpo.answers.in_process import DTYPES, default_dtype

    device = choose_device(options.device)
    dtype = options.dtype or default_dtype(device)
    generation = {"backend": "transformers", "device": device, "dtype": dtype, "batch_size": options.batch_size}
    arguments = {"pretrained": exported, "dtype": str(DTYPES[dtype]).removeprefix("torch.")}
    return {**arguments, "device": device, "batch_size": options.batch_size}, generation


def export(given: str, output: Path) -> Path:
    """Where a server finds a model as a Hugging Face directory: itself, or ``output`` made of it.

    Raises:
        CheckpointError: there is no such model, it cannot be converted, or ``output`` is another one.
    """
    path = find_model(given).path
    from nemo_lmpo.answers.engine import open_prompting

    return huggingface_form(open_prompting(path), output, weights=True)


def huggingface_form(prompting: Prompting, output: Path, *, weights: bool) -> Path:
    """The model as the harness reads it: itself, or converted beside the results.

    Raises:
        CheckpointError: it cannot be converted, there is no room, or ``output`` holds something else.
    """
    if prompting.files.kind == "huggingface":
        return prompting.directory.resolve()
    if not weights:
        folder = output.with_name("tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        prompting.tokenizer.save_pretrained(folder)
        return folder.resolve()
    from nemo_lmpo.formats.conversion import holds, plan, renew_side_files, write_huggingface

    conversion = plan(prompting.files, output)
    if holds(conversion):
        renew_side_files(conversion)
        return output.resolve()
    if output.is_dir() and any(output.iterdir()):
        raise CheckpointError(
            f"{output} holds something else than {prompting.directory}; remove it, or choose another place"
        )
    _logger.info("export: %s", output)
    if output.is_dir():
        output.rmdir()
    conversion.check([prompting.directory], overwrite=False)
    write_huggingface(conversion)
    return output.resolve()


def _run_tasks(options: argparse.Namespace, tasks: Sequence[Task], folder: Path, told: Mapping[str, Any]) -> None:
    request = {
        "model": {name: value for name, value in told.items() if name != "token"},
        "tasks": [asdict(task) for task in tasks],
        "folder": str((folder / TASKS_FOLDER).resolve()),
        "data": str(options.task_data.resolve()) if options.task_data else None,
        "limit": options.limit,
    }
    with tqdm(total=len(tasks), desc="leaderboard", unit="task", disable=True if options.quiet else None) as bar:

        def on_line(line: str) -> None:
            if line.startswith("done "):
                bar.update(1)

        # The harness takes a server's key from there, here the relay's token.
        variables = {"OPENAI_API_KEY": str(told.get("token", "none")), **NO_PROXY}
        log, hub = folder / "lm_eval.log", options.task_data is None
        run_program("run_tasks", request, log=log, environment=variables, on_line=on_line, reads_hub=hub)


def read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Finished tasks by name, in the paper's order.

    Raises:
        DataError: a file is damaged.
    """
    found = {}
    for task in TASKS:
        path = folder / TASKS_FOLDER / f"{task.name}.json"
        if not path.exists():
            continue
        content = read_json(path)
        try:
            rows = [
                [f"{name}/{document}", value] for name, pairs in content["scores"].items() for document, value in pairs
            ]
            found[task.name] = {**content, "ids": [row[0] for row in rows], "values": [100 * row[1] for row in rows]}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path} is damaged; remove it and run the same command again") from None
    return found


def _write(
    options: argparse.Namespace,
    folder: Path,
    model: Model,
    generation: Mapping[str, Any],
    versions: Mapping[str, str],
    command: str,
) -> None:
    scores = read_scores(folder)
    # A stream a task: tasks are resampled on their own.
    values = {
        name: Value.mean(np.array(one["values"]), stream=place) for place, (name, one) in enumerate(scores.items())
    }
    versions_of_tasks = dict(itertools.chain.from_iterable(one["versions"].items() for one in scores.values()))
    count = sum(len(one["values"]) for one in scores.values())
    result = Result(
        suite=LEADERBOARD,
        model=model,
        values=values,
        n=count,
        of=count if options.limit is None and options.task_data is None else -1,
        generation=generation,
        packages=versions,
        evaluation_set={
            "name": "lm_eval tasks, rows from the Hub" if options.task_data is None else "lm_eval tasks, own rows",
            "sha256": content_hash({name: one["ids"] for name, one in scores.items()}),
            "published": "yes" if options.task_data is None else "no",
        },
        command=command,
        details={"task versions": versions_of_tasks, "tasks": {name: one["task"] for name, one in scores.items()}},
    )
    units = {name: {"ids": one["ids"], "values": one["values"]} for name, one in scores.items()}
    write_result(folder, result, units)
    for name, value in values.items():
        _logger.info("%s %.2f", name, value.value)
    _logger.info("%s", folder / RESULT_FILE)
