"""What a PCTrainer adds where a Trainer pushes: clear errors, and a fuller card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from hf_pc.auto_classes import class_of
from hf_pc.cards import extend_card
from hf_pc.config import PCConfig
from hf_pc.hub import explained

_TrainerPart: Any = Trainer if TYPE_CHECKING else object


class PushMixin(_TrainerPart):
    """`Trainer.push_to_hub` and what it calls; raises what `hf_pc.hub.explained` does."""

    pc_config: PCConfig

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained(name, token or self.args.hub_token):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `Trainer.push_to_hub`. Raises ConnectionError, PermissionError or FileNotFoundError, see `hf_pc.hub`."""
        name = self.hub_model_id or self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with explained(name, token or self.args.hub_token, revision or self.args.hub_revision):
            return super().push_to_hub(
                commit_message=commit_message, blocking=blocking, token=token, revision=revision, **kwargs
            )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """transformers' own card with results, settings and the regime of this run; same signature."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            loader = class_of(getattr(model, "get_base_model", lambda: model)())
            extend_card(Path(self.args.output_dir) / "README.md", self.pc_config, self.state.log_history, loader)
