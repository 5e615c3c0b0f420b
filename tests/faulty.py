"""The faulty network of the benchmarks, for tests."""

import importlib.util
import sys
from pathlib import Path

PLACE = Path(__file__).parents[1] / "benchmarks" / "faulty_network.py"
spec = importlib.util.spec_from_file_location("faulty_network", PLACE)
assert spec is not None and spec.loader is not None, f"{PLACE} is a part of this repository"
module = sys.modules["faulty_network"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

FaultyNetwork = module.FaultyNetwork
