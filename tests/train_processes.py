"""A short run for test_processes.py: `train_processes.py FOLDER BATCH`, alone or under torchrun."""

import os
import sys
from pathlib import Path

import torch
from test_trainer import trainer, weights

from hf_pc import PCConfig

folder, size = Path(sys.argv[1]), int(sys.argv[2])
several = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
config = PCConfig(sweeps=3, relaxed_fraction=0.05)
run = trainer(folder, config, per_device_train_batch_size=size, optim="sgd", learning_rate=0.1, **several)
run.train()
loss = run.evaluate()["eval_loss"]
torch.save({"weights": weights(run), "loss": loss}, folder / f"{os.environ.get('RANK', '0')}.pt")
