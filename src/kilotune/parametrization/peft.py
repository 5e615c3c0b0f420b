"""PEFT: any method of the peft library by its name, w + Δ(adapter), base frozen.

With `freeze: [lora_A]` it is FFA-LoRA: B alone is trained and sent, and Σ p_k (B_k A) = (Σ p_k B_k) A, so that the mean
of what travels is the mean of the changes. A is random, drawn from the run's seed, so that all ends have the same.

Source: the peft library's registry; for the default, Hu et al., "LoRA: Low-Rank Adaptation of Large Language
    Models", arXiv 2106.09685, sec. 4.1. FFA-LoRA: Sun, Li, Li and Ding, "Improving LoRA in Privacy-preserving Federated
    Learning", arXiv 2403.12313, sec. 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from kilotune.core.errors import RecipeError
from kilotune.core.lazy import torch
from kilotune.core.registry import nearest
from kilotune.parametrization import Directions, Parametrization, Trainable
from kilotune.parametrization._direct import DirectTrainable
from kilotune.parametrization._targets import select

if TYPE_CHECKING:
    from torch import nn

ADAPTER = "default"


class Peft(Parametrization):
    writes_base: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"adapter"})

    method: str = Field("lora", description="name of a peft method: lora, ia3, vera, oft, ...")
    config: dict[str, Any] = Field(
        default_factory=lambda: {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        description="keys of that method's own configuration; LoRA paper: r=8 on the attention, here on all linears",
    )

    freeze: tuple[str, ...] = Field(
        (), description="tensors of the adapter that stay as they start, by parts of their names; FFA-LoRA: lora_A"
    )

    def attach(self, model: nn.Module, *, basis: Directions | None, seed: int) -> Trainable:
        return DirectTrainable(*self.wrapped(model, seed))

    def wrapped(self, model: nn.Module, seed: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
        """The model with its adapter, and the adapter's parameters that are trained, in order of names."""
        from peft import get_peft_model

        config = self._config()
        for param in model.parameters():
            param.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # peft draws its start values from the global generator
            torch.random.default_generator.manual_seed(seed % (1 << 32))
            try:
                wrapped = get_peft_model(model, config, adapter_name=ADAPTER)
            except (ValueError, KeyError) as error:
                raise RecipeError(f"parametrization.config: {self.method}: {str(error).splitlines()[0]}") from None
        params = {n: p for n, p in sorted(wrapped.named_parameters()) if p.requires_grad}
        for param in params.values():
            param.requires_grad_(False)
        frozen = select(list(params), self.freeze, "parametrization.freeze") if self.freeze else []
        if len(frozen) == len(params):
            raise RecipeError(f"parametrization.freeze: got {list(self.freeze)}, which leaves nothing to train.")
        return wrapped, {name: param for name, param in params.items() if name not in frozen}

    def _config(self) -> Any:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, TaskType

        known = {str(getattr(kind, "value", kind)).lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
        if self.method.lower() not in known:
            raise RecipeError(
                f"parametrization.method: got {self.method!r}, expected one of {', '.join(sorted(known))}."
                f"{nearest(self.method, sorted(known))}"
            )
        cls = known[self.method.lower()]
        fields = set(cls.__dataclass_fields__)
        wrong = [
            f"parametrization.config.{key}: {self.method} has no such key.{nearest(key, sorted(fields))}"
            for key in self.config
            if key not in fields
        ]
        if wrong:
            raise RecipeError(*wrong)
        try:
            return cls(**{"task_type": TaskType.CAUSAL_LM, **self.config})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"parametrization.config: {self.method}: {error}") from None


METHOD = Peft
