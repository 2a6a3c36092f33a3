"""How a PCModel is saved, loaded and pushed: the model's own files, `pc_config.json` and `pc_state.json`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from hf_pc.attention import AttentionNodes
from hf_pc.auto_classes import adapted, loaded_by
from hf_pc.config import PCConfig
from hf_pc.hub import push
from hf_pc.json_files import read_json
from hf_pc.node import Node
from hf_pc.steering import Steering, check_state

STATE_NAME = "pc_state.json"
#: what a checkpoint's JSON files are looked up with, as its weights are
HUB_OPTIONS = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download")


class SavingMixin:
    """The part of `hf_pc.PCModel` that outlasts a process."""

    model: nn.Module
    config: PCConfig
    steering: Steering
    _attention: AttentionNodes | None

    if TYPE_CHECKING:

        def __init__(self, model: nn.Module, config: PCConfig | dict[str, Any] | None = None) -> None: ...

        @property
        def nodes(self) -> list[Node]: ...

    def state_dict(self) -> dict[str, Any]:
        """What steering and the energies have learned, for an exact resume; ready for JSON."""
        energies = dict(self._attention.states) if self._attention else {}
        energies |= {node.name: state for node in self.nodes if (state := node.energy.state_dict())}
        return self.steering.state_dict() | ({"energies": energies} if energies else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Raises ValueError on anything else."""
        check_state(state)
        self.steering.load_state_dict(state)
        energies = state.get("energies", {})
        for node in self.nodes:
            node.energy.load_state_dict(energies.get(node.name, {}))
        if self._attention:
            self._attention.states = {name: value for name, value in energies.items() if name.endswith(".logits")}

    def save_pretrained(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the model as transformers does, and `pc_config.json` and `pc_state.json` beside it.

        Raises ValueError for push_to_hub=True, which would upload before these two are there.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub=True is not allowed: PCModel.push_to_hub uploads weights, settings and card")
        self.model.save_pretrained(folder, **kwargs)  # type: ignore[operator]
        self.config.save_pretrained(folder)
        write_state(Path(folder), self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | os.PathLike[str],
        auto_class: Any = None,
        config: PCConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load weights with `auto_class.from_pretrained` and attach the nodes of its `pc_config.json`.

        What steering had learned is taken up again from `pc_state.json`, where there is one.

        Args:
            path_or_repo: a folder or a Hub repository.
            auto_class: such as AutoModelForCausalLM; default: the class that the model, or the base model of an
                adapter, was saved from. An adapter is a PEFT model again, which learns on.
            config: used instead of `pc_config.json`.
            kwargs: for `auto_class.from_pretrained`; revision, token, cache_dir, subfolder, local_files_only and
                force_download go to both.

        Raises:
            ValueError: the model was saved from a class that transformers does not have, and no auto_class is given;
                an adapter names no base model.
        """
        if kwargs.get("output_loading_info"):
            raise ValueError("output_loading_info=True is not allowed: load the model, and give it to PCModel")
        hub: dict[str, Any] = {k: kwargs[k] for k in HUB_OPTIONS if k in kwargs}
        found = None if config else read_json(path_or_repo, STATE_NAME, **hub)
        config = config or PCConfig.from_pretrained(path_or_repo, **hub)
        pc = cls(_load(path_or_repo, auto_class, kwargs), config)
        if found is not None:
            pc.load_state_dict(found)
        return pc

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Create the repository if needed and upload model, `pc_config.json` and card in one commit; see `hf_pc.hub`.

        Args:
            options: commit_message, private, token, revision (a branch).

        Raises:
            ConnectionError: the connection was lost; nothing is half done, and a second call does the rest.
            PermissionError: the token may not write there.
            FileNotFoundError: the repository has no such branch.
        """
        return push(self.model, self.config, repo_id, self.save_pretrained, **options)


def _load(path_or_repo: str | os.PathLike[str], auto_class: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """The model of a checkpoint, or the base model of an adapter with the adapter on it."""
    hub = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
    settings = read_json(path_or_repo, "config.json", **hub)
    adapter = None if settings else read_json(path_or_repo, "adapter_config.json", **hub)
    if not isinstance(adapter, Mapping) or getattr(auto_class, "__module__", "").startswith("peft"):
        return (auto_class or loaded_by(settings)).from_pretrained(path_or_repo, **kwargs)  # type: ignore[no-any-return]
    from peft import PeftConfig, PeftModel

    base = adapter.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{path_or_repo} is an adapter that names no base model: load it with PEFT, and give it to "
                         "PCModel")  # fmt: skip
    own = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if adapter.get("revision"):
        own["revision"] = adapter["revision"]
    made = PeftConfig.from_pretrained(path_or_repo, **hub)
    learns = not made.is_prompt_learning  # which PEFT refuses to call trainable
    known = auto_class or adapted(adapter.get("task_type"))
    found = known or loaded_by(read_json(base, "config.json", **{n: own[n] for n in HUB_OPTIONS if n in own}))
    model: nn.Module = PeftModel.from_pretrained(
        found.from_pretrained(base, **own), path_or_repo, config=made, is_trainable=learns, **hub
    )
    return model


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a `PCModel.state_dict` to `pc_state.json` in a folder."""
    (folder / STATE_NAME).write_text(json.dumps(state) + "\n", encoding="utf-8")
