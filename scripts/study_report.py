"""The report of a study in Markdown: what was registered, what was run, and what it shows."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from study_ledger import Line
from study_matched import AMOUNTS, LOAD_RATIO, Matched, match
from study_plan import UPDATES, Study
from study_results import (
    Comparison,
    Results,
    average,
    compare_arms,
    correlation_of,
    describe_cell,
    gather,
    mean_of_part,
)

from empg_jax.report.statistics import RESAMPLES, SIGNS

ALL = "all tasks"


def write_report(study: Study, lines: Sequence[Line]) -> str:
    """Write the report; it depends on nothing but its arguments."""
    results = gather(study, lines)
    parts = [
        f"# Study: {study.folder.resolve().name}",
        f"Registered before the first run:\n\n```yaml\n{study.registration}\n```",
        _runs(results),
        _cells(results),
        _primary(results),
        _secondary(results),
        *_matched(results),
        _series(results),
        _left_out(results),
    ]
    return "\n\n".join(parts) + "\n"


def _runs(results: Results) -> str:
    study = results.study
    planned = len(list(study.triples()))
    done = len(results.finished) + len(results.apart)
    counts = f"{done} of {planned} runs are finished, {len(results.failed)} failed"
    text = [f"## Runs\n\n{counts}, {len(results.missing)} are missing."]
    if results.strangers:
        text.append(f"{results.strangers} runs of other tasks, arms or seeds are left out.")
    made = collections.Counter(map(_circumstances, results.finished.values()))
    rows = [[*where, str(count)] for where, count in sorted(made.items())]
    if rows:
        text.append("\n" + _table(["commit", "versions", "hardware", "runs"], rows))
    days = sorted(line["date"][:10] for line in results.finished.values())
    if days:
        text.append(f"\nFinished from {days[0]} to {days[-1]} (UTC).")
    return "\n".join(text)


def _circumstances(line: Line) -> tuple[str, str, str]:
    commits = " to ".join(str(commit)[:9] for commit in line["commits"])
    versions = line["versions"]
    shown = ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "jaxlib") if name in versions)
    hardware = line["hardware"]
    where = f"{hardware['cpus']} x {hardware['processor']}, {', '.join(hardware['devices'])}"
    has_changes = line.get("changes") or line.get("dirty")  # older lines say only whether there were any
    return commits + (" with changes" if has_changes else ""), shown, where


def _cells(results: Results) -> str:
    rows = []
    for task in results.study.tasks:
        for arm in results.study.arms:
            cell = describe_cell(results, task, arm)
            if cell is None:
                rows.append([task, arm, "0", *["-"] * 7])
                continue
            rows.append(
                [
                    task,
                    arm,
                    str(cell.runs),
                    f"{_points(cell.area)} {_interval(cell.area_interval)}",
                    _points(cell.area_iqm),
                    _points(cell.start),
                    f"{_points(cell.end)} {_interval(cell.end_interval)}",
                    f"{_number(cell.updates_to_60, 0)} ({cell.reached} of {cell.runs})",
                    _number(cell.wall_seconds, 0),
                    _number(cell.cpu_seconds, 0),
                ]
            )
    heads = ["task", "arm", "seeds", "area under the held-out curve", "area, IQM", "success before RL"]
    heads += ["success at the end", "updates to 60 %, median (reached)", "wall s", "CPU s"]
    tasks = sorted({line["end_tasks"] for line in results.finished.values()})
    note = "In per cent, means over seeds with 95 % bootstrap intervals from six seeds on "
    note += f"({RESAMPLES:,} resamples, expanded percentiles). "
    note += f"The end is measured on {' or '.join(map(str, tasks)) or 'no'} held-out tasks."
    return f"## Results by task and arm\n\n{note}\n\n{_table(heads, rows)}"


def _primary(results: Results) -> str:
    rows, amount = [], results.study.measure
    if amount == UPDATES:
        compared, over = compare_arms(results, "area"), ""
    else:
        found = match(results)
        within = dataclasses.replace(results, finished={}) if found is None else found.results[amount]
        compared, over = compare_arms(within, f"area_{amount}"), f" over {AMOUNTS[amount]}, as below,"
    for each in compared:
        found = each.difference
        rows.append(
            [
                *_who(each, results.study),
                str(found.pairs),
                f"{_signed(found.mean)} {_interval((found.low, found.high), signed=True)}",
                _p(found.p),
                _p(each.adjusted),
                _points(found.sd),
                _points(found.detectable),
                f"{results.study.planned_effect:g}",
            ]
        )
    heads = ["task", "comparison", "pairs", "difference", "p", "p, Holm", "sd"]
    heads += ["detectable after Holm", "registered"]
    note = (
        f"Differences in the area{over} in points, paired by seed, with 95 % bootstrap intervals over seeds "
        f"within task. p: two-sided sign-flip test, exact up to 16 pairs, else {SIGNS:,} sampled signs; Holm "
        f"over the study's comparisons ({len(results.study.comparisons)}) pooled over tasks, and apart from "
        "them over those on single tasks. Detectable: the smallest true difference found with 80 % power, by "
        "the observed spread, at 5 % divided by the number of comparisons, where Holm's correction begins; "
        "none where all pairs together cannot reach that level. Registered: what was expected before the "
        "first run. Fewer than six pairs have no interval."
    )
    return f"## Primary measure: paired differences\n\n{note}\n\n{_table(heads, rows)}"


def _secondary(results: Results) -> str:
    rows = []
    for each in compare_arms(results, "end_success"):
        found = each.difference
        interval = _interval((found.low, found.high), signed=True)
        rows.append(
            [
                *_who(each, results.study),
                str(found.pairs),
                f"{_signed(found.mean)} {interval}",
                _points(found.sd),
            ]
        )
    heads = ["task", "comparison", "pairs", "difference", "sd"]
    note = "Success at the end in points, paired by seed; no test, the intervals describe."
    return f"## Secondary measure: success at the end\n\n{note}\n\n{_table(heads, rows)}"


def _matched(results: Results) -> list[str]:
    """One table at equal steps and at equal CPU seconds; nothing where no run says what it spent."""
    found = match(results)
    if found is None:
        return []
    study, rows = results.study, []
    by_amount = {amount: found.differences(amount) for amount in AMOUNTS}
    for task in study.tasks:
        there = [arm for arm in study.arms if found.results["environment_steps"].lines(task, arm)]
        heights = {arm: found.describe(task, arm, "cpu_seconds")[0] for arm in there}
        for arm in sorted(heights, key=lambda arm: (math.isnan(heights[arm]), -heights[arm])):
            row = [task, arm]
            for amount, differences in by_amount.items():
                mean, interval, at = found.describe(task, arm, amount)
                each = differences.get((task, arm, study.baseline))
                count = str(len(found.results[amount].lines(task, arm)))
                row += [count, f"{_points(mean)} {_interval(interval)}", _points(at), *_difference(each)]
            rows.append([*row, _number(found.load(task, arm), 1)])
    heads = ["task", "arm"]
    for name in AMOUNTS.values():
        heads += ["seeds", f"area over {name}", "success there", f"area minus {study.baseline}", "p, Holm"]
    heads.append("wall s / CPU s, median")
    parts = [_budgets(found), _table(heads, rows)]
    pooled = [
        [*_who(each, results.study)]
        + [
            cell
            for differences in by_amount.values()
            for cell in (str(differences[where].difference.pairs), *_difference(differences[where]))
        ]
        for where, each in by_amount["cpu_seconds"].items()
        if each.task == study.only_task
    ]
    if pooled:
        heads = ["task", "comparison"]
        heads += [cell for name in AMOUNTS.values() for cell in ("pairs", f"area over {name}", "p, Holm")]
        parts.append(_table(heads, pooled))
    if found.unlike:
        pairs = _pairs(found.unlike)
        parts.append(f"Not compared over CPU seconds, since the machines differ: {pairs}.")
    if found.uneven:
        parts.append(
            "CPU seconds for the same work grow with other load, by about 3 % when wall s / CPU s doubles. "
            f"Pairs where wall s / CPU s of their runs differs by more than a factor of {LOAD_RATIO:g} are "
            f"left out of CPU seconds ({len(found.uneven)}): {_pairs(found.uneven)}."
        )
    if found.alone:
        alone = ", ".join(each.name for each in found.alone)
        parts.append(
            f"Left out over CPU seconds, for want of a pair on one machine under like load: {alone}."
        )
    if found.silent:
        parts.append(f"Without a record of what they spent: {', '.join(each.name for each in found.silent)}.")
    return ["## At equal environment steps and at equal CPU seconds\n\n" + "\n\n".join(parts)]


def _pairs(pairs: Mapping[tuple[str, int, str, str], str]) -> str:
    return "; ".join(
        f"{arm}, {other} of {task}, seed {seed} ({how})" for (task, seed, arm, other), how in pairs.items()
    )


def _budgets(found: Matched) -> str:
    lines = []
    for task in found.results["environment_steps"].study.tasks:
        steps, seconds = (
            {
                place: budget
                for (of, name, place), budget in found.budgets.items()
                if (of, name) == (task, amount)
            }
            for amount in AMOUNTS
        )
        if steps:
            where = {place: f" on {place}" if len(seconds) > 1 else "" for place in seconds}
            told = ", ".join(f"{budget:,.0f} CPU seconds{where[place]}" for place, budget in seconds.items())
            lines.append(f"- {task}: {steps['']:,.0f} environment steps; {told}")
    note = (
        "A task's budget is what its thriftiest finished run spent in training, without evaluations and "
        "warm start; of CPU seconds each machine has its own, and only runs with a pair on one machine "
        "under like load count. Area and success, in per cent, are of the held-out curve up to it, and a "
        "task's arms are sorted by the area over CPU seconds. Differences in points, paired by seed, with "
        "95 % bootstrap intervals; Holm as above, apart for each of the two amounts."
    )
    return "\n".join([note, "", *lines])


def _difference(each: Comparison | None) -> list[str]:
    if each is None:
        return ["", ""]
    found = each.difference
    return [
        f"{_signed(found.mean)} {_interval((found.low, found.high), signed=True)}",
        _p(each.adjusted),
    ]


def _series(results: Results) -> str:
    """What runs show on the way: entropy, exploration, the balance of credit, and the papers' claims."""
    rows = []
    for task in results.study.tasks:
        for arm in results.study.arms:
            lines = results.lines(task, arm)
            if not any(line["series"]["update"] for line in lines):
                continue
            row = [task, arm]
            for name, digits in (("turn_entropy_mean", 3), ("mixed_groups", 2), ("advantage_positive", 2)):
                first = average([mean_of_part(line, name, _first) for line in lines])
                last = average([mean_of_part(line, name, _last) for line in lines])
                row.append(f"{_number(first, digits)} to {_number(last, digits)}")
            row.append(_number(average([mean_of_part(line, "modulation_std", _whole) for line in lines]), 3))
            for pair in (("grad_norm", "entropy"), ("entropy_drift_predicted", "entropy_drift_measured")):
                row.append(_number(average([correlation_of(line, *pair) for line in lines]), 2))
            rows.append(row)
    heads = ["task", "arm", "turn entropy", "mixed groups", "turns with positive advantage", "modulation sd"]
    heads += ["gradient norm with entropy, r", "drift predicted with measured, r"]
    note = (
        "From the first to the last tenth of the updates (the modulation: all of them), means over seeds; r "
        "is the correlation over the updates of a run."
    )
    return f"## On the way\n\n{note}\n\n{_table(heads, rows)}"


def _left_out(results: Results) -> str:
    lines = [f"- {triple.name} failed: {line['reason']}" for triple, line in results.failed.items()]
    lines += [
        f"- the pair {arm}, {against} of {task}, seed {seed}, is left out: {reason}"
        for (task, seed, arm, against), reason in results.excluded.items()
    ]
    lines += [
        f"- {triple.name} is left out: not every arm has finished on {triple.task} with seed {triple.seed}"
        for triple in results.apart
    ]
    if results.missing:
        lines.append(f"- not run yet: {', '.join(triple.name for triple in results.missing)}")
    return "## Left out\n\n" + ("\n".join(lines) if lines else "Nothing.")


def _first(count: int) -> slice:
    return slice(0, max(1, count // 10))


def _last(count: int) -> slice:
    return slice(count - max(1, count // 10), count)


def _whole(count: int) -> slice:
    return slice(0, count)


# --------------------------------------------------------------------------------------------- formats


def _who(each: Comparison, study: Study) -> list[str]:
    where = each.task or (
        ALL if len(each.tasks) == len(study.tasks) else f"pooled: {', '.join(each.tasks) or 'none'}"
    )
    return [where, f"{each.arm} - {each.against}"]


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return "not reached" if math.isinf(value) else f"{value:.{digits}f}"


def _points(value: float) -> str:
    return _number(100 * value, 1)


def _signed(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:+.1f}"


def _interval(bounds: tuple[float, float], *, signed: bool = False) -> str:
    if any(map(math.isnan, bounds)):
        return ""
    return "[{}, {}]".format(*map(_signed if signed else _points, bounds))


def _p(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}" if value >= 1e-4 else f"{value:.1e}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)
