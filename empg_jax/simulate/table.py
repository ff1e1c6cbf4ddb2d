"""A simulated plan as a table."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from empg_jax.report.console import make_console
from empg_jax.simulate.plan import Row, SimulatedPlan

COLUMNS = (
    "max lag",
    "engine: learner",
    "seconds /update",
    "updates /hour",
    "episodes /hour",
    "tokens /second",
    "learner idle",
    "rollout idle",
    "lag mean",
    "lag max",
    "tokens wasted",
    "slots busy",
    "groups replaced",
)


def print_plan(plan: SimulatedPlan, console: Console) -> None:
    """Print a plan's notes and its table."""
    for note in plan.notes:
        console.print(note, markup=False)
    # In a narrow terminal the lines of the table wrap: cut numbers would be worse.
    table, wide = make_table(plan), make_console(width=1000, file=console.file)
    wide.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    wide.print(table)


def make_table(plan: SimulatedPlan) -> Table:
    """Make the table: a row per lag and split, with two columns more where there are long tasks."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*COLUMNS, *(("long begun", "long trained") if plan.world.long_share else ())):
        # One word on a line: the words of a heading set the width of its column.
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)
    for row in plan.rows:
        table.add_row(*_cells(row, bool(plan.world.long_share)))
    return table


def _cells(row: Row, has_long: bool) -> list[str]:
    r = row.result
    if r is None:
        return [str(row.max_lag), str(row.split), "never"]
    cells = [
        str(row.max_lag),
        str(row.split),
        f"{r.seconds_per_update:.3g}",
        f"{r.updates_per_hour:,.0f}",
        f"{r.episodes_per_hour:,.0f}",
        f"{r.tokens_per_second:,.0f}",
        f"{r.learner_idle:.0%}",
        f"{r.rollout_idle:.0%}",
        f"{r.lag_mean:.2f}",
        str(r.lag_max),
        f"{r.waste:.1%}",
        f"{r.slot_occupancy:.0%}",
        str(sum(r.groups_replaced.values())),
    ]
    return [*cells, f"{r.long_begun:.1%}", f"{r.long_trained:.1%}"] if has_long else cells
