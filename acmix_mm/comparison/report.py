"""The report of a comparison: Markdown, two figures, and all numbers as JSON."""

import os
import shlex
import statistics
from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
from matplotlib.figure import Figure

from acmix_mm.analysis.figures import save
from acmix_mm.backbones.token_mixers import MIXERS
from acmix_mm.comparison.matching import TOLERANCE
from acmix_mm.comparison.plan import QUANTITIES
from acmix_mm.comparison.record import write_json
from acmix_mm.comparison.runs import Run, quality
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.markdown import table

REPORT, NUMBERS = 'report.md', 'report.json'
CURVES, QUALITY_COST = 'curves.png', 'quality_cost.png'
# A mixer has the same style in all reports. The colours are those of Okabe and Ito, which people
# with colour blindness can distinguish.
STYLES = {mixer: dict(color=color, marker=marker) for mixer, color, marker in zip(
    MIXERS, ('#D55E00', '#009E73', '#0072B2', '#CC79A7', '#56B4E9', '#E69F00'), 'sDo^Pv')}


def write_report(plan: dict[str, Any], runs: Sequence[Run], command: str) -> str:
    """Write the report of a comparison, and return its path.

    Args:
        plan: the plan from :func:`make_plan`.
        runs: the runs, all finished.
        command: the command line of the comparison.
    """
    out = runs[0].out
    numbers = gather(plan, runs, command)
    write_json(os.path.join(out, NUMBERS), numbers)
    draw_curves(numbers, os.path.join(out, CURVES))
    draw_quality_cost(numbers, os.path.join(out, QUALITY_COST))
    path = os.path.join(out, REPORT)
    with atomic_write(path) as temporary:
        temporary.write_text(markdown(numbers))
    return path


def gather(plan: dict[str, Any], runs: Sequence[Run], command: str) -> dict[str, Any]:
    """Return the plan, with the results of the runs and their statistics added to each variant."""
    variants = {}
    for mixer, variant in plan['variants'].items():
        own = [run for run in runs if run.mixer == mixer]
        results = [run.result for run in own]
        metrics = [quality(result['metrics']) for result in results]
        variants[mixer] = dict(
            **variant,
            training_seconds=mean_and_deviation([each['training_seconds'] for each in results]),
            peak_memory_mib=mean_and_deviation([each['peak_memory_mib'] for each in results]),
            quality={name: mean_and_deviation([each[name] for each in metrics])
                     for name in metrics[0]},
            commands=[shlex.join(run.command) for run in own],
            runs=results)
    return dict(plan, command=command, variants=variants)


def mean_and_deviation(values: Sequence[Optional[float]]) -> dict[str, Any]:
    """Return mean, sample standard deviation (None for fewer than two values) and the values."""
    known = [value for value in values if value is not None]
    return dict(mean=statistics.mean(known) if known else None,
                deviation=statistics.stdev(known) if len(known) > 1 else None,
                values=list(values))


def markdown(numbers: dict[str, Any]) -> str:
    """Format the report."""
    settings, variants = numbers['settings'], numbers['variants']
    first = next(iter(variants))
    height, width = numbers['shape']
    seeds = [result['seed'] for result in variants[first]['runs']]
    metrics = list(variants[first]['quality'])
    rows = [['mixer', 'parameters, model', 'backbone', 'multiply-adds, model', 'backbone',
             'latency', 'peak memory', 'iterations', 'training time',
             *(f'{metric}, mean ± deviation' for metric in metrics)]]
    for mixer, variant in variants.items():
        counts = variant['counts']
        rows.append([
            mixer, f'{counts["params"] / 1e6:.3f}M', f'{counts["backbone_params"] / 1e6:.3f}M',
            f'{counts["flops"] / 1e9:.3f}G', f'{counts["backbone_flops"] / 1e9:.3f}G',
            milliseconds(variant['latency']['seconds']),
            plus_minus(variant['peak_memory_mib'], '.0f', ' MiB'), str(variant['iterations']),
            plus_minus(variant['training_seconds'], '.0f', ' s'),
            *(plus_minus(variant['quality'][metric], '.4g') for metric in metrics)])
    by_seed = [['mixer', 'metric', *(f'seed {seed}' for seed in seeds)]]
    by_seed += [[mixer, metric, *(f'{value:.4g}' for value in variant['quality'][metric]['values'])]
                for mixer, variant in variants.items() for metric in metrics]
    changed = [['mixer', 'change to the config', f'model, difference to {first}']]
    changed += [[mixer, variant['change'], difference(numbers, mixer)]
                for mixer, variant in variants.items()]
    packages = ', '.join(f'{name} {number}' for name, number in numbers['versions'].items())
    commands = '\n'.join(each for variant in variants.values() for each in variant['commands'])
    return f"""# {', '.join(variants)}: {settings['config']}

{conditions(numbers)}

{table(rows)}

- Parameters and multiply-adds exclude the auxiliary heads, which are used only in training.
- Multiply-adds and latency are for one image of {height}×{width}, the size of the first \
validation image.
- Latency is that of a prediction without the selection of boxes: median and quartiles of \
interleaved runs.
- Peak memory is the memory that one training step adds.
- Training time excludes validation and saving.
- {deviation_note(len(seeds))}

{table(by_seed)}

![Learning curves]({CURVES})

![Quality against cost]({QUALITY_COST})

## Changes made by matching

{table(changed)}

Whole models are matched. The backbones may differ by more, because the size of a head depends on \
the width of the backbone.

## Reproduction

{numbers['date']}, {numbers['machine']}; {packages}.

```bash
{numbers['command']}
```

Single runs, with the configs next to this report:

```bash
{commands}
```
"""


def conditions(numbers: dict[str, Any]) -> str:
    """Describe what was equal for all mixers and what was not."""
    settings, variants = numbers['settings'], numbers['variants']
    first = next(iter(variants))
    seeds = [str(result['seed']) for result in variants[first]['runs']]
    fixed, free = [], [name for name in QUANTITIES.values() if name != 'nothing']
    quantity = QUANTITIES[settings['match']]
    if quantity != 'nothing':
        free.remove(quantity)
        if quantity == 'latency':
            fixed.append(f'the latency of the whole model: medians of interleaved runs were within '
                         f'{TOLERANCE:.0%} of that of {first}, the reference; the tables show a '
                         'second measurement')
        else:
            fixed.append(f'the {quantity} of the whole model: the difference to {first}, the '
                         f"reference, is at most {TOLERANCE:.0%} of its backbone's {quantity}")
    budget = settings['budget']
    if is_equal_time(settings):
        fixed.append(f'the training time, {budget}: the schedule was stretched to the iterations '
                     'that fit, by the time of an iteration measured beforehand; the table shows '
                     'the actual times')
        free.append('the number of iterations')
    else:
        length = "the config's own schedule" if budget is None else 'its schedule stretched'
        fixed.append(f'the number of iterations, {variants[first]["iterations"]} ({length})')
        free.append('training time')
    fixed.append(f'the rest of the recipe and the seeds ({", ".join(seeds)}), and so the order of '
                 'the data')
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


def is_equal_time(settings: dict[str, Any]) -> bool:
    """Whether all runs have the same training time, rather than the same iterations."""
    return 'minute' in (settings['budget'] or '')


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


def plus_minus(numbers: dict[str, Any], spec: str, unit: str = '') -> str:
    """Format a mean and its deviation with a format specification."""
    if numbers['mean'] is None:
        return 'unknown'
    text = f'{numbers["mean"]:{spec}}'
    if numbers['deviation'] is not None:
        text += f' ± {numbers["deviation"]:{".2g" if spec == ".4g" else spec}}'
    return text + unit


def draw_curves(numbers: dict[str, Any], path: str) -> None:
    """Draw the training loss, and each metric that was measured more than once.

    The horizontal axis is what all runs have in common: iterations or, for budgets in minutes, time
    (iterations times the mean time of an iteration).
    """
    variants = numbers['variants']
    lines = {'training loss': {mixer: [result['loss'] for result in variant['runs']]
                               for mixer, variant in variants.items()}}
    for metric in next(iter(variants.values()))['quality']:
        lines[axis_label(metric)] = {
            mixer: [[[iteration, values[metric]] for iteration, values in result['validations']]
                    for result in variant['runs']] for mixer, variant in variants.items()}
    lines = {label: each for label, each in lines.items()
             if any(len(curve) > 1 for curves in each.values() for curve in curves)}
    axis, unit = 'iterations', dict.fromkeys(variants, 1)
    if is_equal_time(numbers['settings']):
        axis = 'training time (minutes)'
        unit = {mixer: variant['training_seconds']['mean'] / 60 / variant['iterations']
                for mixer, variant in variants.items()}
    figure = Figure(figsize=(6 * len(lines), 4.2), layout='constrained')
    panels = figure.subplots(1, len(lines), squeeze=False)[0] if lines else []
    for panel, (label, curves_of) in zip(panels, lines.items()):
        for mixer, curves in curves_of.items():
            draw_curve(panel, curves, unit[mixer], mixer, marked=label != 'training loss')
        panel.set(xlabel=axis, ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=axis == 'iterations')
        panel.grid(alpha=0.3)
    if lines:
        panels[0].legend(title=legend_title(numbers))
    save(figure, path)


def draw_curve(panel: Any, curves: Sequence[Sequence[Sequence[float]]], unit: float, mixer: str,
               marked: bool) -> None:
    """Draw the mean over runs as a line, and its standard deviation as a band.

    Args:
        panel: axes to draw on.
        curves: for each run pairs of iteration and value.
        unit: length of an iteration on the horizontal axis.
        mixer: name of the mixer.
        marked: whether to mark the points.
    """
    points = min(map(len, curves))
    places = [unit * point[0] for point in curves[0][:points]]
    values = np.array([[point[1] for point in curve[:points]] for curve in curves], dtype=float)
    mean = values.mean(0)
    style = STYLES[mixer] if marked else dict(color=STYLES[mixer]['color'])
    panel.plot(places, mean, label=mixer, **style)
    if len(curves) > 1:
        deviation = values.std(0, ddof=1)
        panel.fill_between(places, mean - deviation, mean + deviation,
                           color=STYLES[mixer]['color'], alpha=0.2, linewidth=0)


def draw_quality_cost(numbers: dict[str, Any], path: str) -> None:
    """Draw every metric against every cost, with a point for each mixer."""
    variants = numbers['variants']
    metrics = list(next(iter(variants.values()))['quality'])
    costs = {mixer: costs_of(variant) for mixer, variant in variants.items()}
    labels = list(next(iter(costs.values())))
    figure = Figure(figsize=(3.6 * len(labels), 3.6 * len(metrics)), layout='constrained')
    panels = figure.subplots(len(metrics), len(labels), sharey='row', sharex='col', squeeze=False)
    for row, metric in zip(panels, metrics):
        for panel, label in zip(row, labels):
            for mixer, variant in variants.items():
                cost, low, high = costs[mixer][label]
                result = variant['quality'][metric]
                panel.errorbar(cost, result['mean'], xerr=[[cost - low], [high - cost]],
                               yerr=result['deviation'], markersize=8, capsize=3,
                               linestyle='none', label=mixer, **STYLES[mixer])
            panel.grid(alpha=0.3)
        row[0].set_ylabel(axis_label(metric))
    for panel, label in zip(panels[-1], labels):
        panel.set_xlabel(label)
        # From zero, so that matched costs look equal.
        panel.set_xlim(0, 1.15 * max(cost[label][2] for cost in costs.values()))
    figure.legend(*panels[0][0].get_legend_handles_labels(), title=legend_title(numbers),
                  loc='outside upper center', ncols=len(variants))
    save(figure, path)


def costs_of(variant: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return the costs of a mixer as (value, low, high), by axis label."""
    params, flops = variant['counts']['params'] / 1e6, variant['counts']['flops'] / 1e9
    latency = {key: 1000 * value for key, value in variant['latency']['seconds'].items()}
    training, deviation = (variant['training_seconds'][key] or 0. for key in ('mean', 'deviation'))
    return {
        'parameters of the model (M)': (params, params, params),
        'multiply-adds of the model (G)': (flops, flops, flops),
        'latency of a prediction (ms)': (latency['median'], latency['low'], latency['high']),
        'training time (minutes)': (training / 60, (training - deviation) / 60,
                                    (training + deviation) / 60),
    }


def axis_label(metric: str) -> str:
    """Return a metric's name, with its unit if that is known."""
    if metric == 'mIoU':
        return 'mIoU (%)'
    return f'{metric} (0 to 1)' if metric.endswith('mAP') else metric


def legend_title(numbers: dict[str, Any]) -> Optional[str]:
    """Explain bands and error bars, if there are any."""
    seeds = len(next(iter(numbers['variants'].values()))['runs'])
    return f'mean ± deviation, {seeds} seeds' if seeds > 1 else None
