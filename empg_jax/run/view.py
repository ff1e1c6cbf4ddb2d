"""``empg-jax view``: the page of a run, written or served, with what other algorithms would have given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from empg_jax.errors import ConfigError, RunError
from empg_jax.report.curves import CURVES, plot_curves
from empg_jax.report.record import SUMMARY
from empg_jax.report.view.live import LiveServer
from empg_jax.report.view.packing import CREDIT, Credit
from empg_jax.report.view.page import Book, WhatIf, write_page
from empg_jax.report.view.pieces import Decode
from empg_jax.report.view.reading import check_is_run, find_files

if TYPE_CHECKING:
    from empg_jax.config import Config

PAGE = "view.html"
LARGE = 60 * 2**20  # bytes of a page that opens at once everywhere

Say = Callable[[str], None]


def view_run(run_dir: Path, *, out: Path | None, what_if: Mapping[str, Config], say: Say) -> Path:
    """Write a run as one page.

    Args:
      run_dir: folder of the run.
      out: file to write, or folder to write it into; None is the run's own.
      what_if: by name of another algorithm, the run's configuration with it.
      say: receives messages for the user.

    Returns:
      The path of the page.

    Raises:
      ConfigError: ``run_dir`` holds no run, or the page cannot be written.
    """
    check_is_run(run_dir)
    path = _page_path(run_dir, out)
    book = make_book(run_dir, what_if)
    try:
        episodes, notes = write_page(book, path)
    except OSError as error:
        raise ConfigError(f"the page {path} cannot be written: {error.strerror or error}") from None
    for note in notes:
        say(f"note: {note}")
    size = path.stat().st_size
    say(f"{episodes:,} episodes, {size / 2**20:.1f} MiB")
    if size > LARGE:
        say("note: a page of this size opens slowly; --serve sends only what is looked at")
    return path


def serve_run(run_dir: Path, *, port: int, what_if: Mapping[str, Config], tell: Say) -> None:
    """Serve the page of a run on this machine until the process is stopped.

    Args:
      run_dir: folder of the run, which may still be training.
      port: the port; 0 takes a free one.
      what_if: by name of another algorithm, the run's configuration with it.
      tell: receives the address, when it answers.

    Raises:
      ConfigError: ``run_dir`` holds no run, or the port is taken.
    """
    check_is_run(run_dir)
    try:
        server = LiveServer(make_book(run_dir, what_if), port)
    except OSError as error:
        raise ConfigError(f"--port {port} cannot be opened: {error.strerror or error}") from None
    with server:
        tell(f"serving {run_dir.resolve().name} at {server.url}")
        server.serve_forever(poll_interval=0.2)


def draw_results(run_dir: Path, *, has_page: bool) -> list[str]:
    """Draw ``curves.png`` and the page of a finished run, each unless it is newer than ``summary.json``.

    Args:
      run_dir: folder of the run.
      has_page: draw the page, too.

    Returns:
      A line for each of them that could not be drawn; ``train --resume`` draws it.
    """
    told = []
    since = (run_dir / SUMMARY).stat().st_mtime_ns
    pictures = [(CURVES, plot_curves), *([(PAGE, _draw_page)] if has_page else [])]
    for name, draw in pictures:
        path = run_dir / name
        if path.exists() and path.stat().st_mtime_ns >= since:
            continue
        try:
            draw(run_dir)
        # Images for accelerators may lack matplotlib.
        except (OSError, RunError, ModuleNotFoundError) as error:
            told.append(f"warning: {run_dir} gets no {name}: {error}")
    return told


def _draw_page(run_dir: Path) -> None:
    size = sum(path.stat().st_size for path in find_files(run_dir))
    if size > LARGE:
        raise RunError(
            f"its episodes are {size / 2**20:.0f} MiB, too many for a page: empg-jax view {run_dir} --serve"
        )
    write_page(make_book(run_dir, {}), run_dir / PAGE)


def make_book(run_dir: Path, what_if: Mapping[str, Config]) -> Book:
    """Open the episodes of a run, with its tokenizer where it left one."""
    others = _make_what_if(what_if) if what_if else None
    return Book(run_dir, decode=_make_decode(run_dir), what_if=others, names=list(what_if))


def _make_what_if(what_if: Mapping[str, Config]) -> WhatIf:
    """Build the function that computes the credit of other algorithms for a file's episodes."""
    # JAX takes a second to load, and most pages are made without it.
    from empg_jax.rollout.record import RecordError
    from empg_jax.run.credit import make_recompute, read_for

    recompute = {name: make_recompute(config) for name, config in what_if.items()}

    def calculate(path: Path) -> tuple[dict[str, Credit], list[str]]:
        found: dict[str, Credit] = {}
        told: list[str] = []
        for name, config in what_if.items():
            try:
                records, notes = recompute[name](read_for(config, path))
            except RecordError as error:
                raise ValueError(str(error)) from None
            found[name] = [
                [[turn[each] for each in CREDIT] for turn in record["turns"]] for record in records
            ]
            told += [f"{name}: {note}" for note in notes]
        return found, told

    return calculate


def _make_decode(run_dir: Path) -> Decode | None:
    """Return the decoding of the run's tokenizer, loaded when the first token comes; None without one."""
    folder = run_dir / "tokenizer"
    if not folder.is_dir():
        return None
    loaded: list[Decode] = []

    def decode(ids: Sequence[int]) -> str:
        if not loaded:
            from empg_jax.text.tokenizer import load_tokenizer

            loaded.append(load_tokenizer(folder).decode)
        return loaded[0](ids)

    return decode


def _page_path(run_dir: Path, out: Path | None) -> Path:
    if out is None:
        return run_dir / PAGE
    if out.is_dir():
        return out / f"{run_dir.resolve().name}.html"
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    return out
