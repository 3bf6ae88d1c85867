"""What a conversion would do, tensor by tensor."""

from pathlib import Path

from .accounting import Parameter


def describe_plan(rows: list[Parameter], names: dict[Path, set[str]]) -> list[str]:
    """A line per parameter: `name shape dtype <- file: name shape dtype + ...`.

    `names`: the tensors of each file of the checkpoint.
    """
    owner = {name: path.name for path, inside in names.items() for name in inside}
    lines = []
    for tensor, origins in rows:
        said = [f"{owner.get(origin.name, '?')}: {origin}" for origin in origins]
        lines.append(f"{tensor} <- {' + '.join(said) or 'nothing'}")
    return lines
