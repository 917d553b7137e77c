"""`evaluate fetch`: the suites' data, from where their authors keep it, each file checked by its hash.

For login nodes: afterwards nothing but models and judges is asked over the network.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nemo_lmpo.answers.http import Client, ExchangeError
from nemo_lmpo.errors import DataError, UserError
from nemo_lmpo.evaluate.data_files import DF_GAMED_HASH, JudgePrompt, data_folder, load_set
from nemo_lmpo.evaluate.environment import run_program
from nemo_lmpo.evaluate.suites import ALPACA_EVAL, ARENA_HARD, TASKS
from nemo_lmpo.runtime.files import file_hash, replace_file
from nemo_lmpo.runtime.safe_yaml import load_yaml

_HUB = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval/resolve/main"
_ALPACA = "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/cd543a149df89434d8a54582c0151c0b945c3d20"
_ARENA = "https://raw.githubusercontent.com/lmarena/arena-hard-auto/196f6b826783b3da7310e361a805fa36f0be83f3"


@dataclass(frozen=True)
class RemoteFile:
    """One file."""

    name: str
    """In the data folder."""
    url: str
    sha256: str


_ANCHORS = {
    "Mistral-7B-Instruct-v0.2": "d4536ee76a8bfbff745b220da249c6f331242b73b63b8ce18d0f79c234959c36",
    "Meta-Llama-3-8B-Instruct": "c698a502f05b2de1270562073807a6161f0f335f3ed3879ba3666b1d8af1bec6",
    "Llama-3-Instruct-8B-SimPO": "dd66f4006899bf5419233a30c072fa6b837bdba6e94d9f46615b2c0ab9fb8416",
    "Mixtral-8x7B-Instruct-v0.1": "a8dd5de12218c9dffb37c1c40b2259031662c3d9c4f588e3c20026f8562db8aa",
    "zephyr-7b-beta": "bc6795b00c6cf6a1315f8b71738356adc7fcb8816d2199faf1a8ab56d982726d",
}
"""AlpacaEval answers of models near the paper's."""
SOURCES = (
    RemoteFile(
        "alpaca_eval2_eval_set.json",
        f"{_HUB}/alpaca_eval_gpt4_baseline.json",
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    ),
    RemoteFile("alpaca_eval2_df_gamed.csv", f"{_HUB}/df_gamed.csv", DF_GAMED_HASH),
    RemoteFile(
        "alpaca_eval2_leaderboard.csv",
        f"{_ALPACA}/src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv",
        "fe32bf85c2f7429038faa4c9a884d1d131726454ff84a4b810a91c1c7a2aa0e9",
    ),
    RemoteFile(
        "alpaca_eval2_glm_weights.csv",
        f"{_ALPACA}/src/alpaca_eval/metrics/weights/weighted_alpaca_eval_gpt4_turbo/"
        "length_controlled_v1/baseline_gpt4_1106_preview.csv",
        "3bd6d5a46327020f1b3eea79ac62d537f89a953d44ab0a6da83c954e36a23254",
    ),
    *(
        RemoteFile(f"alpaca_eval2_answers_{name}.json", f"{_ALPACA}/results/{name}/model_outputs.json", digest)
        for name, digest in _ANCHORS.items()
    ),
    RemoteFile(
        "arena_hard_v0.1_question.jsonl",
        f"{_ARENA}/data/arena-hard-v0.1/question.jsonl",
        "2650242d2883f22b2abd498f273b6a7e02253cce533f5c91a858e1d44aa3002f",
    ),
    RemoteFile(
        "arena_hard_v0.1_gpt-4-0314.jsonl",
        f"{_ARENA}/data/arena-hard-v0.1/model_answer/gpt-4-0314.jsonl",
        "0f6abc84de4600fde987d9db70f838f4ecdbd27a2f1f4058c12aa322a6f791b2",
    ),
    RemoteFile(
        "arena_hard_v0.1_gpt-3.5-turbo-0125.jsonl",
        f"{_ARENA}/data/arena-hard-v0.1/model_answer/gpt-3.5-turbo-0125.jsonl",
        "5cfec14570206ec251c3506d36951db87ca869757be75d6075a20120c3cbb616",
    ),
    RemoteFile(
        "arena_hard_v0.1_leaderboard_20240731.csv",
        f"{_ARENA}/leaderboard/arena_hard_leaderboard_20240731.csv",
        "dcc532f251a307f9cb23cb9ac04711e142157f32b934ee752a5456d336a6fe33",
    ),
)
_JUDGE = "arena_hard_v0.1_judge.json"
_JUDGE_PROMPT = RemoteFile(
    "", f"{_ARENA}/utils/judge_utils.py", "cbb093f4fc27408d8447e946392f26f98538b1e3950f574aca91a0f7595167b4"
)
_JUDGE_CONFIG = RemoteFile(
    "", f"{_ARENA}/config/arena-hard-v0.1.yaml", "87ac45a188421218349697b5eda95cc77f6e60b6f61495d67d8cfebba3210528"
)
Download = Callable[[str], bytes]


def fetch(options: argparse.Namespace) -> Path:
    """Fetch what is missing or damaged; returns the folder.

    Raises:
        UserError: something cannot be fetched, or is another file than it was; what was fetched is kept.
    """
    folder = options.data or data_folder(None)
    folder.mkdir(parents=True, exist_ok=True)
    fetch_files(folder, download, quiet=options.quiet)
    for suite in (ALPACA_EVAL, ARENA_HARD):
        load_set(suite, folder)
    if options.tasks:
        harness = list(dict.fromkeys(task.harness for task in TASKS))
        run_program("fetch_tasks", {"tasks": harness}, log=folder / "fetch_tasks.log", reads_hub=True)
    return folder


def fetch_files(folder: Path, download: Download, *, quiet: bool) -> None:
    """Every file, each written when it is whole and right."""
    with tqdm(total=len(SOURCES) + 1, desc="fetch", unit="file", disable=True if quiet else None) as bar:
        for source in SOURCES:
            path = folder / source.name
            if not (path.is_file() and file_hash(path) == source.sha256):
                replace_file(path, verified(source, download))
            bar.update(1)
        if not (folder / _JUDGE).is_file():
            replace_file(folder / _JUDGE, judge_prompt(download))
        bar.update(1)


def verified(source: RemoteFile, download: Download) -> bytes:
    """A file's content.

    Raises:
        DataError: it is not the file that it was.
    """
    content = download(source.url)
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise DataError(
            f"{source.url} has hash {found[:12]}, not {source.sha256[:12]}: it was changed or cut off; try again, "
            "or put the right file into the folder by hand"
        )
    return content


def judge_prompt(download: Download) -> str:
    """Arena-Hard's judge prompt as JSON, from the released code and configuration.

    Raises:
        DataError: they are not the released ones.
    """
    code = ast.parse(verified(_JUDGE_PROMPT, download))
    texts = [
        ast.literal_eval(node.value)
        for node in code.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    template = load_yaml(verified(_JUDGE_CONFIG, download))["prompt_template"]
    prompt = next((found for found in (JudgePrompt(text, template) for text in texts) if found.published), None)
    if prompt is None:
        raise DataError(f"{_JUDGE_PROMPT.url} holds no judge prompt of Arena-Hard v0.1")
    return json.dumps({"system": prompt.system, "template": prompt.template}, indent=1)


def download(url: str) -> bytes:
    """A file from the network, tried again where that may help.

    Raises:
        UserError: it cannot be had.
    """
    client = Client(120, redirects=True)
    try:
        reply = client.ask("GET", url, retries=4, backoff=1.0, stop=threading.Event())
    except ExchangeError as error:
        raise UserError(f"{url} {error}; run fetch where there is a network, and name the folder with --data") from None
    finally:
        client.close()
    if not reply.ok:
        raise UserError(f"{url} cannot be fetched (status {reply.status}); try again later")
    return reply.content
