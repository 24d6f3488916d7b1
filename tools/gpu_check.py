"""The same as ``python -m acmix_mm gpu_check``."""

from acmix_mm.commands import run_tool

if __name__ == '__main__':
    run_tool('gpu_check')
