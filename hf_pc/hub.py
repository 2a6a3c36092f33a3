"""Pushing a model or a run to the Hub: weights, pc_config.json and a card, in one commit or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from hf_pc.auto_classes import class_of
from hf_pc.cards import extend_card, write_card
from hf_pc.config import PCConfig

try:  # what carries the requests of huggingface_hub, by its version
    from httpx2 import TransportError
except ImportError:
    from httpx import TransportError  # type: ignore[import-not-found, no-redef]

CARD = "README.md"


@contextmanager
def explained(repo_id: str, token: str | None = None, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises in a push into errors that say what is left and what would do.

    Raises:
        ConnectionError: the connection was lost. The repository holds all of the commit or nothing of it, and a
            second push does the rest.
        PermissionError: there is no token, or none that may write there.
        FileNotFoundError: there is no such branch.
    """
    try:
        yield
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"revision={revision!r}: {repo_id} has no such branch; make it with HfApi().create_branch"
        ) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status not in (401, 403) and not isinstance(error, RepositoryNotFoundError):
            raise
        raise PermissionError(
            f"{repo_id} cannot be written to with {'this token' if token else 'the token of this machine, if any'}: "
            "give a token=... with the right to write, or log in with `hf auth login`"
        ) from error
    except TransportError as error:
        raise ConnectionError(
            f"the connection was lost while pushing to {repo_id} ({error}). What is here is as it was, the repository "
            "holds all of this commit or nothing of it: push again"
        ) from error


def push(
    model: Any, config: PCConfig, repo_id: str, save: Callable[[str], None], *, commit_message: str = "Upload model",
    private: bool | None = None, token: str | None = None, revision: str | None = None,
) -> Any:  # fmt: skip
    """Create the repository if needed and upload what `save` writes in one commit; returns the commit's info.

    A card of the repository stays; where there is none, one with tags, settings and how to load it is made. Raises
    what `explained` does.
    """
    api = HfApi(token=token)
    with explained(repo_id, token, revision), tempfile.TemporaryDirectory() as folder:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        save(folder)
        kept = api.file_exists(repo, CARD, revision=revision)
        if not kept:
            _write_card(model, config, Path(folder), repo)
        return api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, revision=revision,
            ignore_patterns=[CARD] if kept else None,
        )  # fmt: skip


def push_run(folder: Path, repo_id: str, token: str | None = None, revision: str | None = None) -> None:
    """Upload what a run has left, checkpoints of its way and pickled arguments apart; the repository is there already.

    Raises what `explained` does.
    """
    left_out = ["_*", "checkpoint-*", "training_args.bin"]
    with explained(repo_id, token, revision):
        HfApi(token=token).upload_folder(
            repo_id=repo_id, folder_path=folder, ignore_patterns=left_out, revision=revision
        )


def _write_card(model: Any, config: PCConfig, folder: Path, repo_id: str) -> None:
    if (folder / CARD).is_file():  # PEFT's
        extend_card(folder / CARD, config)
        return
    base = getattr(model.config, "name_or_path", None)
    write_card(
        folder, config, {}, model_name=repo_id.rpartition("/")[2], base_model=base if base != repo_id else None,
        auto_class=class_of(model),
    )  # fmt: skip
