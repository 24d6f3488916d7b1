"""Figures of a comparison: learning curves, and quality against each cost."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Optional

import numpy as np
from matplotlib.figure import Figure

from acmix_mm.analysis.figures import save


def style(color: str, marker: str, linestyle: str = '-', filled: bool = True) -> dict[str, Any]:
    return dict(color=color, marker=marker, linestyle=linestyle,
                markerfacecolor=color if filled else 'white')


# A mixer has the same style in all figures. The colours are those of Okabe and Ito, which people
# with colour blindness can distinguish, and black, grey and purple. Combinations with global
# attention have the colour and marker of their local layer, which is hollow, and a dashed line.
STYLES = {
    'conv': style('#D55E00', 's'),
    'conv7': style('#56B4E9', 'P'),
    'involution': style('#E69F00', 'v'),
    'attn': style('#009E73', 'D'),
    'attn-global': style('#009E73', 'D', '--', filled=False),
    'acmix': style('#0072B2', 'o'),
    'acmix-conv': style('#CC79A7', '^'),
    'acmix-global': style('#0072B2', 'o', '--', filled=False),
    'global': style('#000000', 'X', '--'),
    'random': style('#7F7F7F', 'p', ':'),
    'bigbird': style('#7A3BA8', '*', '-.'),
}
# Inches of a column of a legend.
LEGEND_COLUMN = 1.5


def metrics_of(numbers: dict[str, Any]) -> list[str]:
    """Return the names of the main metrics of a report, those of the runs that are finished."""
    return list(dict.fromkeys(metric for variant in numbers['variants'].values()
                              for metric in variant['quality']))


def draw_curves(numbers: dict[str, Any], path: str) -> None:
    """Draw the training loss, and each metric that was measured more than once.

    The horizontal axis is what all runs have in common: iterations or, for budgets in minutes, time
    (iterations times the mean time of an iteration).
    """
    variants = {mixer: variant for mixer, variant in numbers['variants'].items()
                if variant['runs']}
    lines = {'training loss': {mixer: [result['loss'] for result in variant['runs']]
                               for mixer, variant in variants.items()}}
    for metric in metrics_of(numbers):
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
    figure = Figure(figsize=(6 * max(len(lines), 1), 4.6), layout='constrained')
    panels = figure.subplots(1, len(lines), squeeze=False)[0] if lines else []
    for panel, (label, curves_of) in zip(panels, lines.items()):
        for mixer, curves in curves_of.items():
            draw_curve(panel, curves, unit[mixer], mixer, marked=label != 'training loss')
        panel.set(xlabel=axis, ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=axis == 'iterations')
        panel.grid(alpha=0.3)
    if lines:
        add_legend(figure, panels, legend_title(numbers))
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
    draw_band(panel, places, values, mixer, marked)


def draw_band(panel: Any, places: Sequence[float], values: np.ndarray, mixer: str,
              marked: bool = True) -> None:
    """Draw means as a line, and their standard deviations as a band.

    Args:
        panel: axes to draw on.
        places: places of the n points on the horizontal axis.
        values: (runs, n), with NaN for missing values.
        mixer: name of the mixer.
        marked: whether to mark the points.
    """
    look = dict(STYLES[mixer])
    if not marked:
        look['marker'] = None
    mean = np.array([np.mean(known) if len(known) else math.nan for known in columns(values)])
    panel.plot(places, mean, label=mixer, markersize=7, **look)
    deviation = np.array([np.std(known, ddof=1) if len(known) > 1 else 0.
                          for known in columns(values)])
    if deviation.any():
        panel.fill_between(places, mean - deviation, mean + deviation, color=look['color'],
                           alpha=0.15, linewidth=0)


def columns(values: np.ndarray) -> list[np.ndarray]:
    """Return the values of each column that are not NaN."""
    return [column[~np.isnan(column)] for column in values.T]


def draw_quality_cost(numbers: dict[str, Any], path: str) -> None:
    """Draw every metric against every cost, with a point for each mixer."""
    variants = {mixer: variant for mixer, variant in numbers['variants'].items()
                if variant['runs']}
    metrics = metrics_of(numbers)
    costs = {mixer: costs_of(variant) for mixer, variant in variants.items()}
    labels = list(next(iter(costs.values())))
    across = len(labels) if len(labels) < 5 else math.ceil(len(labels) / 2)
    rows_each = math.ceil(len(labels) / across)
    figure = Figure(figsize=(3.6 * across, 3.6 * rows_each * len(metrics)), layout='constrained')
    grid = figure.subplots(rows_each * len(metrics), across, squeeze=False, sharey=False)
    for index, metric in enumerate(metrics):
        panels = grid[index * rows_each:(index + 1) * rows_each].flat
        first = panels[0]
        for panel, label in zip(panels, labels):
            if panel is not first:
                panel.sharey(first)
            for mixer, variant in variants.items():
                cost, low, high = costs[mixer][label]
                result = variant['quality'][metric]
                draw_point(panel, cost, result, mixer, xerr=[[cost - low], [high - cost]])
            panel.grid(alpha=0.3)
            panel.set_xlabel(label)
            # From zero, so that matched costs look equal.
            panel.set_xlim(0, 1.15 * max(cost[label][2] for cost in costs.values()))
        for row in grid[index * rows_each:(index + 1) * rows_each]:
            row[0].set_ylabel(axis_label(metric))
    add_legend(figure, grid.flat, legend_title(numbers))
    save(figure, path)


def draw_point(panel: Any, place: float, result: dict[str, Any], mixer: str,
               **options: Any) -> None:
    """Draw a mean with its standard deviation as an error bar.

    Args:
        panel: axes to draw on.
        place: place of the point on the horizontal axis.
        result: ``mean`` and ``deviation``, which may be None.
        mixer: name of the mixer.
        options: further options of ``errorbar``.
    """
    look = {**STYLES[mixer], 'linestyle': 'none'}
    panel.errorbar(place, result['mean'], yerr=result['deviation'], markersize=8, capsize=3,
                   label=mixer, **look, **options)


def add_legend(figure: Figure, panels: Iterable[Any], title: Optional[str]) -> None:
    """Add a legend of all mixers in the panels above them, in as many rows as it takes."""
    entries = {label: handle for panel in panels
               for handle, label in zip(*panel.get_legend_handles_labels())}
    fitting = max(int(figure.get_figwidth() // LEGEND_COLUMN), 1)
    rows = math.ceil(len(entries) / fitting)
    figure.legend(entries.values(), entries.keys(), title=title, loc='outside upper center',
                  ncols=math.ceil(len(entries) / rows))


def costs_of(variant: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Return the costs of a mixer as (value, low, high), by axis label."""
    params, flops = variant['counts']['params'] / 1e6, variant['counts']['flops'] / 1e9
    latency = {key: 1000 * value for key, value in variant['latency']['seconds'].items()}
    found = {
        'parameters of the model (M)': (params, params, params),
        'multiply-adds of the model (G)': (flops, flops, flops),
        'latency of a prediction (ms)': (latency['median'], latency['low'], latency['high']),
        'training time (minutes)': interval(variant['training_seconds'], 1 / 60),
    }
    if 'cost' in variant:
        images = variant['cost']['million_images']
        found['cost of training'] = interval(variant['cost']['training'])
        found['cost of a million images'] = (images['median'], images['low'], images['high'])
    return found


def interval(numbers: dict[str, Any], factor: float = 1.) -> tuple[float, float, float]:
    """Return mean, and mean minus and plus the deviation, multiplied by a factor."""
    mean, deviation = factor * numbers['mean'], factor * (numbers['deviation'] or 0.)
    return mean, mean - deviation, mean + deviation


def axis_label(metric: str) -> str:
    """Return a metric's name, with its unit if that is known."""
    if metric in ('mIoU', 'aAcc'):
        return f'{metric} (%)'
    return f'{metric} (0 to 1)' if metric.endswith('mAP') else metric


def is_equal_time(settings: dict[str, Any]) -> bool:
    """Whether all runs have the same training time, rather than the same iterations."""
    return 'minute' in (settings['budget'] or '')


def legend_title(numbers: dict[str, Any]) -> Optional[str]:
    """Explain bands and error bars, if there are any."""
    finished = {len(variant['runs']) for variant in numbers['variants'].values()} - {0}
    if max(finished) < 2:
        return None
    ends = sorted({min(finished), max(finished)})
    return f'mean ± deviation, {" to ".join(map(str, ends))} seeds'
