"""A short run for test_processes.py: `train_processes.py FOLDER BATCH [RULE]`, alone or under torchrun.

With the rule "refusing" the errors are so free that sweeps are refused on one process and not on the other.
"""

import os
import sys
from pathlib import Path

import torch
from test_trainer import trainer, weights

from hf_pc import PCConfig

folder, size = Path(sys.argv[1]), int(sys.argv[2])
several = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
rule = sys.argv[3] if len(sys.argv) > 3 else "plain"
refusing = rule == "refusing"
config = PCConfig(sweeps=3, relative_std=2.5)
if not refusing:
    config = PCConfig(sweeps=3, relaxed_fraction=0.05, learning=rule)
if refusing:
    several |= {"name": "llama", "max_steps": 12, "optim": "adamw_torch", "learning_rate": 1e-2}
run = trainer(folder, config, per_device_train_batch_size=size, **{"optim": "sgd", "learning_rate": 0.1, **several})
run.train()
loss = run.evaluate()["eval_loss"]
refused = max(entry.get("refused", 0.0) for entry in run.state.log_history)
torch.save({"weights": weights(run), "loss": loss, "refused": refused}, folder / f"{os.environ.get('RANK', '0')}.pt")
run.accelerator.end_training()  # a process group left to the interpreter's exit may abort it
