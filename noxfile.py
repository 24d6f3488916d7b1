"""The test suite and the demo on every stack: ``nox``, or ``nox -s NAME`` for one of them.

Each session creates its environment from ``constraints/NAME.txt``, as ``make STACK=NAME`` does.
"""

import nox

nox.options.default_venv_backend = 'none'


def test(session: nox.Session) -> None:
    """Run ``make`` on the stack that has the name of the session."""
    session.run('make', 'suite', 'demo', f'STACK={session.name}', external=True)


@nox.session
def pinned(session: nox.Session) -> None:
    """torch 2.11 with OpenMMLab's packages, the versions that ``make test`` uses."""
    test(session)


@nox.session
def onedl(session: nox.Session) -> None:
    """The maintained forks, with the newest torch that they have prebuilt wheels for."""
    test(session)


@nox.session
def newest(session: nox.Session) -> None:
    """The newest torch, with the forks."""
    test(session)


@nox.session
def torch21(session: nox.Session) -> None:
    """torch 2.1, the newest that OpenMMLab has prebuilt wheels of mmcv 2.1 for."""
    test(session)
