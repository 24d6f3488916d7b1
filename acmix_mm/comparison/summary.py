"""A summary of several comparisons: a table of tasks against mixers, and a figure."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
from matplotlib.figure import Figure

from acmix_mm.analysis.figures import save
from acmix_mm.comparison.figures import (
    STYLES,
    add_legend,
    axis_label,
    draw_band,
    draw_point,
    metrics_of,
)
from acmix_mm.comparison.report import MISSING, NUMBERS, with_missing
from acmix_mm.utils.atomic_write import atomic_write
from acmix_mm.utils.errors import UsageError
from acmix_mm.utils.markdown import table

SUMMARY, FIGURE = 'summary.md', 'summary.png'

Reports = Mapping[str, dict[str, Any]]


def read_reports(folders: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read the numbers of comparisons, by label.

    Args:
        folders: the folder of each comparison, by label.

    Raises:
        UsageError: a folder has no report.
    """
    reports = {}
    for label, folder in folders.items():
        path = Path(folder, NUMBERS)
        if not path.is_file():
            raise UsageError(f'{folder} has no {NUMBERS}; name the work directory of a comparison.')
        reports[label] = json.loads(path.read_text())
    return reports


def all_mixers(reports: Reports) -> list[str]:
    """List the mixers of all reports."""
    return list(dict.fromkeys(mixer for numbers in reports.values()
                              for mixer in numbers['variants']))


def all_metrics(reports: Reports) -> list[str]:
    """List the metrics of all reports.

    Raises:
        UsageError: no run is finished.
    """
    metrics = list(dict.fromkeys(metric for numbers in reports.values()
                                 for metric in metrics_of(numbers)))
    if not metrics:
        raise UsageError('No run of these comparisons is finished.')
    return metrics


def result_of(numbers: dict[str, Any], mixer: str, metric: str) -> Optional[dict[str, Any]]:
    """Return mean, deviation and values of a metric; None if no run of the mixer has it."""
    result = numbers['variants'].get(mixer, {}).get('quality', {}).get(metric)
    return None if result is None or result['mean'] is None else result


def write_summary(reports: Reports, out: str, heading: str, sweep: bool = False,
                  reach: Optional[Mapping[str, float]] = None) -> str:
    """Write a table and a figure of several comparisons, and return the path of the table.

    Args:
        reports: the contents of ``report.json`` by label: a task or, with ``sweep``, a number.
        out: folder to write to.
        heading: what the labels are.
        sweep: whether the labels are numbers, against which the figure plots the metrics.
        reach: with ``sweep``, a place on its axis to be marked for each mixer.

    Raises:
        UsageError: no run is finished, or a mixer in ``reach`` was not compared.
    """
    unknown = set(reach or ()) - set(all_mixers(reports))
    if unknown:
        raise UsageError(f'--reach names {", ".join(sorted(unknown))}, which was not compared.')
    if sweep:
        reports = dict(sorted(reports.items(), key=lambda item: float(item[0])))
        figure = draw_sweep(reports, heading, reach or {})
    else:
        figure = draw_tasks(reports)
    os.makedirs(out, exist_ok=True)
    save(figure, os.path.join(out, FIGURE))
    path = os.path.join(out, SUMMARY)
    with atomic_write(path) as temporary:
        temporary.write_text(markdown(reports, heading))
    return path


def markdown(reports: Reports, heading: str) -> str:
    """Format the table of labels against mixers; if there are several metrics, with a column."""
    mixers, metrics = all_mixers(reports), all_metrics(reports)
    several = len(metrics) > 1
    rows = [[heading, *(['metric'] if several else []), *mixers]]
    for label, numbers in reports.items():
        for metric in (several and metrics_of(numbers)) or metrics:
            cells = [with_missing(result_of(numbers, mixer, metric)) for mixer in mixers]
            rows.append([label, *([axis_label(metric)] if several else []), *cells])
    seeds = sorted({len(result['values']) for numbers in reports.values() for mixer in mixers
                    for metric in metrics if (result := result_of(numbers, mixer, metric))})
    what = 'Each metric' if several else axis_label(metrics[0])
    return (f'{table(rows)}\n\n{what}: mean ± standard deviation over '
            f'{" or ".join(map(str, seeds))} seed{"s" * (seeds != [1])}. A difference that does '
            'not clearly exceed the deviations is not significant.\n\n'
            f'![The same as a figure]({FIGURE})\n')


def draw_tasks(reports: Reports) -> Figure:
    """Draw the mean of each mixer with its deviation, grouped by label; a panel for each metric."""
    mixers, metrics = all_mixers(reports), all_metrics(reports)
    width = max(0.25 * len(mixers) * len(reports), 6.)
    figure = Figure(figsize=(width + 1, 4.6 * len(metrics)), layout='constrained')
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    step = 0.8 / len(mixers)
    for panel, metric in zip(panels, metrics):
        labels = [label for label, numbers in reports.items() if metric in metrics_of(numbers)]
        for column, mixer in enumerate(mixers):
            shift = step * (column - (len(mixers) - 1) / 2)
            for group, label in enumerate(labels):
                result = result_of(reports[label], mixer, metric)
                if result is None:
                    panel.text(group + shift, 0.01, MISSING, rotation=90, fontsize='small',
                               color=STYLES[mixer]['color'], transform=panel.get_xaxis_transform(),
                               horizontalalignment='center', verticalalignment='bottom')
                else:
                    draw_point(panel, group + shift, result, mixer)
        for group in range(1, len(labels)):
            panel.axvline(group - 0.5, color='black', linewidth=0.8, linestyle=':')
        panel.set_xticks(range(len(labels)), labels)
        panel.set_xlim(-0.5, len(labels) - 0.5)
        panel.tick_params(axis='x', length=0)
        panel.set_ylabel(axis_label(metric))
        panel.grid(axis='y', alpha=0.3)
    add_legend(figure, panels, deviation_title(reports))
    return figure


def draw_sweep(reports: Reports, heading: str, reach: Mapping[str, float]) -> Figure:
    """Draw each metric against the number that the labels are, with a line for each mixer.

    Vertical lines mark ``reach``, in the colour of the mixer, or of the first with this reach.
    """
    mixers, metrics = all_mixers(reports), all_metrics(reports)
    figure = Figure(figsize=(8, 4.8 * len(metrics)), layout='constrained')
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    places = [float(label) for label in reports]
    for panel, metric in zip(panels, metrics):
        for mixer in mixers:
            results = [result_of(numbers, mixer, metric) for numbers in reports.values()]
            draw_band(panel, places, value_matrix(results), mixer)
        panel.set(xlabel=heading, ylabel=axis_label(metric))
        panel.set_xticks(places)
        panel.grid(alpha=0.3)
        for place in sorted(set(reach.values())):
            here = [mixer for mixer in reach if reach[mixer] == place]
            style = STYLES[here[0]]
            panel.axvline(place, color=style['color'], linewidth=1.2,
                          linestyle=style['linestyle'])
            panel.text(place, 1.01, ', '.join(here), rotation=45, fontsize='small',
                       color=style['color'], transform=panel.get_xaxis_transform(),
                       horizontalalignment='left', verticalalignment='bottom')
    title = deviation_title(reports)
    if reach:
        title = ', '.join([*filter(None, [title]), 'vertical lines: reach'])
    add_legend(figure, panels, title)
    return figure


def value_matrix(results: Sequence[Optional[dict[str, Any]]]) -> np.ndarray:
    """Return the values of each result as a column, with NaN for missing ones."""
    seeds = max((len(result['values']) for result in results if result), default=1)
    matrix = np.full((seeds, len(results)), np.nan)
    for column, result in enumerate(results):
        values = result['values'] if result else []
        matrix[:len(values), column] = [np.nan if value is None else value for value in values]
    return matrix


def deviation_title(reports: Reports) -> Optional[str]:
    """Explain bands and error bars, if there are any."""
    has_deviation = any(result['deviation'] is not None for numbers in reports.values()
                        for variant in numbers['variants'].values()
                        for result in variant['quality'].values())
    return 'mean ± deviation over the seeds' if has_deviation else None
