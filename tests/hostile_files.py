"""Files that a stranger could send: each function damages a model folder in one way."""

import json
import os
import struct
import zipfile

from test_convert_pickle import call, hostile, name, plain, state, storage, tensor, write_zip

MEGABYTES = 1 << 20


def pickled(data_pkl, storages=(), **options):
    """The weights become one `.bin` file with this pickle in it."""

    def edit(folder):
        (folder / "model.safetensors").unlink()
        write_zip(folder / "pytorch_model.bin", data_pkl, storages, **options)

    return edit


def legacy(raw):
    def edit(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(raw)

    return edit


def runs_code(kind):
    return lambda folder: pickled(hostile(f"touch {folder.parent / 'canary'}")[kind])(folder)


def safetensors(header, length=None, size=None):
    """The weights become a file with this header, which may lie about its length."""

    def edit(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(text) if length is None else length) + text)
            file.truncate(8 + len(text) + 96 if size is None else size)

    return edit


def entry(*shape, begin=0, end=96, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def write(name, value):
    text = value if isinstance(value, str) else json.dumps(value)
    return lambda folder: (folder / name).write_text(text)


def index(file):
    return write("model.safetensors.index.json", {"weight_map": {"model.norm.weight": file}})


def config(**changes):
    def edit(folder):
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**old, **changes}))

    return edit


def link(file):
    """A file of the folder becomes a link to one outside."""

    def edit(folder):
        secret = folder.parent / "secret"
        secret.write_text("nobody may copy this")
        (folder / file).unlink(missing_ok=True)
        (folder / file).symlink_to(secret)

    return edit


def link_folder(folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.jinja").write_text("nobody may copy this")
    (folder / "additional_chat_templates").symlink_to(outside)


def pipe(file):
    def edit(folder):
        (folder / file).unlink(missing_ok=True)
        os.mkfifo(folder / file)

    return edit


def sparse(name, size, begin=b"{"):
    def edit(folder):
        with open(folder / name, "wb") as file:
            file.write(begin)
            file.truncate(size)

    return edit


def huge_directory(folder):
    """A zip archive whose table of contents is said to fill the file."""
    (folder / "model.safetensors").unlink()
    size = 600 * MEGABYTES
    with open(folder / "pytorch_model.bin", "wb") as file:
        file.write(b"PK\x03\x04")
        file.truncate(size)
        file.seek(size)
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 9, 9, size - 4, 4, 0))


def remote_code(**changes):
    def edit(folder):
        config(**changes)(folder)
        code = f"import pathlib; pathlib.Path({str(folder.parent / 'canary')!r}).touch()"
        (folder / "evil.py").write_text(code)

    return edit


DEEP = b"\x80\x02})" + b"\x85" * 900_000 + b"Ns."  # a tuple of tuples as a key
DOUBLED = b"\x80\x02)" + b"2\x86" * 90  # (x, x) of (x, x) of ...
FOREVER = b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."  # {"model": itself}
AMPLIFIED = (  # a list of 50,000, copied by each of many calls
    b"\x80\x02" + name("torch", "Size") + b"q\x01](" + b"N" * 50_000 + b"eq\x020"
    b"(" + b"h\x01h\x02\x85R" * 100_000 + b"t."
)
ONE = storage("FloatStorage", "0", 100_000)
MANY = state({f"w{i}": tensor(ONE, 0, (100_000,), (1,)) for i in range(90)})
SIX = {"0": bytes(24)}

# name -> (what is done to a good llama folder, what the line says)
CASES = {
    **{f"pickle runs code: {kind}": (runs_code(kind), "not run") for kind in hostile("")},
    "pickle of an outside class": (
        pickled(b"\x80\x02" + call(name("transformers", "Trainer")) + b"."),
        "transformers.Trainer",
    ),
    "pickle nests as a key": (pickled(DEEP), "tuple as a dict key"),
    "pickle doubles as a key": (pickled(b"\x80\x02}" + DOUBLED[2:] + b"Ns."), "as a dict key"),
    "pickle doubles": (pickled(DOUBLED + b"."), "nests too deeply"),
    "pickle doubles as storage": (pickled(DOUBLED + b"Q."), "unreadable storage"),
    "pickle doubles as shape": (
        pickled(state({"w": tensor(storage("FloatStorage", "0", 6), 0, DOUBLED[2:], (1,))})),
        "cannot have stride|negative or huge",
    ),
    "pickle contains itself": (pickled(FOREVER), "nests too deeply, or forever"),
    "pickle of endless steps": (pickled(b"\x80\x02" + b"N0" * 1_500_000 + b"."), "steps"),
    "pickle of endless lists": (legacy(b"\x80\x02" + b"]" * (40 * MEGABYTES)), "steps"),
    "pickle of one long string": (
        legacy(b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"a" * (40 * MEGABYTES)),
        "longer than",
    ),
    "pickle copies a list": (pickled(AMPLIFIED), "dimensions|steps"),
    "pickle of a huge number": (legacy(b"\x80\x02\x8b\xff\xff\xff\x7f" + b"\1" * 64), "damaged"),
    "tensors beyond the file": (
        pickled(plain(6, (1 << 40, 1 << 40), (0, 0)), SIX),
        "leaves its storage",
    ),
    "tensors share all bytes": (
        pickled(MANY, {"0": bytes(400_000)}),
        "tensors of 36000000 bytes in a file of",
    ),
    "zip bomb": (
        pickled(plain(), {"0": bytes(50 * MEGABYTES)}, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "zip bomb in the pickle": (
        pickled(b"\x80\x02" + b"N0" * 9 * MEGABYTES, compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    "zip with a huge directory": (huge_directory, "table of contents"),
    "safetensors overlap": (
        safetensors({"a": entry(24), "b": entry(24, begin=40, end=136)}, size=400),
        "overlaps",
    ),
    "safetensors twice the name": (
        safetensors(b'{"a":%s,"a":%s}' % ((json.dumps(entry(24)).encode(),) * 2)),
        "twice",
    ),
    "safetensors header in UTF-16": (
        safetensors(json.dumps({"a": entry(24)}).encode("utf-16")),
        "unreadable",
    ),
    "safetensors giant header": (safetensors(b"{", 80 * MEGABYTES, 90 * MEGABYTES), "at most"),
    "safetensors endless header": (safetensors(b"{}", 1 << 63), "truncated or not safetensors"),
    "safetensors deep header": (safetensors(b"[" * 9_000_000), "unreadable"),
    "safetensors long number": (
        safetensors(b'{"a":' + b"9" * 9_000_000 + b"}"),
        "unreadable|damaged",
    ),
    "safetensors many dimensions": (safetensors({"a": entry(*[1 << 30] * 90_000)}), "damaged"),
    "safetensors negative shape": (safetensors({"a": entry(-4, -6)}), "damaged"),
    "safetensors negative offset": (safetensors({"a": entry(24, begin=-96, end=0)}), "damaged"),
    "safetensors overflow": (safetensors({"a": entry(1 << 62, 4, 24)}), "damaged"),
    "safetensors of 2**31": (safetensors({"a": entry(0, 1 << 31, end=0)}), "damaged"),
    "safetensors beyond the file": (
        safetensors({"a": entry(1 << 20, 1 << 18, end=1 << 40)}),
        "bytes are needed",
    ),
    "safetensors with half a character": (safetensors(b'{"\\ud800":{}}'), "unreadable"),
    **{
        f"index names {file!r}": (index(file), "files of the same folder|must name")
        for file in (
            "../../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "..",
            "",
            "a\0",
        )
    },
    "index names a backslash": (index("..\\x.safetensors"), "files of the same folder"),
    "index is endless": (sparse("model.safetensors.index.json", 90 * MEGABYTES), "longer than"),
    "index is deep": (write("model.safetensors.index.json", "[" * 900_000), "not readable"),
    **{
        f"link to outside: {file}": (link(file), "link out of its folder")
        for file in ("tokenizer.json", "model.safetensors", "config.json", "LICENSE", "gone.json")
    },
    "link to a folder outside": (link_folder, "link out of its folder"),
    "a pipe as config": (pipe("generation_config.json"), "neither a file nor a folder"),
    "a pipe as weights": (pipe("model.safetensors"), "neither a file nor a folder"),
    "config of endless layers": (config(num_hidden_layers=10**9), "beyond 10000"),
    "config of many layers": (config(num_hidden_layers=9_000), "only .* tensors"),
    "config of endless heads": (config(num_attention_heads=10**12), "beyond 10000"),
    "config of another width": (config(hidden_size=48), "[Ss]hape"),
    "config of a huge width": (config(hidden_size=1 << 40, intermediate_size=1 << 40), ""),
    "config of a huge vocabulary": (config(vocab_size=1 << 62), ""),
    "config of no heads": (config(num_attention_heads=0), ""),
    "config of words": (config(hidden_size="ten"), ""),
    "config nests": (write("config.json", '{"a":' * 900 + "1" + "}" * 900), "nests deeper"),
    "config is endless": (sparse("config.json", 90 * MEGABYTES), "longer than"),
    "config with code": (
        remote_code(auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.C"}),
        "it was not run",
    ),
    "config with a model file": (remote_code(model_file="evil.py"), "it was not run"),
    "config of an unknown type with code": (
        remote_code(model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        "no usable architecture",
    ),
    "tokenizer nests": (write("tokenizer.json", "[" * 900_000), "tokenizer"),
    "tokenizer settings nest": (write("tokenizer_config.json", '{"a":' * 90_000), "tokenizer"),
    "escape codes in a name": (index("\x1b]0;title\x07\x1b[2J"), "x1b"),
}
