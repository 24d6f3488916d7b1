"""Modules built on the operators, one for each kind of host. They need torch alone."""

from .window_acmix import WindowACmix

__all__ = ['WindowACmix']
