"""A client in a process of its own that says what it does: telling_client.py RECIPE_JSON JOIN_FILE OUTPUT.

Its events are lines on its stdout, which `TellingClient` reads.
"""

import json
import os
import re
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path

STEP = re.compile(r"round (\d+) step (\d+)/")
SOURCE = Path(__file__).parents[2] / "src"


class TellingClient:
    """The process, an event for every (round, step) it has taken, and its weights at the end."""

    def __init__(self, folder, join, recipe):
        path = folder.with_suffix(".json")
        path.write_text(json.dumps(recipe))
        self._command = [sys.executable, __file__, path, join, folder]
        self.steps = defaultdict(threading.Event)
        self.digest = None
        self.start()

    def start(self):
        """Start, or start again."""
        env = os.environ | {"PYTHONPATH": str(SOURCE)}
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=env)
        self._listener = threading.Thread(target=self._listen, args=(self.process.stdout,))
        self._listener.start()

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._listener.join()
        self.process.stdout.close()

    def _listen(self, lines):
        for line in lines:
            event = json.loads(line) if line.endswith("\n") else {}  # or the process was killed within it
            if found := STEP.match(event.get("what", "")):
                self.steps[int(found[1]), int(found[2])].set()
            self.digest = event.get("digest")


def main():
    from kilotune.engine.composing.compose import build
    from kilotune.engine.deployed import join

    recipe, invitation, output = map(Path, sys.argv[1:])
    plan = build(json.loads(recipe.read_text()), "federate")
    summary = join(plan, invitation, output, 60.0, None, tell)
    tell({"event": "left", **summary})


def tell(event):
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
