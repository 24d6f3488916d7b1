"""The report of a comparison: Markdown, two pictures, and all numbers as JSON."""

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

REPORT, NUMBERS, CURVES, QUALITY_COST = (
    'report.md', 'report.json', 'curves.png', 'quality_cost.png')
# A mixer has its colour and marker in all reports. They are Okabe and Ito's colours, which the
# colour-blind can tell apart.
STYLES = {mixer: dict(color=colour, marker=marker) for mixer, colour, marker in zip(
    MIXERS, ('#D55E00', '#009E73', '#0072B2', '#CC79A7', '#56B4E9', '#E69F00'), 'sDo^Pv')}


def write_report(plan: dict[str, Any], runs: Sequence[Run], command: str) -> str:
    """Write the report of finished runs, and return its path.

    Args:
        plan: from :func:`make_plan`.
        runs: all of them finished.
        command: what the user typed.
    """
    out = runs[0].out
    numbers = gather(plan, runs, command)
    write_json(os.path.join(out, NUMBERS), numbers)
    draw_curves(numbers, os.path.join(out, CURVES))
    draw_quality_cost(numbers, os.path.join(out, QUALITY_COST))
    path = os.path.join(out, REPORT)
    with atomic_write(path) as beside:
        beside.write_text(markdown(numbers))
    return path


def gather(plan: dict[str, Any], runs: Sequence[Run], command: str) -> dict[str, Any]:
    """The plan, and in each of its variants what the runs wrote and what they come to."""
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
    """Mean, sample standard deviation (None of fewer than two), and the values."""
    known = [value for value in values if value is not None]
    return dict(mean=statistics.mean(known) if known else None,
                deviation=statistics.stdev(known) if len(known) > 1 else None,
                values=list(values))


def markdown(numbers: dict[str, Any]) -> str:
    """The text of the report."""
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
    changed = [['mixer', 'what was changed in the config', f'model, difference to {first}']]
    changed += [[mixer, variant['change'], difference(numbers, mixer)]
                for mixer, variant in variants.items()]
    packages = ', '.join(f'{name} {number}' for name, number in numbers['versions'].items())
    commands = '\n'.join(each for variant in variants.values() for each in variant['commands'])
    return f"""# {', '.join(variants)}: {settings['config']}

{what_was_held(numbers)}

{table(rows)}

- Parameters and multiply-adds are of all that predicts, without auxiliary heads of training.
- Multiply-adds and latency are of one picture of {height}×{width}, the first of validation.
- Latency is a prediction's, without what selects boxes: median and quartiles of timings in which \
the mixers took turns.
- Peak memory is that of one training step, above what the process held before it.
- Training time is that of the iterations alone, without validation and saving.
- The deviation is the standard deviation over {number_of(len(seeds), 'seed')}\
{'' if len(seeds) > 1 else ', of which there is none'}. A difference between mixers that is not \
well above it says nothing.

{table(by_seed)}

![Learning curves]({CURVES})

![Quality against cost]({QUALITY_COST})

## What was changed to match

{table(changed)}

What is matched are whole models; the backbones may differ by more, since heads grow and shrink \
with the width of what they read.

## How it was made

{numbers['date']}, {numbers['machine']}; {packages}.

```bash
{numbers['command']}
```

Each run alone, from the configs beside this report:

```bash
{commands}
```
"""


def what_was_held(numbers: dict[str, Any]) -> str:
    """In words, what was equal for all mixers and what was not."""
    settings, variants = numbers['settings'], numbers['variants']
    first = next(iter(variants))
    seeds = [str(result['seed']) for result in variants[first]['runs']]
    held, free = [], [name for name in QUANTITIES.values() if name != 'nothing']
    quantity = QUANTITIES[settings['match']]
    if quantity != 'nothing':
        free.remove(quantity)
        if quantity == 'latency':
            held.append(f'the latency of the whole model: medians of timings in turn were within '
                        f'{TOLERANCE:.0%} of that of {first}, the reference, and were taken again '
                        'for the tables')
        else:
            held.append(f'the {quantity} of the whole model: the difference to {first}, the '
                        f"reference, is at most {TOLERANCE:.0%} of its backbone's {quantity}")
    budget = settings['budget']
    if is_equal_time(settings):
        held.append(f'the training time, {budget}: an iteration of each was timed before, and '
                    'the schedule stretched to as many as fit; the table has what they took')
        free.append('the number of iterations')
    else:
        length = "the config's own schedule" if budget is None else 'its schedule stretched'
        held.append(f'the number of iterations, {variants[first]["iterations"]} ({length})')
        free.append('training time')
    held.append(f'the rest of the recipe, the seeds ({", ".join(seeds)}) and with them the order '
                'of the data')
    lines = '\n'.join(f'- {each};' for each in held[:-1])
    return (f'Held constant:\n\n{lines}\n- {held[-1]}.\n\n'
            f'Not held constant: {", ".join(free)}, memory.\n\n'
            f'All networks start from {", ".join(numbers["start"])}.')


def is_equal_time(settings: dict[str, Any]) -> bool:
    return 'minute' in (settings['budget'] or '')


def difference(numbers: dict[str, Any], mixer: str) -> str:
    """How far a mixer's model is from the reference's in what was matched.

    The backbones may differ by more: a head that reads them grows and shrinks with their width.
    """
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
    low, middle, high = (f'{1000 * seconds[key]:.1f}' for key in ('low', 'median', 'high'))
    return f'{middle} ms ({low} to {high})'


def plus_minus(numbers: dict[str, Any], form: str, unit: str = '') -> str:
    if numbers['mean'] is None:
        return 'unknown'
    text = f'{numbers["mean"]:{form}}'
    if numbers['deviation'] is not None:
        text += f' ± {numbers["deviation"]:{".2g" if form == ".4g" else form}}'
    return text + unit


def number_of(number: int, what: str) -> str:
    return f'{number} {what}' + 's' * (number != 1)


def draw_curves(numbers: dict[str, Any], path: str) -> None:
    """Loss, and quality if it was taken more than once, against what all had the same of:
    iterations, or time, an iteration of a mixer taking as long as its mean.
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
    label_of_length, length = 'iterations', dict.fromkeys(variants, 1)
    if is_equal_time(numbers['settings']):
        label_of_length = 'training time (minutes)'
        length = {mixer: variant['training_seconds']['mean'] / 60 / variant['iterations']
                  for mixer, variant in variants.items()}
    figure = Figure(figsize=(6 * len(lines), 4.2), layout='constrained')
    panels = figure.subplots(1, len(lines), squeeze=False)[0] if lines else []
    for panel, (label, curves_of) in zip(panels, lines.items()):
        for mixer, curves in curves_of.items():
            draw_curve(panel, curves, length[mixer], mixer, marked=label != 'training loss')
        panel.set(xlabel=label_of_length, ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=label_of_length == 'iterations')
        panel.grid(alpha=0.3)
    if lines:
        panels[0].legend(title=shading(numbers))
    save(figure, path)


def draw_curve(panel: Any, curves: Sequence[Sequence[Sequence[float]]], length: float, mixer: str,
               marked: bool) -> None:
    """The mean over runs as a line, and its standard deviation as a band.

    Args:
        panel: axes to draw on.
        curves: of each run, pairs of iteration and value.
        length: of an iteration on the horizontal axis.
        mixer: what is drawn.
        marked: whether points are marked.
    """
    points = min(map(len, curves))
    places = [length * point[0] for point in curves[0][:points]]
    values = np.array([[point[1] for point in curve[:points]] for curve in curves], dtype=float)
    mean = values.mean(0)
    style = STYLES[mixer] if marked else dict(color=STYLES[mixer]['color'])
    panel.plot(places, mean, label=mixer, **style)
    if len(curves) > 1:
        deviation = values.std(0, ddof=1)
        panel.fill_between(places, mean - deviation, mean + deviation,
                           color=STYLES[mixer]['color'], alpha=0.2, linewidth=0)


def draw_quality_cost(numbers: dict[str, Any], path: str) -> None:
    """Every metric against every cost, a point for each mixer."""
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
        # From zero, so that what was matched looks as equal as it is.
        panel.set_xlim(0, 1.15 * max(cost[label][2] for cost in costs.values()))
    figure.legend(*panels[0][0].get_legend_handles_labels(), title=shading(numbers),
                  loc='outside upper center', ncols=len(variants))
    save(figure, path)


def costs_of(variant: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """What a mixer costs, and from where to where that was measured, by the label of an axis."""
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
    """With the unit, where that is known."""
    if metric == 'mIoU':
        return 'mIoU (%)'
    return f'{metric} (0 to 1)' if metric.endswith('mAP') else metric


def shading(numbers: dict[str, Any]) -> Optional[str]:
    """What a legend says of bands and bars."""
    seeds = len(next(iter(numbers['variants'].values()))['runs'])
    return f'mean ± deviation, {seeds} seeds' if seeds > 1 else None
