"""The same as ``python -m acmix_mm plot_rates``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('plot_rates')
