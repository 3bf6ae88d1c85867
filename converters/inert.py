"""What training programs pickle beside the weights: read past, never made.

A stand-in takes whatever it is called with and remembers nothing, so the values that follow in the
file are found, and a checkpoint is not refused for the arguments of the program that wrote it.
"""


class Inert:
    """Stands for a class, a function and what either would make."""

    __slots__ = ()

    def __call__(self, *arguments):
        return self

    def __setstate__(self, state):
        pass


INERT = Inert()
PLAIN = (
    "bool",
    "bytearray",
    "complex",
    "dict",
    "float",
    "frozenset",
    "int",
    "list",
    "set",
    "slice",
)
BUILTINS = ("builtins", "__builtin__")  # as Python 3 and 2 call them
NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")  # since 2.0, and before
NAMES = {
    "argparse": ("Namespace",),
    "collections": ("Counter", "deque"),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "numpy": ("dtype", "ndarray"),
    "_codecs": ("encode",),  # of bytes in an old protocol
    "torch": (
        *("device", "Generator", "bool", "uint8", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    ),
    **dict.fromkeys(BUILTINS, PLAIN),
    **dict.fromkeys(NUMPY, ("scalar", "_reconstruct")),
}
STAND_INS = {(module, name): INERT for module, names in NAMES.items() for name in names}
