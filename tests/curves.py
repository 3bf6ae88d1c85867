"""A small cost curve for tests of the planner."""

from mlx_specstream.decode.costs import Costs

ROWS = (1, 2, 3, 4, 5, 6, 8)
FLAT = (1.0, 1.05, 1.1, 1.2, 1.25, 1.3, 1.5)
STEEP = (1.0, 1.25, 1.5, 1.8, 2.0, 2.2, 2.5)


def costs(passes=FLAT, streams=0.25, inline=None) -> Costs:
    """One context; a plain token is 10 ms."""
    return Costs(
        rows=ROWS,
        contexts=(0,),
        pass_ms=(tuple(10 * p for p in passes),),
        deferred_ms=((10 * streams,) * len(ROWS),),
        inline_ms=None if inline is None else (tuple(10 * i for i in inline),),
        plain_ms=(10.0,),
        measured=True,
    )
