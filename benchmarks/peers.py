"""One peer's training steps on rows that are already tokens; prints a line of JSON. Run by first_order.py.

Needs no kilotune, only transformers, peft and trl, so it can run in an environment of its own. Peers run in float32 and
keep their activations (their fastest setting on a CPU without bfloat16 units); they see the rows in the given order.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """Seconds of each step, its loss as logged."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def in_order(kind: type[Trainer]) -> type[Trainer]:
    """The trainer without shuffling."""

    class Ordered(kind):  # type: ignore[valid-type,misc]
        def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    return Ordered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["trainer", "sft"])
    parser.add_argument("job", type=Path, help="JSON: model, rows, batch_size, method, lr, lora, output")
    args = parser.parse_args()
    job = json.loads(args.job.read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": job["output"],
        "per_device_train_batch_size": job["batch_size"],
        "num_train_epochs": 1,
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    clock = Clock()
    if args.peer == "sft":
        from trl import SFTConfig, SFTTrainer

        masks = [[int(label != -100) for label in row["labels"]] for row in job["rows"]]
        rows = [
            {"input_ids": row["input_ids"], "completion_mask": m} for row, m in zip(job["rows"], masks, strict=True)
        ]
        trainer = in_order(SFTTrainer)(
            model=model,
            args=SFTConfig(**common, max_length=None),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora(job),
            callbacks=[clock],
        )
    else:
        if (config := lora(job)) is not None:
            from peft import get_peft_model

            model = get_peft_model(model, config)
        trainer = in_order(Trainer)(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(job["rows"]),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            callbacks=[clock],
        )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": clock.seconds, "losses": clock.losses, "peak_rss_bytes": peak}))


def lora(job: dict[str, Any]) -> Any:
    """The same LoRA as ours, or None for full training."""
    if job["method"] != "lora":
        return None
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **job["lora"])


if __name__ == "__main__":
    main()
