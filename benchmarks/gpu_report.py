"""Tables of the results of benchmarks/gpu.py."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import markdown_table

Record = dict[str, Any]


def read(out: Path, step: str) -> list[Record]:
    """Returns the records of a step. A last line that was cut off is left out."""
    path, records = out / f'{step}.jsonl', []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def latest(records: list[Record]) -> list[Record]:
    """Returns the last record of each case, with the seconds of all its records, in the order of the cases."""
    found: dict[str, Record] = {}
    for record in records:
        before = found.get(record['case'], dict(seconds=0))['seconds']
        found[record['case']] = record | dict(seconds=before + record['seconds'])
    return list(found.values())


def measured(records: list[Record]) -> list[Record]:
    """Returns settings and results in one dictionary, of the cases without an error."""
    return [
        dict(total_seconds=record['seconds'], **record['settings']) | record['result']
        for record in records
        if 'error' not in record
    ]


def kernels(records: list[Record]) -> list[str]:
    files: dict[str, list[str]] = {}
    for record in records:
        outcome = 'failed' if 'error' in record else record['result']['outcome']
        files.setdefault(record['case'].removeprefix('test=').partition('::')[0], []).append(outcome)
    outcomes = ('passed', 'failed', 'skipped')
    rows = [[f'`{file}`', *(str(found.count(outcome)) for outcome in outcomes)] for file, found in files.items()]
    return [markdown_table([['tests', *outcomes], *rows])]


def parity(records: list[Record]) -> list[str]:
    rows = [['model', 'precision', 'kernels', 'images', 'logits', 'gradient', 'flips', 'worst layer', 'changed top-1']]
    for r in measured(records):
        flips = [f'{100 * r["flips"] / r["points"]:.4f} %', f'{100 * r["worst_layer"]:.4f} %']
        what = [f'`{r["model"]}`', r['precision'], r['kernels'], f'{r["images"]} x {r["size"]} px']
        rows.append([*what, f'{r["logits"]:.1e}', f'{r["gradient"]:.1e}', *flips, str(r['changed_top1'])])
    return [
        'Relative errors to float64 on the CPU. Flips are points that join another center than in float64, of all '
        'layers and of the worst one.',
        markdown_table(rows),
    ]


def throughput(records: list[Record]) -> list[str]:
    parts = []
    runs = measured(records)
    for mode, batch, size in dict.fromkeys((r['mode'], r['batch'], r['size']) for r in runs):
        found = [r for r in runs if (r['mode'], r['batch'], r['size']) == (mode, batch, size)]
        parts.append(f'**{mode.capitalize()}**, batch {batch}, {size} px, channels_last, bfloat16 autocast')
        parts.append(markdown_table(speed_rows(found)))
        costs = cost_rows(found)
        if len(costs) > 1:
            parts.append(markdown_table(costs))
    return parts


def speed_rows(runs: list[Record]) -> list[list[str]]:
    executions = ('eager', 'compiled')
    rows = [['model', 'network', 'kernels']]
    rows[0] += [f'{execution}, {unit}' for execution in executions for unit in ('ms', 'images/s', 'MB', 'SM MHz')]
    table: dict[tuple, dict[str, Record]] = {}
    for r in runs:
        table.setdefault((r['model'], r['network'], r['kernels']), {})[r['execution']] = r
    for (name, *rest), found in table.items():
        cells = []
        for execution in executions:
            r = found.get(execution)
            memory = '' if r is None or r['memory_mb'] is None else f'{r["memory_mb"]:.0f}'
            speed = [f'{1e3 * r["seconds"]:.2f}', f'{r["batch"] / r["seconds"]:.0f}'] if r else ['', '']
            cells += [*speed, memory, r['sm_mhz'] if r else '']
        rows.append([f'`{name}`', *rest, *cells])
    return rows


def cost_rows(runs: list[Record]) -> list[list[str]]:
    """Times of the models over those of their floor, and of the formulas over those of the models."""
    seconds = {(r['model'], r['network'], r['execution']): r['seconds'] for r in runs}
    rows = [['model', 'kernels', 'execution', 'model / floor', 'formulas (eager) / model']]
    for r in runs:
        floor = seconds.get((r['model'], 'floor', r['execution']))
        formulas = seconds.get((r['model'], 'formulas', 'eager'))
        if r['network'] == 'model' and r['kernels'] != '-':
            ratios = [r['seconds'] / floor if floor else None, formulas / r['seconds'] if formulas else None]
            cells = ['' if ratio is None else f'{ratio:.2f}' for ratio in ratios]
            rows.append([f'`{r["model"]}`', r['kernels'], r['execution'], *cells])
    return rows


def profile(records: list[Record]) -> list[str]:
    parts = []
    for r in measured(records):
        parts.append(
            f'`{r["model"]}`, {r["kernels"]}, batch {r["batch"]}, {r["size"]} px: a training step takes '
            f'{r["step_ms"]:.2f} ms; {r["launches"]} kernels take {r["kernel_ms"]:.2f} ms in total'
        )
        rows = [[f'`{k["name"][:100].replace("|", "/")}`', str(k['calls']), f'{k["ms"]:.3f}'] for k in r['kernels_top']]
        parts.append(markdown_table([['kernel', 'calls', 'ms'], *rows]))
    return parts


def training_rows(runs: list[Record], names: list[str]) -> list[list[str]]:
    rows = [[*names, 'epochs', 'minutes', 'top-1 after the last epoch', 'validated top-1']]
    for r in runs:
        cells = [str(r[name]) for name in names] + [f'{r["epochs_done"]} of {r["epochs"]}']
        cells += [f'{r["total_seconds"] / 60:.1f}']
        rows.append([*cells, *('' if r.get(key) is None else f'{r[key]:.2f}' for key in ('top1', 'validated_top1'))])
    return rows


def cifar10(records: list[Record]) -> list[str]:
    return [markdown_table(training_rows(measured(records), ['model']))]


def centroids(records: list[Record]) -> list[str]:
    runs, parts = measured(records), []
    rows = [['update of centroids', 'dtype', 'classes', 'features', 'seconds']]
    for r in runs:
        if 'dtype' in r:
            used = r['arguments']
            size = [r['dtype'], str(used['classes']), str(used['memory'])]
            rows += [[name, *size, f'{times["seconds"]:.4f}'] for name, times in r['results'].items()]
    parts += [markdown_table(rows)] if len(rows) > 1 else []
    if heads := [r for r in runs if 'head' in r]:
        parts.append(markdown_table([row[:-1] for row in training_rows(heads, ['backbone', 'head', 'seed'])]))
    return parts


TABLES: dict[str, Callable[[list[Record]], list[str]]] = dict(
    kernels=kernels,
    parity=parity,
    throughput=throughput,
    profile=profile,
    cifar10=cifar10,
    centroids=centroids,
)


def section(facts: dict[str, str], steps: dict[str, list[Record]]) -> list[str]:
    """Returns the part of the report about one environment."""
    records = [record for found in steps.values() for record in found]
    commands = dict.fromkeys(record['command'] for record in records)
    dates = sorted(record['date'] for record in records)
    facts = dict(facts, dates=f'{dates[0]} to {dates[-1]}', commands='; '.join(f'`{command}`' for command in commands))
    parts = [f'## {facts["device"]}, {facts["commit"]}', markdown_table([['', ''], *map(list, facts.items())])]
    errors = [['step', 'case', 'date', 'error']]
    for step, found in steps.items():
        cases = latest(found)
        if any('error' not in record for record in cases):
            parts += [f'### {step}', *TABLES[step](cases)]
        for record in cases:
            if 'error' in record:
                message = record['error'].strip().splitlines()[-1][:300].replace('|', '/')
                errors.append([step, f'`{record["case"]}`', record['date'], message])
    return parts + (['### errors', markdown_table(errors)] if len(errors) > 1 else [])


def write_report(out: Path) -> Path:
    """Writes OUT/report.md: a section for each GPU, driver, commit and versions with results. Returns its path."""
    steps = {step: read(out, step) for step in TABLES}
    environments: list[dict[str, str]] = []
    for record in itertools.chain(*steps.values()):
        if record['environment'] not in environments:
            environments.append(record['environment'])
    parts = ['# Measurements of benchmarks/gpu.py']
    for facts in environments:
        parts += section(
            facts, {step: [r for r in found if r['environment'] == facts] for step, found in steps.items()}
        )
    path = out / 'report.md'
    path.write_text('\n\n'.join(parts) + '\n')
    return path
