"""The report of a comparison: Markdown, two figures, and all numbers as JSON."""

import os
import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Optional

from acmix_mm.comparison.figures import (
    draw_curves,
    draw_quality_cost,
    is_equal_time,
    metrics_of,
)
from acmix_mm.comparison.matching import LATENCY_TOLERANCE, TOLERANCE
from acmix_mm.comparison.plan import QUANTITIES
from acmix_mm.comparison.record import write_json
from acmix_mm.comparison.runs import Run, quality
from acmix_mm.comparison.tuning import score
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.markdown import table

REPORT, NUMBERS = 'report.md', 'report.json'
CURVES, QUALITY_COST = 'curves.png', 'quality_cost.png'
MISSING = 'missing'


def write_report(plan: dict[str, Any], runs: Sequence[Run], tuning: Sequence[Run], command: str,
                 price: Optional[float] = None) -> str:
    """Write the report of a comparison, and return its path.

    Args:
        plan: the plan from :func:`make_plan`.
        runs: the runs; those that are not finished are marked as missing.
        tuning: the runs that tuned a setting.
        command: the command line of the comparison.
        price: price of an hour of a device.
    """
    out = runs[0].out
    numbers = gather(plan, runs, tuning, command, price)
    write_json(os.path.join(out, NUMBERS), numbers)
    if metrics_of(numbers):
        draw_curves(numbers, os.path.join(out, CURVES))
        draw_quality_cost(numbers, os.path.join(out, QUALITY_COST))
    path = os.path.join(out, REPORT)
    with atomic_write(path) as temporary:
        temporary.write_text(markdown(numbers))
    return path


def gather(plan: dict[str, Any], runs: Sequence[Run], tuning: Sequence[Run] = (), command: str = '',
           price: Optional[float] = None) -> dict[str, Any]:
    """Return the plan, with the results of the runs and their statistics added to each variant.

    Lists of values have an entry for each of ``seeds``, which is None for a missing run; ``runs``
    are the results of the finished ones.
    """
    variants = {}
    for mixer, variant in plan['variants'].items():
        own = [run for run in runs if run.mixer == mixer]
        results = [run.result for run in own]
        finished = [result for result in results if result is not None]

        def statistics_of(name: str, results: list = results) -> dict[str, Any]:
            return mean_and_deviation([result and result[name] for result in results])

        metrics = [result and quality(result['metrics']) for result in results]
        names = dict.fromkeys(name for each in metrics for name in each or ())
        variants[mixer] = dict(
            **variant,
            training_seconds=statistics_of('training_seconds'),
            peak_memory_mib=statistics_of('peak_memory_mib'),
            quality={name: mean_and_deviation([each and each.get(name) for each in metrics])
                     for name in names},
            commands=[shlex.join(run.command) for run in own],
            runs=finished)
        if tuning:
            tried = [run for run in tuning if run.mixer == mixer]
            variants[mixer]['tuning'] = {
                run.setting[1]: run.result and quality(run.result['metrics']) for run in tried}
        if price is not None:
            devices = plan['settings']['gpus_per_run']
            variants[mixer]['cost'] = costs(variants[mixer], price, devices)
    seeds = list(dict.fromkeys(run.seed for run in runs))
    return dict(plan, seeds=seeds, price=price, command=command, variants=variants)


def costs(variant: dict[str, Any], price: float, devices: int) -> dict[str, Any]:
    """Return what training on ``devices``, and a million predictions on one, cost at a price."""
    seconds = variant['training_seconds']['values']
    return dict(
        training=mean_and_deviation([each and each / 3600 * devices * price for each in seconds]),
        million_images={key: 1e6 * value / 3600 * price
                        for key, value in variant['latency']['seconds'].items()})


def mean_and_deviation(values: Sequence[Optional[float]]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two values) and the values."""
    known = [value for value in values if value is not None]
    return dict(mean=statistics.mean(known) if known else None,
                deviation=statistics.stdev(known) if len(known) > 1 else None,
                values=list(values))


def markdown(numbers: dict[str, Any]) -> str:
    """Format the report."""
    settings, variants = numbers['settings'], numbers['variants']
    height, width = numbers['shape']
    commands = '\n'.join(each for variant in variants.values() for each in variant['commands'])
    packages = ', '.join(f'{name} {number}' for name, number in numbers['versions'].items())
    parts = [f"# {', '.join(variants)}: {settings['config']}", *unfinished(numbers),
             conditions(numbers), table(list(main_table(numbers))), f"""\
- Parameters and multiply-adds exclude the auxiliary heads, which are used only in training.
- Multiply-adds and latency are for one image of {height}×{width}, the size of the first \
validation image.
- Latency is that of a prediction without the selection of boxes: median and quartiles of \
interleaved runs.
- Peak memory is the memory that one training step adds.
- Training time excludes validation and saving.
{price_note(numbers)}- {deviation_note(len(numbers['seeds']))}"""]
    if metrics_of(numbers):
        parts += [table(list(seed_table(numbers))), f'![Learning curves]({CURVES})',
                  f'![Quality against cost]({QUALITY_COST})']
    if settings['tune'] is not None:
        parts += ['## Tuning', tuning(numbers)]
    parts += ['## Changes made by matching', table(list(change_table(numbers))), """\
Whole models are matched. The backbones may differ by more, because the size of a head depends on \
the width of the backbone.""", '## Reproduction', f"{numbers['date']}, {numbers['machine']}; \
{packages}.", f"""\
```bash
{numbers['command']}
```""", 'Single runs, with the configs next to this report:', f"""\
```bash
{commands}
```"""]
    return '\n\n'.join(parts) + '\n'


def unfinished(numbers: dict[str, Any]) -> Iterator[str]:
    """Say how many runs are missing, if any are."""
    seeds = numbers['seeds']
    total = len(seeds) * len(numbers['variants'])
    found = sum(len(variant['runs']) for variant in numbers['variants'].values())
    if found < total:
        yield (f'**Unfinished: {total - found} of {total} runs are missing.** The command at the '
               'end of this report resumes them.')


def main_table(numbers: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table of costs and metrics."""
    metrics, price = metrics_of(numbers), numbers['price']
    yield ['mixer', 'parameters, model', 'backbone', 'multiply-adds, model', 'backbone',
           'latency', 'peak memory', 'iterations', 'training time',
           *(['cost of training', 'of a million images'] if price is not None else []),
           *(f'{metric}, mean ± deviation' for metric in metrics)]
    for mixer, variant in numbers['variants'].items():
        counts = variant['counts']
        row = [mixer, f'{counts["params"] / 1e6:.3f}M', f'{counts["backbone_params"] / 1e6:.3f}M',
               f'{counts["flops"] / 1e9:.3f}G', f'{counts["backbone_flops"] / 1e9:.3f}G',
               milliseconds(variant['latency']['seconds']),
               plus_minus(variant['peak_memory_mib'], '.0f', ' MiB'), str(variant['iterations']),
               plus_minus(variant['training_seconds'], '.0f', ' s')]
        if price is not None:
            row += [plus_minus(variant['cost']['training'], '.3g'),
                    f'{variant["cost"]["million_images"]["median"]:.3g}']
        yield row + [with_missing(variant['quality'].get(metric)) for metric in metrics]


def seed_table(numbers: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table with the metrics of each run."""
    yield ['mixer', 'metric', *(f'seed {seed}' for seed in numbers['seeds'])]
    for mixer, variant in numbers['variants'].items():
        for metric in metrics_of(numbers):
            values = variant['quality'].get(metric, {}).get('values', [None] * len(
                numbers['seeds']))
            yield [mixer, metric, *(MISSING if value is None else f'{value:.4g}'
                                    for value in values)]


def change_table(numbers: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table of what matching changed."""
    first = next(iter(numbers['variants']))
    yield ['mixer', 'change to the config', f'model, difference to {first}']
    for mixer, variant in numbers['variants'].items():
        yield [mixer, variant['change'], difference(numbers, mixer)]


def tuning(numbers: dict[str, Any]) -> str:
    """Describe how a setting was tuned, with the metric of each value."""
    name, *values = numbers['settings']['tune']
    variants = numbers['variants']
    rows = [['mixer', *values]]
    for mixer, variant in variants.items():
        cells = {value: MISSING if metrics is None else f'{score(metrics):.4g}'
                 for value, metrics in variant['tuning'].items()}
        if 'tuned' in variant:
            cells[variant['tuned']] = f'**{cells[variant["tuned"]]}**'
        rows.append([mixer, *cells.values()])
    at_end = [mixer for mixer, variant in variants.items()
              if variant.get('tuned') in (values[0], values[-1])]
    note = (f' The chosen value is the first or the last one for {", ".join(at_end)}: a value '
            'beyond it may be better.' if at_end else '')
    return (f'`{name}` was tuned for each mixer: one run of the same length for each value, with a '
            'seed that no run above has. The table shows the metric of its last validation; the '
            f'value in bold was used above.{note}\n\n{table(rows)}')


def conditions(numbers: dict[str, Any]) -> str:
    """Describe what was equal for all mixers and what was not."""
    settings, variants = numbers['settings'], numbers['variants']
    first = next(iter(variants))
    seeds = list(map(str, numbers['seeds']))
    fixed, free = [], [name for name in QUANTITIES.values() if name != 'nothing']
    quantity = QUANTITIES[settings['match']]
    if quantity != 'nothing':
        free.remove(quantity)
        if quantity == 'latency':
            cost = ' and so the cost of a prediction' if numbers['price'] is not None else ''
            fixed.append(f'the latency of the whole model{cost}: medians of interleaved runs were '
                         f'within {LATENCY_TOLERANCE:.0%} of that of {first}, the reference; the '
                         'tables show a second measurement')
        else:
            fixed.append(f'the {quantity} of the whole model: the difference to {first}, the '
                         f"reference, is at most {TOLERANCE:.0%} of its backbone's {quantity}")
    budget = settings['budget']
    if is_equal_time(settings):
        cost = ' and so the cost of training' if numbers['price'] is not None else ''
        fixed.append(f'the training time, {budget}{cost}: the schedule was stretched to the '
                     'iterations that fit, by the time of an iteration measured beforehand; the '
                     'table shows the actual times')
        free.append('the number of iterations')
    else:
        length = "the config's own schedule" if budget is None else 'its schedule stretched'
        fixed.append(f'the number of iterations, {variants[first]["iterations"]} ({length})')
        free.append('training time')
    tuned = settings['tune']
    rest = 'the rest of the recipe' + (f', except for {tuned[0]}, which was tuned' if tuned else '')
    fixed.append(f'{rest}; and the seeds ({", ".join(seeds)}), and so the order of the data')
    if settings['gpus_per_run'] > 1:
        fixed.insert(-1, f'the number of processes of a run, {settings["gpus_per_run"]}')
    lines = '\n'.join(f'- {each};' for each in fixed[:-1])
    return (f'Held constant:\n\n{lines}\n- {fixed[-1]}.\n\n'
            f'Not held constant: {", ".join(free)}, memory.\n\n'
            f'All networks start from {", ".join(numbers["start"])}.')


def deviation_note(seeds: int) -> str:
    """Explain the deviations in the table."""
    if seeds == 1:
        return 'With a single seed there is no deviation, and small differences mean nothing.'
    return (f'The deviation is the standard deviation over {seeds} seeds. A difference between '
            'mixers that does not clearly exceed it is not significant.')


def price_note(numbers: dict[str, Any]) -> str:
    """Explain the costs in the table, in a line; empty if there is no price."""
    if numbers['price'] is None:
        return ''
    devices = numbers['settings']['gpus_per_run']
    used = 'a device' if devices == 1 else f'{devices} devices'
    return (f'- Costs are at {numbers["price"]:g} per hour of a device: of the training time of a '
            f'run on {used}, and of the latency of a million predictions, one at a time.\n')


def difference(numbers: dict[str, Any], mixer: str) -> str:
    """Format the difference between a model and the reference in the matched quantity."""
    quantity, variants = numbers['settings']['match'], numbers['variants']
    first = next(iter(variants))
    if quantity == 'none':
        return 'not matched'
    if quantity == 'latency':
        ratio = variants[mixer]['latency']['ratio']
        low, middle, high = (f'{100 * (ratio[key] - 1):+.1f}' for key in ('low', 'median', 'high'))
        return f'{middle} % (quartiles {low} to {high} %)'
    counts, reference = variants[mixer]['counts'], variants[first]['counts']
    off = counts[quantity] - reference[quantity]
    return (f'{100 * off / reference[quantity]:+.2f} %, or '
            f'{100 * off / reference[f"backbone_{quantity}"]:+.2f} % of the backbone of {first}')


def milliseconds(seconds: dict[str, float]) -> str:
    """Format the median and quartiles of a latency."""
    low, middle, high = (f'{1000 * seconds[key]:.1f}' for key in ('low', 'median', 'high'))
    return f'{middle} ms ({low} to {high})'


def with_missing(numbers: Optional[dict[str, Any]]) -> str:
    """Format mean and deviation of a metric, and how many of its values are missing, if any."""
    if numbers is None or numbers['mean'] is None:
        return MISSING
    text, missing = plus_minus(numbers, '.4g'), numbers['values'].count(None)
    return f'{text} ({missing} {MISSING})' if missing else text


def plus_minus(numbers: dict[str, Any], spec: str, unit: str = '') -> str:
    """Format a mean and its deviation with a format specification."""
    if numbers['mean'] is None:
        return MISSING
    text = f'{numbers["mean"]:{spec}}'
    if numbers['deviation'] is not None:
        text += f' ± {numbers["deviation"]:{".2g" if spec == ".4g" else spec}}'
    return text + unit


