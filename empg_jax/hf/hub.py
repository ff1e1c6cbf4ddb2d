"""Where a model or tokenizer lies: a local folder, or a download of a hub id."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence


def find_folder(path: str | pathlib.Path, patterns: Sequence[str], what: str) -> pathlib.Path:
    """Returns a local folder; a path that is none is taken for a hub id (``owner/name``) and downloaded.

    Args:
      path: a folder or a hub id.
      patterns: names of the files to download.
      what: what is looked for, for the error.

    Raises:
      FileNotFoundError: when there is neither such a folder nor such a hub id.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    looks_like_hub_id = (
        isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    )
    if not looks_like_hub_id:
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r} (and it is not a hub id like 'owner/name')"
        )
    import huggingface_hub  # only when something is to be downloaded
    from huggingface_hub import errors

    try:
        return pathlib.Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r}, and the hub cannot be reached (nor is it in the cache)"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"no {what} folder at {str(path)!r}, and the hub did not give one of that name: {first}"
        ) from error
