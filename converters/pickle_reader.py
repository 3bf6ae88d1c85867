"""A pickle interpreter that knows plain data and nothing else.

Python's own unpickler can be kept from importing, but not from being fooled: a tuple that nests
a million deep crashes it as a dict key, one that doubles sixty times hangs it, and its memory
grows as the file likes. Here every step is one of the few that a checkpoint needs, steps are
counted, only plain values are keys, and what comes out is a tree that can be walked.
"""

import io
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from mlx_specstream.errors import BadCheckpoint

MAX_BYTES = 32 << 20  # of one pickle; the description of a 70B checkpoint's shard is below 1 MB
MAX_STEPS = 1_000_000  # a tensor takes about 35
MAX_DEPTH = 32
KEYS = (str, int, float, bytes, type(None))  # and bool, which is an int

# Opcodes that push the value which pickletools has read, or an empty one, or do nothing.
VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "NONE": lambda: None}
EMPTY |= {"NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
NOTHING = ("PROTO", "FRAME", "STOP")


def read_pickle(
    stream: io.BufferedIOBase,
    allowed: Mapping[tuple[str, str], Any],
    persistent: Callable[[Any], Any],
) -> Any:
    """The value of the pickle that begins here; the stream then stands behind it.

    Args:
        allowed: (module, name) -> what stands for it. Only these are ever called; what they make
            may have a `__setstate__`.
        persistent: what a persistent id stands for.

    Raises: BadCheckpoint for anything but plain data made of `allowed`, or for too much of it.
    """
    start = stream.tell()
    window = io.BytesIO(stream.read(MAX_BYTES))
    reader = Interpreter(allowed, persistent)
    try:
        for opcode, argument, _ in pickletools.genops(window):
            reader.step(opcode.name, argument)
        value = reader.stack.pop()
    except BadCheckpoint:
        raise
    except Exception as error:  # a damaged pickle fails in many ways, none of them ours
        if window.tell() >= MAX_BYTES:
            raise BadCheckpoint(f"the pickle is longer than {MAX_BYTES >> 20} MiB") from None
        line = " ".join(str(error).split())[:100]
        raise BadCheckpoint(f"the pickle is damaged ({type(error).__name__}: {line})") from None
    stream.seek(start + window.tell())
    check_tree(value)
    return value


class Interpreter:
    """The stack machine of `pickle`, for one pickle."""

    def __init__(self, allowed, persistent):
        self.allowed, self.persistent = allowed, persistent
        self.functions = {id(value) for value in allowed.values() if callable(value)}
        self.stack, self.marks, self.memo = [], [], {}
        self.work = 0  # steps, and elements that calls were given

    def step(self, name: str, argument) -> None:
        self.spend(1)
        if name not in ACTIONS:
            raise BadCheckpoint(
                f"the pickle uses {name}, which no checkpoint needs; it was not run"
            )
        ACTIONS[name](self, argument)

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_STEPS:
            raise BadCheckpoint(f"the pickle takes more than {MAX_STEPS} steps")

    def above_mark(self) -> list:
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    # Each action takes the opcode's argument, or None.

    def mark(self, _):
        self.marks.append(len(self.stack))

    def value(self, argument):
        self.stack.append(argument)

    def pop(self, _):
        self.stack.pop()

    def pop_mark(self, _):
        self.above_mark()

    def dup(self, _):
        self.stack.append(self.stack[-1])

    def put(self, index):
        self.memo[index] = self.stack[-1]

    def memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index):
        self.stack.append(self.memo[index])

    def tuple(self, _):
        self.stack.append(tuple(self.above_mark()))

    def tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        if len(items) < count:
            raise IndexError("the stack is empty")
        self.stack[-count:] = [tuple(items)]

    def list(self, _):
        self.stack.append(self.above_mark())

    def dict(self, _):
        self.stack.append({})
        self.set_items(self.above_mark())

    def append(self, _):
        value = self.stack.pop()
        self.extend([value])

    def appends(self, _):
        self.extend(self.above_mark())

    def extend(self, values: list) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("appends to what is no list")
        self.stack[-1].extend(values)

    def set_item(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_items_above(self, _):
        self.set_items(self.above_mark())

    def set_items(self, items: list) -> None:
        if not isinstance(self.stack[-1], dict):
            raise TypeError("sets an item of what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][plain_key(key)] = value

    def name(self, argument):
        module, _, name = argument.partition(" ")
        self.push_name(module, name)

    def make(self, argument):
        self.name(argument)  # outside the list it says which; inside, nothing is made like this
        raise BadCheckpoint("the pickle uses INST, which no checkpoint needs; it was not run")

    def stack_name(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise TypeError("a name must be a string")
        self.push_name(module, name)

    def push_name(self, module: str, name: str) -> None:
        if (module, name) not in self.allowed:
            raise BadCheckpoint(
                f"the pickle asks for {module[:60]}.{name[:60]}, which is not part of a plain "
                "checkpoint; it was not run. Save the model's state_dict alone, or safetensors"
            )
        self.stack.append(self.allowed[module, name])

    def call(self, _):
        arguments, function = self.stack.pop(), self.stack.pop()
        if id(function) not in self.functions or not isinstance(arguments, tuple):
            raise TypeError("calls what is no function")
        self.spend(sum(len(a) for a in arguments if isinstance(a, (tuple, list, dict))))
        self.stack.append(function(*arguments))

    def build(self, _):
        state, target = self.stack.pop(), self.stack[-1]
        target.__setstate__(state)  # nothing but what stands in for a class has one

    def persistent_id(self, _):
        self.stack.append(self.persistent(self.stack.pop()))


ACTIONS = {
    **dict.fromkeys(VALUES, Interpreter.value),
    **{name: lambda reader, _, new=new: reader.value(new()) for name, new in EMPTY.items()},
    **dict.fromkeys(NOTHING, lambda reader, _: None),
    "MARK": Interpreter.mark,
    "POP": Interpreter.pop,
    "POP_MARK": Interpreter.pop_mark,
    "DUP": Interpreter.dup,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Interpreter.put),
    "MEMOIZE": Interpreter.memoize,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Interpreter.get),
    "TUPLE": Interpreter.tuple,
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
    "LIST": Interpreter.list,
    "DICT": Interpreter.dict,
    "APPEND": Interpreter.append,
    "APPENDS": Interpreter.appends,
    "SETITEM": Interpreter.set_item,
    "SETITEMS": Interpreter.set_items_above,
    "GLOBAL": Interpreter.name,
    "INST": Interpreter.make,
    "STACK_GLOBAL": Interpreter.stack_name,
    "REDUCE": Interpreter.call,
    "NEWOBJ": Interpreter.call,  # an object of a class: what stands for a class is called
    "BUILD": Interpreter.build,
    "BINPERSID": Interpreter.persistent_id,
}


def plain_key(key):
    """A dict key that hashes in one step. Raises: TypeError for any other."""
    if not isinstance(key, KEYS):
        raise TypeError(f"a {type(key).__name__} as a dict key")
    return key


def check_tree(value) -> None:
    """Raise BadCheckpoint unless a recursive walk over containers ends soon.

    A container may occur twice, but it counts each time: a few bytes could describe a tree of any
    size, or one that contains itself.
    """
    waiting, count = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict):
            inside = value.values()
        elif type(value) in (list, tuple):  # not what stands for a tensor
            inside = value
        else:
            continue
        count += len(inside) + 1
        if depth > MAX_DEPTH or count > MAX_STEPS:
            raise BadCheckpoint("the pickle nests too deeply, or forever")
        waiting += [(item, depth + 1) for item in inside]
