"""What a user would run instead: transformers' Trainer without any teacher, and TRL's GKDTrainer with one.

Each is its own loop, begun once; after a step it waits until it is told to go on, so that its steps can take turns with
others. What it does between two steps (the next batch, its own records) counts.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from benchmarks.speed.setting import BETAS, CLIP, DECAY, LR, Setting
from benchmarks.speed.turns import Clock, Turns

PAD = -100


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """What transformers' own collators make of texts: padded to the longest, with a mask and unshifted labels."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(with_: int) -> torch.Tensor:
        return torch.tensor([row["input_ids"] + [with_] * (longest - len(row["input_ids"])) for row in rows])

    labels = padded(PAD)
    return {"input_ids": padded(0), "attention_mask": (labels != PAD).long(), "labels": labels}


def run(name: str, setting: Setting, turns: Turns) -> None:
    """Serve turns until there are no more.

    Args:
        name: ``trainer``, ``trainer-liger`` or ``trl``.
    """
    from datasets import Dataset
    from transformers import TrainerCallback

    tokenizer: Any
    loaded = setting.load_teacher() if name == "trl" else None
    if loaded is None:
        from liquid_llm.models.loading import load_tokenizer

        tokenizer = load_tokenizer(setting.teacher)
    else:
        tokenizer = loaded.tokenizer
    student = setting.build_student(tokenizer)
    rows = Dataset.from_dict({"input_ids": [row.tolist() for row in setting.token_ids()]})

    class TakeTurns(TrainerCallback):  # type: ignore[misc]
        """Hands out the go-aheads to the trainer's loop."""

        def __init__(self) -> None:
            self.asked = turns.asked()
            self.clock: Clock | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            turns.say(name=name)
            self._await(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            setting.wait()
            assert self.clock is not None
            turns.say(**self.clock.took())
            self._await(control)

        def _await(self, control: Any) -> None:
            if next(self.asked, None) is None:
                control.should_training_stop = True
            self.clock = Clock()

    arguments = training_arguments(
        f"{setting.folder}/{name}",
        batch_size=setting.batch_size,
        bf16=setting.precision == "bfloat16",
        on_cpu=setting.device == "cpu",
        liger=name == "trainer-liger",
    )
    given = {"train_dataset": rows, "data_collator": collate, "callbacks": [TakeTurns()]}
    if name == "trl":
        os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        assert loaded is not None
        # Off-policy, and the plain KL of the teacher's distribution: what this project does too.
        options = GKDConfig(lmbda=0.0, beta=0.0, gradient_checkpointing=False, **arguments)
        GKDTrainer(student, loaded.model, options, processing_class=tokenizer, **given).train()
    else:
        from transformers import Trainer, TrainingArguments

        Trainer(student, TrainingArguments(**arguments), **given).train()


def training_arguments(folder: str, *, batch_size: int, bf16: bool, on_cpu: bool, liger: bool) -> dict[str, Any]:
    """The same optimizer, clipping, batches and precision; nothing evaluated, written or reported."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1000,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "max_grad_norm": CLIP,
        "bf16": bf16,
        "use_cpu": on_cpu,
        "use_liger_kernel": liger,
        "logging_steps": 10**9,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
