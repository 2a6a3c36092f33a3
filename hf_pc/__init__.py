"""Predictive coding for Hugging Face models: see README.md and docs/."""

from hf_pc.config import NodeSpec, PCConfig
from hf_pc.energies import register_energy
from hf_pc.model import PCModel
from hf_pc.placement import register_placement
from hf_pc.report import RelaxationOutput
from hf_pc.solvers import register_solver
from hf_pc.trainer import (
    PCSeq2SeqTrainer,
    PCSeq2SeqTrainingArguments,
    PCTrainer,
    PCTrainerMixin,
    PCTrainingArguments,
)

__version__ = "0.1.0"

__all__ = [
    "NodeSpec",
    "PCConfig",
    "PCModel",
    "PCSeq2SeqTrainer",
    "PCSeq2SeqTrainingArguments",
    "PCTrainer",
    "PCTrainerMixin",
    "PCTrainingArguments",
    "RelaxationOutput",
    "register_energy",
    "register_placement",
    "register_solver",
]
