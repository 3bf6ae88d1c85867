"""Damaged files for every reader of the converters, without end if need be.

    python tests/fuzz_convert.py --inputs 1000000 --out benchmarks/results/fuzz_convert.json

Good files are mutated, byte by byte and, where they are JSON, value by value. A reader may take an
input or refuse it with one of the project's own errors. Anything else ends the run with the input
in base64: another exception, ten seconds of computing, a file opened for writing, a program started, a network
connection, code compiled, or memory. The same seed makes the same inputs.
"""

import argparse
import base64
import codecs
import faulthandler
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fuzz_inputs
import mlx.core as mx
import numpy as np
from fuzz_readers import folder_targets

from mlx_specstream.converters.hf_config import normalise
from mlx_specstream.converters.meta import config_of
from mlx_specstream.converters.peft_adapter import read_peft
from mlx_specstream.converters.safetensors_header import parse_header
from mlx_specstream.converters.source import check_remote_code, read_config
from mlx_specstream.converters.torch_pickle import load_torch, unpickle
from mlx_specstream.converters.weights import find_weights
from mlx_specstream.errors import SpecStreamError
from mlx_specstream.measure.machine import about_machine
from mlx_specstream.model.checkpoint import read_description

SECONDS = 10.0  # of computing, for one input: a machine may be busy
MEMORY = 600 << 20  # bytes that the whole run may add
# What no reader does. Files may be opened, but not for writing.
FORBIDDEN = ("os.", "shutil.", "subprocess.", "socket.", "pty.", "ctypes.", "pickle.find_class")
HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.fwalk", "os.walk")
CODE = ("exec", "compile")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Finding(BaseException):
    """Something that no input may cause. Not an Exception: no reader may swallow it."""


class Target(NamedTuple):
    """A reader and good inputs for it.

    Args:
        read: takes one input.
        share: of all inputs.
        imports: whether it may load modules (of the libraries) on its way.
        room: a folder that it may write to.
    """

    read: Callable[[bytes], None]
    seeds: list[bytes]
    share: float
    imports: bool = False
    room: Path | None = None


class Watch:
    """Python's audit events while a reader runs."""

    def __init__(self):
        self.target: Target | None = None
        sys.addaudithook(self.event)

    def event(self, name: str, args: tuple) -> None:
        if self.target is None:
            return
        if name == "open":
            path, mode, flags = args
            writes = any(c in "wax+" for c in mode or "") or (flags or 0) & WRITING
            if writes and not (flags or 0) & os.O_PATH and not self.may_write(path):
                raise Finding(f"opens {path!r} for writing")
        elif name.startswith(FORBIDDEN) and name not in HARMLESS and not self.target.imports:
            raise Finding(f"{name} {args!r:.100}")
        elif name in CODE and not self.target.imports:
            raise Finding(f"{name} of code")

    def may_write(self, path) -> bool:
        room = self.target.room
        return room is not None and str(path).startswith(f"{room}/")


# The readers.


def make_targets(folder: Path) -> dict[str, Target]:
    """`folder`: holds the inputs of those readers that want a path."""
    seeds = fuzz_inputs
    index, config, adapter, meta, streams = (
        folder / name for name in ("index", "config", "adapter", "meta", "streams")
    )
    for path in (index, config, adapter, meta, streams):
        path.mkdir()
    for i in (1, 2):
        (index / f"model-{i:05d}-of-00002.safetensors").touch()
    seeds.adapter_weights(adapter / "adapter_model.safetensors")
    (streams / "streams.safetensors").touch()

    def target(read, found, share, path=None, imports=False):
        return Target(read if path is None else file_reader(path, read), found, share, imports)

    return {
        "pickle": target(read_one_pickle, seeds.pickle_seeds(), 0.3),
        "torch": target(read_torch, seeds.torch_seeds(folder), 0.19, folder / "a.bin"),
        "header": target(read_header, seeds.header_seeds(), 0.2, folder / "a.safetensors"),
        "index": target(
            lambda path: find_weights(path.parent),
            seeds.index_seeds(),
            0.05,
            index / "model.safetensors.index.json",
        ),
        "config": target(read_model, seeds.config_seeds(), 0.05, config / "config.json", True),
        "adapter": target(
            lambda path: read_peft(path.parent, "llama"),
            seeds.adapter_seeds(),
            0.04,
            adapter / "adapter_config.json",
        ),
        "meta": target(
            lambda path: config_of(path.parent, seeds.META_SHAPES),
            seeds.meta_seeds(),
            0.03,
            meta / "params.json",
        ),
        "streams": target(
            lambda path: read_description(path.parent),
            seeds.description_seeds(),
            0.03,
            streams / "streams.json",
        ),
        **{name: Target(*more) for name, more in folder_targets(folder, unwatched).items()},
    }


def read_one_pickle(data: bytes) -> None:
    unpickle(io.BytesIO(data))


def file_reader(path: Path, read: Callable[[Path], None]) -> Callable[[bytes], None]:
    def write_and_read(data: bytes) -> None:
        with unwatched():
            path.write_bytes(data)
        read(path)

    return write_and_read


def read_torch(path: Path) -> None:
    for value in load_torch(path).values():
        np.array(value.astype(mx.float32))


def read_header(path: Path) -> None:
    """What we accept, MLX reads just like us."""
    data = path.read_bytes()
    header = parse_header(io.BytesIO(data), len(data))
    loaded = {} if unknown(header) else mx.load(str(path))
    for name, array in loaded.items():
        if tuple(array.shape) != header.tensors[name].shape:
            raise Finding(f"MLX reads {name!r} as {array.shape}")
        mx.eval(array)


def unknown(header) -> bool:
    """Types that MLX refuses by itself; no tensors at all is an error there, too."""
    kinds = {entry.dtype for entry in header.tensors.values()}
    return not kinds or bool(kinds & {"F8_E5M2", "F8_E8M0", "F8_E4M3", "F64"})


def read_model(path: Path) -> None:
    config = read_config(path.parent)
    check_remote_code(config, False)
    normalise(config)


# The run.

WATCH = None


class unwatched:
    """Lets the fuzzer itself write inside a reader."""

    def __enter__(self):
        self.target, WATCH.target = WATCH.target, None

    def __exit__(self, *error):
        WATCH.target = self.target


def hang(number, frame):
    raise Finding(f"longer than {SECONDS} s")


def peak() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attempt(target: Target, data: bytes) -> str:
    """'taken' or 'refused'. Raises: Finding."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    WATCH.target = target
    try:
        target.read(data)
        return "taken"
    except SpecStreamError:
        return "refused"
    except OSError as error:  # a name too long, a null in it: the command line prints those, too
        return f"refused by the system ({type(error).__name__})"
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        WATCH.target = None
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(inputs: int, seed: int, targets: dict[str, Target], log: Callable = lambda line: None):
    """Run so many inputs. Returns: how many each reader took and refused. Raises: Finding."""
    global WATCH
    WATCH = WATCH or Watch()
    signal.signal(signal.SIGPROF, hang)
    for name in ("raw_unicode_escape", "unicode_escape", "latin-1", "ascii"):
        codecs.lookup(name)  # Python loads these when a pickle first has such a string
    chance, counts, began = random.Random(seed), Counter(), time.monotonic()
    for name, target in targets.items():
        attempt(target._replace(imports=True), target.seeds[0])  # loads what it needs
        for data in target.seeds:
            counts[name, attempt(target, data)] += 1
    least, said = peak(), began
    names, shares = list(targets), [target.share for target in targets.values()]
    for i in range(inputs):
        name = chance.choices(names, shares)[0]
        target = targets[name]
        data = fuzz_inputs.mutate(chance.choice(target.seeds), target.seeds, chance)
        try:
            counts[name, attempt(target, data)] += 1
            if peak() - least > MEMORY:
                raise Finding(f"{peak() - least} bytes of memory")
        except Finding as finding:
            text = base64.b64encode(data).decode()
            raise Finding(f"{name}, input {i} of seed {seed}: {finding}; {text}") from finding
        if time.monotonic() - said > 10:
            said = time.monotonic()
            log(f"{i + 1} inputs, {(i + 1) / (said - began):.0f} per second")
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="one reader alone")
    parser.add_argument("--out", type=Path, help="file for the result, if nothing is found")
    args = parser.parse_args()
    faulthandler.enable()
    sys.dont_write_bytecode = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        targets = make_targets(Path(folder))
        if args.target is not None:
            targets = {args.target: targets[args.target]}
        try:
            counts = fuzz(
                args.inputs, args.seed, targets, lambda line: print(line, file=sys.stderr)
            )
        except Finding as finding:
            traceback.print_exception(finding)
            raise SystemExit(1) from None
    for (name, outcome), count in sorted(counts.items()):
        print(f"{name:8} {outcome:24} {count}")
    seconds = round(time.monotonic() - began)
    print(f"{args.inputs} inputs of seed {args.seed}, {seconds} s, nothing found")
    if args.out:
        result = {"machine": about_machine(), "inputs": args.inputs, "seed": args.seed}
        result |= {"seconds": seconds, "cpu_seconds": round(time.process_time())}
        result |= {"peak_bytes": peak(), "findings": 0, "outcomes": {}}
        for (name, outcome), count in sorted(counts.items()):
            result["outcomes"].setdefault(name, {})[outcome] = count
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
