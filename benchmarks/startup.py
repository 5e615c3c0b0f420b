"""Start-up: help, plan, load, first token, and how soon each command says something; in seconds, against targets."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import Measurement, write_measurements

BASE = "smollm2-135m"
FIRST_WORD_S = 1.0
TRIES = 3

LOAD = f"""
import time
started = time.perf_counter()
import torch, transformers
from kilotune.engine.model.lean import lean_imports
with lean_imports():
    from transformers.models.llama import modeling_llama
from kilotune.engine.model.base import load_base
imported = time.perf_counter()
load_base({BASE!r}, writable=True)
print(imported - started, time.perf_counter() - imported)
"""
TOKEN = f"""
import time
started = time.perf_counter()
from kilotune.engine.model.lean import unhurried_gc
with unhurried_gc():
    from kilotune.engine.model.talking import Talker
talker = Talker({BASE!r}, None, False, 0.0, 8)
next(talker.tuned([{{"role": "user", "content": "What is the capital of France?"}}]))
print(time.perf_counter() - started)
"""
PLAIN = f"""
import time
started = time.perf_counter()
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from kilotune.engine.model.sources import find_folder
folder = str(find_folder({BASE!r}, None, None, None))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
turns = [{{"role": "user", "content": "What is the capital of France?"}}]
prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
model.generate(**prompt, max_new_tokens=1, do_sample=False)
print(time.perf_counter() - started)
"""


def environment() -> dict[str, str]:
    """As a user's: compiled modules may be kept."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def seconds(words: list[str]) -> list[float]:
    """Of whole processes, after one that fills the caches."""
    taken = []
    for _ in range(TRIES + 1):
        started = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
        taken.append(time.perf_counter() - started)
    return taken[1:]


def printed(program: str, tries: int = TRIES) -> list[list[float]]:
    """What a program prints, from several processes."""
    words = [sys.executable, "-c", program]
    runs = [subprocess.run(words, check=True, capture_output=True, text=True, env=environment()) for _ in range(tries)]
    return [[float(word) for word in run.stdout.splitlines()[-1].split()] for run in runs]


def first_word(arguments: list[str]) -> float:
    """Seconds until a command's first byte on stderr or stdout; the process is then stopped."""
    words = [sys.executable, "-m", "kilotune", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0, env=environment())
    assert process.stdout is not None, "the pipe was asked for"
    process.stdout.read(1)
    taken = time.perf_counter() - started
    process.kill()
    process.stdout.close()
    process.wait()
    return taken


def commands(folder: Path) -> dict[str, list[str]]:
    """One call of every command; what does not exist is said no later."""
    out = str(folder / "out")
    return {
        "tune": ["tune", "local_lora", "--output", out],
        "federate": ["federate", "--output", out],
        "server init": ["server", "init", str(folder / "keys"), "-c", "ada"],
        "server run": ["server", "run", "--keys", str(folder / "keys"), "--output", out],
        "client": ["client", str(folder / "ada.join"), "--data", "households", "--output", out],
        "evaluate": ["evaluate", BASE, "--data", "households"],
        "chat": ["chat", BASE, "--prompt", "hello"],
        "replay": ["replay", out],
        "apply": ["apply", str(folder / "x.seed"), "--base", BASE, "--output", out],
        "merge": ["merge", BASE, "--output", out],
        "export": ["export", BASE, "--output", out],
        "plan": ["plan"],
        "methods": ["methods"],
        "recipe list": ["recipe", "list"],
        "recipe show": ["recipe", "show", "kilotune"],
        "recipe check": ["recipe", "check", "kilotune"],
        "data show": ["data", "show", "households"],
        "data households": ["data", "households", "--output", str(folder / "rows.jsonl")],
        "doctor": ["doctor"],
    }


def row(what: str, taken: list[float], target: float, beside: str) -> Measurement:
    spread = f"{len(taken)} runs, {min(taken):.2f}-{max(taken):.2f} s"
    return Measurement(what, f"{median(taken):.2f} s", beside, median(taken), target, "lower", spread, headline=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/startup"))
    arguments = parser.parse_args()
    program = [sys.executable, "-m", "kilotune"]
    empty = f"python -c pass: {median(seconds([sys.executable, '-c', 'pass'])):.2f} s"
    found = [row("kilotune --help", seconds([*program, "--help"]), 0.5, empty)]
    found.append(row("kilotune plan kilotune", seconds([*program, "plan", "kilotune"]), 3.0, "figures in the cache"))
    loads = printed(LOAD)
    imports = median(load[0] for load in loads)
    found.append(row("model load", [load[1] for load in loads], 2.0, f"imports before it: {imports:.2f} s"))
    ours, plain = ([run[0] for run in printed(program, 2)] for program in (TOKEN, PLAIN))
    spread = f"2 runs, {min(ours):.2f}-{max(ours):.2f} s"
    said, beside = f"{min(ours):.2f} s", f"{min(plain):.2f} s, transformers alone"
    found.append(Measurement("start to first token", said, beside, min(ours) / min(plain), 1.0, "lower", spread))
    with tempfile.TemporaryDirectory() as folder:
        waits = {name: first_word(words) for name, words in commands(Path(folder)).items()}
    slowest = max(waits, key=lambda name: waits[name])
    said = f"{waits[slowest]:.2f} s at most"
    spread = f"{min(waits.values()):.2f}-{max(waits.values()):.2f} s"
    what = f"first word of {len(waits)} commands"
    found.append(Measurement(what, said, f"slowest: {slowest}", waits[slowest], FIRST_WORD_S, "lower", spread))
    notes = ["Ratios are seconds, except for the first token.", f"Load average at the end: {os.getloadavg()[0]:.1f}."]
    notes += ["First words: " + ", ".join(f"{name} {wait:.2f} s" for name, wait in waits.items()) + "."]
    write_measurements(arguments.output, "Start-up and feel", found, notes)


if __name__ == "__main__":
    main()
