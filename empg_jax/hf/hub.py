"""The folder of a model or tokenizer: a local one, or a download from the Hugging Face hub."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from empg_jax.config.places import expand

# Copies of the weights in another layout, and whatever lies in a folder (a pattern's ``*`` takes slashes).
_IGNORED = ["*/*", "consolidated*"]


def find_folder(path: str | pathlib.Path, patterns: Sequence[str], what: str) -> pathlib.Path:
    """Return a local folder; a path that is no folder is a hub id (``owner/name``) and is downloaded.

    Args:
      path: a folder or a hub id.
      patterns: names of the files to download; those in folders are left out.
      what: kind of the folder ("model", "tokenizer"), for the error message.

    Raises:
      FileNotFoundError: there is neither such a folder nor such a hub id, or it is a file.
      ConfigError: the path begins with a home folder that is not known.
    """
    folder = expand(path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise FileNotFoundError(f"{path} is a file; expected a folder")
    looks_like_hub_id = (
        isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    )
    if not looks_like_hub_id:
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r} (and it is not a hub id like 'owner/name')"
        )
    import huggingface_hub  # imported late, because only downloads need it
    from huggingface_hub import errors

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                str(path), allow_patterns=list(patterns), ignore_patterns=_IGNORED
            )
        )
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r}, and the hub cannot be reached (nor is it in the cache)"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r}, and the hub did not give one of that name: {first}"
        ) from error
