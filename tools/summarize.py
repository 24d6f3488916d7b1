"""The same as ``python -m acmix_mm summarize``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('summarize')
