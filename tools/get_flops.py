"""The same as ``python -m acmix_mm get_flops``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('get_flops')
