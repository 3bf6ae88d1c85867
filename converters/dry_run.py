"""What a conversion would do, tensor by tensor."""

from pathlib import Path

from .accounting import Parameter, Tensor
from .torch_streams import TorchStreams, renamed
from .weight_file import look_into


def describe_plan(rows: list[Parameter], names: dict[Path, dict[str, str]]) -> list[str]:
    """A line per parameter: `name shape dtype <- file: name shape dtype + ...`.

    A tensor that the file calls otherwise is `file: its name there as name shape dtype`.

    Args:
        names: of the tensors of each file, as transformers has them -> as the file has them.
    """
    found = {new: (path.name, old) for path, inside in names.items() for new, old in inside.items()}
    lines = []
    for tensor, origins in rows:
        said = []
        for origin in origins:
            file, name = found.get(origin.name, ("?", origin.name))
            said.append(f"{file}: {origin if name == origin.name else f'{name} as {origin}'}")
        lines.append(f"{tensor} <- {' + '.join(said) or 'nothing'}")
    return lines


def describe_streams(streams: TorchStreams | None) -> list[str]:
    """A line for each tensor of streams that lie among the weights."""
    lines = []
    for name, value in (streams.tensors if streams else {}).items():
        source = Tensor.of(name, value)
        new, swap = renamed(name, back=False)
        shape = (*source.shape[:-2], *source.shape[:-3:-1]) if swap else source.shape
        lines.append(f"streams: {Tensor(new, shape, 'float32')} <- {source}")
    return lines


def describe_files(folder: Path, source: Path) -> list[str]:
    """A line per tensor of a small result that was really made, out of one file or folder."""
    return [
        f"{path.name}: {tensor} <- {source.name}"
        for path in sorted(folder.glob("*.safetensors"))
        for tensor in look_into(path).tensors.values()
    ]
