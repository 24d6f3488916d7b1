"""The same as ``python -m acmix_mm convert_weights``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('convert_weights')
