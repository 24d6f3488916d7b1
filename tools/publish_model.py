"""The same as ``python -m acmix_mm publish_model``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('publish_model')
