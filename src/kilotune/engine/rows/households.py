"""The embedded demo data: home-assistant requests of six invented households, answered by a tool call in JSON.

Every home has its own rooms, devices, scenes, manners of speech, tools and habits (households.yaml), so the data are
non-IID by home; the schema of the tools is shared, so homes learn from each other. An answer is a function of
the request and of habits that stand in the home's training rows ("dim" is 30 in one home and 12 in another).
Rows follow from the seed alone, and the first homes' rows do not change with the number of homes.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from kilotune.core.errors import DataError
from kilotune.core.rng import stream
from kilotune.engine.files import write_bytes

ROWS_PER_HOUSEHOLD = 500
TEST_EVERY = 8
"""Every eighth request of a tool is held out: 12.5 %."""

MISSES = 200
"""Repeated wordings in a row after which a tool has said all it can."""

TIMED = 0.25
"""Share of the orders that name a time."""

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_QUARTERS = {0: "{h}", 15: "a quarter past {h}", 30: "half past {h}", 45: "a quarter to {next}"}
_DELAYS = (2, 5, 10, 15, 20, 30, 40, 45)


@dataclass(frozen=True)
class _Case:
    """One way to mean something: the words and the arguments they stand for ("n" is a number to be drawn)."""

    say: str
    args: dict[str, Any]
    order: bool
    timed: bool = False


@cache
def _homes() -> dict[str, Any]:
    text = files("kilotune.engine.rows").joinpath("households.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def names() -> list[str]:
    """The households' names in their fixed order."""
    return [home["name"] for home in _homes()["homes"]]


def number_words(number: int) -> str:
    """7 -> seven, 85 -> eighty-five (below 100)."""
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


def _clock(style: str, hour: int, minute: int) -> str:
    twelve, half = (hour - 1) % 12 + 1, "pm" if hour >= 12 else "am"
    if style == "spoken":
        words = _QUARTERS[minute].format(h=number_words(twelve), next=number_words(twelve % 12 + 1))
        return f"at {words} {'in the morning' if hour < 12 else 'tonight' if hour > 17 else 'in the afternoon'}"
    if style == "pm":
        return f"at {twelve}{f':{minute:02d}' if minute else ''}{half}"
    if style == "evening":  # this family only ever means the evening
        return f"at {twelve}:{minute:02d}"
    return {"military": f"at {hour:02d}{minute:02d}", "colon": f"at {hour}:{minute:02d}"}.get(
        style, f"@{hour:02d}:{minute:02d}"
    )


def _when(home: dict[str, Any], rng: np.random.Generator) -> tuple[str, dict[str, Any]]:
    """Words for a delay or a time of day, and the argument they stand for."""
    if rng.random() < 0.5:
        minutes = int(rng.choice(_DELAYS))
        if home["number"] == "words" and minutes in (15, 30):
            return f"in {'half an hour' if minutes == 30 else 'a quarter of an hour'}", {"after": minutes}
        number = number_words(minutes) if home["number"] == "words" else str(minutes)
        return home["delay"].format(n=number), {"after": minutes}
    hour = int(rng.integers(17, 23) if home["clock"] == "evening" else rng.integers(5, 23))
    minute = int(rng.choice([0, 15, 30, 45]))
    # "A quarter to one tonight" would leave the day; the spoken clock stays in its part of it.
    if home["clock"] == "spoken" and minute == 45 and hour in (11, 17):
        minute = 30
    return _clock(home["clock"], hour, minute), {"at": f"{hour:02d}:{minute:02d}"}


def _cases(tool: dict[str, Any], thing: dict[str, Any]) -> list[_Case]:
    """Everything that can be said about one thing; orders count twice, they are the usual way."""
    timed = tool.get("timed", True)
    orders = [_Case(p["say"], p.get("args", {}), True, timed and p.get("timed", True)) for p in tool["orders"]]
    remarks = [*tool.get("remarks", []), *thing.get("remarks", [])]
    return orders * 2 + [_Case(p["say"], p.get("args", {}), False) for p in remarks]


def _request(home: dict[str, Any], tool: dict[str, Any], rng: np.random.Generator) -> tuple[str, str]:
    """One request and its answer."""
    thing = tool["things"][rng.integers(len(tool["things"]))]
    cases = _cases(tool, thing)
    case = cases[rng.integers(len(cases))]
    answer = {"tool": tool["tool"], **thing["args"], **case.args}
    slots = {"it": thing["names"][rng.integers(len(thing["names"]))], "room": f"the {thing['args'].get('room')}"}
    for key in [key for key, value in case.args.items() if value == "n"]:
        answer[key] = int(rng.choice(_homes()["numbers"][tool["numbers"]]))
        slots["n"] = number_words(answer[key]) if home["number"] == "words" else str(answer[key])
    text = case.say.format(**slots)
    if case.timed and rng.random() < TIMED:
        when, moment = _when(home, rng)
        text, answer = f"{text} {when}", answer | moment
    frames = home["frames"] if case.order else home["asides"]
    text = frames[rng.integers(len(frames))].format(text)
    if text[-1] in ".?!":
        text = text[0].upper() + text[1:]
    return text, json.dumps(answer, separators=(",", ":"))


def _distinct(
    home: dict[str, Any], tool: dict[str, Any], seed: int, count: int, seen: set[str]
) -> list[dict[str, str]]:
    """Up to `count` requests for one tool whose texts are not in `seen`, which grows; fewer when wordings run out."""
    rng = stream(seed, "households", home["name"], tool["tool"])
    rows: list[dict[str, str]] = []
    misses = 0
    while len(rows) < count and misses < MISSES:
        text, answer = _request(home, tool, rng)
        misses += 1
        if text.lower() not in seen:
            misses = 0
            seen.add(text.lower())
            split = "test" if len(rows) % TEST_EVERY == TEST_EVERY - 1 else "train"
            rows.append(_row(home["name"], text, answer, tool["tool"], split))
    return rows


def _household(home: dict[str, Any], seed: int, count: int, seen: set[str]) -> list[dict[str, str]]:
    """Distinct requests of one home, shared out over its tools; the lights, which come last, fill what is missing."""
    tools = home["tools"][::-1]
    shares = np.array([tool["share"] for tool in tools], dtype=float)
    rows: list[dict[str, str]] = []
    for tool, share in zip(tools, shares / shares.sum(), strict=True):
        number = count - len(rows) if tool is tools[-1] else round(share * count)
        rows += _distinct(home, tool, seed, number, seen)
    if len(rows) < count:
        raise DataError(
            f"households: got rows_per_household = {count}, expected at most {len(rows)}: "
            f"{home['name']} has no more different requests."
        )
    order = stream(seed, "households", home["name"], "order").permutation(count)
    return [rows[i] for i in order]


def _row(client: str, text: str, answer: str, task: str, split: str) -> dict[str, str]:
    return {"client": client, "instruction": text, "input": "", "output": answer, "task": task, "split": split}


def generate(seed: int = 0, households: int = 6, rows_per_household: int = ROWS_PER_HOUSEHOLD) -> list[dict[str, str]]:
    """The rows: client, instruction (the request), input (empty), output (compact JSON), task (the tool), split."""
    homes = _homes()["homes"]
    if not 1 <= households <= len(homes):
        raise DataError(f"households: got {households} households, expected 1 to {len(homes)}.")
    seen: set[str] = set()
    return [row for home in homes[:households] for row in _household(home, seed, rows_per_household, seen)]


def write_jsonl(path: str | Path, seed: int = 0, households: int = 6) -> int:
    """Write the rows to a file, one JSON object a line; returns their number."""
    rows = generate(seed, households)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_bytes(Path(path), text.encode())
    return len(rows)
