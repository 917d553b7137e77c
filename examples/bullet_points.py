"""A format that can be counted: lists of so many bullet points. Prompts, the reward, and the mean reward of answers.

`python bullet_points.py prompts FOLDER` writes `train.jsonl` and `held_out.jsonl` to the folder;
`python bullet_points.py score ANSWERS.jsonl` tells the mean reward of what `nemo-lmpo generate` wrote.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

BULLET = re.compile(r"\s*[-*\u2022]\s+\S")
THINGS = {
    "train": "animals;fruits;vegetables;colours;countries;capitals;rivers;mountains;sports;tools;vehicles;drinks;"
    "desserts;spices;trees;flowers;birds;fishes;insects;planets;metals;gases;musical instruments;dances;board games;"
    "card games;professions;rooms of a house;pieces of furniture;kitchen utensils;items of clothing;kinds of weather;"
    "seasons;months;days of the week;shapes;numbers;letters;languages;currencies;school subjects;holidays;"
    "hobbies;emotions;materials;fabrics;buildings;islands",
    "held_out": "cities;lakes;seas;nuts;herbs;cheeses;soups;dog breeds;wild animals;farm animals;planes;ships;"
    "art styles;writers;painters;scientists",
}
COUNTS = {"train": (3, 4), "held_out": (3, 4, 5)}


def bullet_points(prompt: str, answers: Sequence[str]) -> list[float]:
    """1 for a list of as many bullet points as asked for and nothing else; half for each of the two.

    Half a point: every line begins with a bullet. Half a point: the number of lines is the one in the prompt.
    """
    found = re.search(r"\d+", prompt)
    assert found is not None, prompt
    scores = []
    for answer in answers:
        lines = [line for line in answer.splitlines() if line.strip()]
        bullets = bool(lines) and all(BULLET.match(line) for line in lines)
        scores.append(0.5 * bullets + 0.5 * (len(lines) == int(found.group())))
    return scores


def write_prompts(folder: Path) -> None:
    """No thing that is asked for is in both files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, things in THINGS.items():
        rows = [
            {"prompt": f'List {count} {thing}, one per line. Begin each line with "- ".'}
            for thing in things.split(";")
            for count in COUNTS[part]
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def score(answers: Path) -> str:
    """Mean reward of answers, how many keep the format entirely, and their length."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rewards = [bullet_points(row["prompt"], [row["response"]])[0] for row in rows]
    whole = sum(reward == 1.0 for reward in rewards)
    words = fmean(len(row["response"].split()) for row in rows)
    return f"mean reward {fmean(rewards):.3f}; {whole} of {len(rows)} as asked for; {words:.1f} words per answer"


if __name__ == "__main__":
    job, path = sys.argv[1], Path(sys.argv[2])
    if job == "prompts":
        write_prompts(path)
    else:
        sys.stdout.write(f"{path}: {score(path)}\n")
