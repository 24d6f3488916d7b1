"""A pickle module that unpickles data only, for ``torch.load`` before torch 2.6.

``weights_only=True`` of these versions refuses MMEngine's checkpoints, whose classes it cannot be
told to allow, and some files make it execute code (CVE-2025-32434).
"""

import codecs
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from os import PathLike
from typing import Any, BinaryIO, ClassVar, Union

import numpy as np
from torch import Tensor

# Classes and functions that a file may name, by their dotted names, besides those on torch's own
# allow list.
ALLOWED: dict[str, Any] = {}
# The functions that rebuild NumPy's arrays and numbers. NumPy 2 renamed the module core to _core.
NUMPY_FUNCTIONS: dict[str, Any] = {
    f'numpy.{core}.multiarray.{name}': function for core in ('core', '_core')
    for name, function in (('_reconstruct', np.empty(0).__reduce__()[0]),
                           ('scalar', np.int64(0).__reduce__()[0]))}
# The instructions of pickle's implementation in C cannot be overridden.
PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class Unpickler(PythonUnpickler):
    """Python's unpickler, restricted to allowed names, and to changes of instances and dicts."""

    dispatch: ClassVar[dict] = dict(PythonUnpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """Look up an allowed class or function.

        Raises:
            pickle.UnpicklingError: it is not allowed.
        """
        # Newer versions of torch may lack it.
        from torch._weights_only_unpickler import _get_allowed_globals
        key = f'{module}.{name}'
        for names in (ALLOWED, _get_allowed_globals()):
            if key in names:
                return names[key]
        raise pickle.UnpicklingError(f'Unsupported GLOBAL {key}')

    def load_build(self) -> None:
        """Set the state of an instance, but not attributes of a class or function."""
        classes = [each for each in ALLOWED.values() if isinstance(each, type)]
        require(self.stack[-2], Tensor, OrderedDict, *classes)
        super().load_build()

    def load_setitem(self) -> None:
        """Set an item of a dict, but not beyond the end of a tensor."""
        require(self.stack[-3], dict)
        super().load_setitem()

    def load_setitems(self) -> None:
        """Set several items of a dict."""
        # The items have a stack of their own.
        require(self.metastack[-1][-1], dict)
        super().load_setitems()

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def latin1_bytes(text: str, encoding: str) -> bytes:
    """Encode text as bytes, in place of ``codecs.encode``, which knows more than text encodings.

    Pickle's protocols 0 to 2 save bytes as such text.

    Raises:
        pickle.UnpicklingError: the encoding is another one.
    """
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'Unsupported encoding {encoding!r}')
    return codecs.encode(text, 'latin1')


def require(value: object, *types: type) -> None:
    """Check the type of an object that a file changes.

    Raises:
        pickle.UnpicklingError: it is of none of these types.
    """
    if not isinstance(value, types):
        raise pickle.UnpicklingError(f'Unsupported class {type(value).__name__}')


def load(file: BinaryIO, **options: Any) -> Any:
    """Unpickle data, as ``pickle.load``."""
    return Unpickler(file, **options).load()


def check_format(file: Union[str, PathLike, BinaryIO]) -> None:
    """Check that a file is in a format that torch reads through a pickle module.

    Raises:
        pickle.UnpicklingError: it is a tar archive, or holds TorchScript.
    """
    position = None if isinstance(file, (str, PathLike)) else file.tell()
    is_tar, is_script = tarfile.is_tarfile(file), False
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            is_script = any(name.endswith('/constants.pkl') for name in archive.namelist())
    if position is not None:
        file.seek(position)  # type: ignore[union-attr]
    if is_tar or is_script:
        raise pickle.UnpicklingError(f'Unsupported class {"tarfile" if is_tar else "TorchScript"}')
