"""Slices: how long a recipe's own training step takes on one layer of its base, measured on this machine once.

A model of one layer and a model of three, as wide as the base and with its vocabulary, run the very code of a run:
attach, estimate, update. Their difference is the cost of a layer; what is left of the small one is the cost of
embedding, head and optimizer. A step of the whole model is put together from these, so nothing is fitted to whole
runs. The figures are kept in the cache, per machine, base, parametrization, estimator and optimizer.
"""

import contextlib
import gc
import hashlib
import json
import os
import platform
import time
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from kilotune.core.errors import KilotuneError
from kilotune.core.rng import stream
from kilotune.engine.cache import cache_folder, fingerprint
from kilotune.engine.composing.plan import Plan
from kilotune.engine.files import write_bytes

__all__ = ["SMALL", "figures", "remembered_figures"]

FORMAT = 1  # of the figures: a change measures anew
SMALL, LARGE = 1, 3  # layers
SHORT, LONG = 128, 512  # tokens of a batch
FEW, MANY = 32, 192  # labels among them
ROW = 64  # tokens of a row
TRIES, MOST_S = 3, 20.0  # of every point at least; of all together at most
SETTLED = 1.1  # so near the fastest try the next one has to come, or both may have met a busy machine
Figures = dict[str, Any]


def _key(plan: Plan, folder: Path) -> Path:
    """The file that keeps the figures of all plans whose steps cost the same."""
    parts = {key: getattr(plan, key) for key in ("parametrization", "basis", "estimator", "optimizer")}
    facts: dict[str, Any] = {
        key: None if part is None else [part.method_name(), part.model_dump(mode="json")] for key, part in parts.items()
    }
    if plan.basis is not None and plan.basis.one_pass:
        facts["basis"][1].pop("size")  # any number of directions costs one pass
    for key in ("lr", "epsilon"):
        for part in ("optimizer", "estimator"):
            facts[part][1].pop(key, None)
    facts["machine"] = [FORMAT, platform.machine(), _processor(), plan.recipe.threads or os.cpu_count()]
    facts["compute"] = [metadata.version("torch"), plan.recipe.precision]
    facts["base"] = fingerprint([folder / "config.json"])
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "slices" / f"{digest[:32]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def remembered_figures(plan: Plan, folder: Path) -> Figures | None:
    """What was measured earlier, if it was."""
    try:
        content: Figures = json.loads(_key(plan, folder).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return content


def figures(plan: Plan, folder: Path) -> Figures:
    """Measure, and remember. Takes some seconds after torch and transformers are imported."""
    found = _measure(plan, folder)
    with contextlib.suppress(OSError, KilotuneError):  # a cache that cannot be written costs time, no more
        write_bytes(_key(plan, folder), json.dumps(found, sort_keys=True).encode("ascii"))
    return found


def _measure(plan: Plan, folder: Path) -> Figures:
    import torch

    from kilotune.engine.model.lean import quietly

    torch.set_num_threads(plan.recipe.threads or torch.get_num_threads())
    with quietly():
        idle = _resident_imports(plan)
        slices = {SMALL: _Slice(plan, folder, SMALL)}
        idle = max(idle, _resident() - slices[SMALL].weights_bytes())  # attaching may import more
        slices[LARGE] = _Slice(plan, folder, LARGE)
    points = [(SMALL, SHORT, FEW), (SMALL, LONG, FEW), (SMALL, LONG, MANY), (LARGE, SHORT, FEW), (LARGE, LONG, FEW)]
    kept: dict[int, int] = {}
    for layers, tokens, labels in points:
        one = slices[layers]
        bytes_kept = one.kept(tokens, labels)
        if (tokens, labels) == (LONG, FEW):
            kept[layers] = bytes_kept
    tried: dict[tuple[int, int, int], list[float]] = {point: [] for point in points}
    started = time.monotonic()
    while not all(map(settled, tried.values())) and time.monotonic() - started < MOST_S:
        for layers, tokens, labels in points:  # in turns, so that a busy spell of the machine meets all
            tried[layers, tokens, labels].append(slices[layers].step(tokens, labels))
    seconds = {point: min(times) for point, times in tried.items()}
    return _solve(seconds, kept) | {"idle_bytes": idle, "wire": {str(n): s.wire() for n, s in slices.items()}}


def settled(times: list[float]) -> bool:
    """Whether the fastest of some tries can be believed: two of them are nearly as fast."""
    return len(times) >= TRIES and sorted(times)[:2][-1] <= SETTLED * min(times)


def _solve(seconds: dict[tuple[int, int, int], float], kept: dict[int, int]) -> Figures:
    """Seconds of a layer and of the rest as straight lines; bytes kept per token for the backward pass."""
    more = LARGE - SMALL
    layer_short = max(0.0, seconds[LARGE, SHORT, FEW] - seconds[SMALL, SHORT, FEW]) / more
    layer_long = max(0.0, seconds[LARGE, LONG, FEW] - seconds[SMALL, LONG, FEW]) / more
    per_token = max(0.0, layer_long - layer_short) / (LONG - SHORT)
    label = max(0.0, seconds[SMALL, LONG, MANY] - seconds[SMALL, LONG, FEW]) / (MANY - FEW)
    rest_short = max(0.0, seconds[SMALL, SHORT, FEW] - layer_short - FEW * label)
    rest_long = max(0.0, seconds[SMALL, LONG, FEW] - layer_long - FEW * label)
    rest_token = max(0.0, rest_long - rest_short) / (LONG - SHORT)
    per_layer = (kept[LARGE] - kept[SMALL]) / more
    return {
        "layer_s": max(0.0, layer_short - SHORT * per_token),
        "layer_token_s": per_token,
        "rest_s": max(0.0, rest_short - SHORT * rest_token),
        "rest_token_s": rest_token,
        "label_s": label,
        "layer_token_bytes": per_layer / LONG,
        "rest_token_bytes": max(0.0, kept[SMALL] - per_layer) / LONG,
    }


def _resident_imports(plan: Plan) -> int:
    """Bytes of a process that has loaded all a run needs, but no model."""
    import rouge_score.rouge_scorer  # noqa: F401 - part of what a run imports

    import kilotune.engine.session
    from kilotune.engine.model.lean import lean_imports

    with lean_imports():
        from transformers import AutoModelForCausalLM  # noqa: F401
        from transformers.modeling_utils import PreTrainedModel  # noqa: F401
    if plan.basis is not None:
        import kilotune.core.kernels  # noqa: F401
    return _resident()


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


class _Slice:
    """A base of few layers with a plan attached, ready to step."""

    def __init__(self, plan: Plan, folder: Path, layers: int) -> None:
        from kilotune.engine.training.step import Memory

        self.plan = plan
        model = _model(folder, layers)
        self.vocabulary = int(model.get_input_embeddings().weight.shape[0])
        self.trainable = plan.parametrization.attach(model, basis=plan.basis, seed=0)
        self.memory = Memory.empty()
        self.trainable.begin(0, plan.estimator.forward_only)
        self.trainable.take_up({})

    def weights_bytes(self) -> int:
        """Of all its weights, a tied one once."""
        return sum(param.numel() * param.element_size() for param in self.trainable.model.parameters())

    def wire(self) -> dict[str, int]:
        """Numbers of each tensor that is sent."""
        return {name: prod(shape) for name, shape in self.trainable.shapes().items()}

    def step(self, tokens: int, labels: int) -> float:
        """Seconds of one training step."""
        from kilotune.engine.model.compute import Compute
        from kilotune.engine.rows.batches import micro_batches
        from kilotune.engine.training.step import BatchObjective, train_step

        recipe = self.plan.recipe.model_copy(update={"micro_batch_tokens": 1 << 30, "checkpointing": 0.0})
        model = self.trainable.model
        rows = examples(tokens, labels, self.vocabulary)
        gc.collect()
        started = time.perf_counter()
        objective = BatchObjective(model, micro_batches(rows, recipe, model, 0), Compute.of(recipe))
        plan, rng = self.plan, stream(0, "slice", "step")
        train_step(self.trainable, plan.estimator, plan.optimizer, objective, self.memory, 1.0, rng)
        return time.perf_counter() - started

    def kept(self, tokens: int, labels: int) -> int:
        """Bytes of what one step keeps for its backward pass, each piece of memory counted once."""
        from torch.autograd.graph import saved_tensors_hooks

        weights = {param.untyped_storage().data_ptr() for param in self.trainable.model.parameters()}
        seen: dict[int, int] = {}

        def pack(value: Any) -> Any:
            storage = value.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage.nbytes()
            return value

        with saved_tensors_hooks(pack, lambda value: value):
            self.step(tokens, labels)
        return sum(seen.values())


def _model(folder: Path, layers: int) -> Any:
    """As wide as the base, random, of few layers."""
    import torch
    from transformers import AutoConfig
    from transformers.initialization import no_init_weights

    from kilotune.engine.model.lean import lean_imports
    from kilotune.engine.model.sources import model_class

    with lean_imports():
        config = AutoConfig.from_pretrained(str(folder))
        kinds = getattr(config, "layer_types", None)
        config.num_hidden_layers = layers
        if kinds:
            config.layer_types = kinds[:layers]
        architecture = model_class(folder)
    with no_init_weights():
        model = architecture(config).float()
    model.tie_weights()
    rng = torch.Generator().manual_seed(0)
    for param in model.parameters():
        one = torch.ones(param.shape)
        param.data = one.uniform_(-0.03, 0.03, generator=rng) if param.dim() > 1 else one
    model.tie_weights()
    return model.eval().requires_grad_(False)


def examples(tokens: int, labels: int, vocabulary: int) -> list[Any]:
    """Rows of 64 tokens without a common start, the labels at their ends."""
    from kilotune.engine.rows.tokenize import IGNORE, Example

    count = tokens // ROW
    ids = stream(0, "slice").integers(0, vocabulary, (count, ROW)).astype(np.int32)
    marked = np.where(np.arange(ROW) >= ROW - labels // count, ids, IGNORE).astype(np.int32)
    return [Example(i, m, ROW - labels // count, "", None, n) for n, (i, m) in enumerate(zip(ids, marked, strict=True))]
