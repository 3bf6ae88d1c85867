"""What a training run shows: a bar with time left and losses, a line per validation, on stderr."""

from __future__ import annotations


class ProgressDisplay:
    """Shows the ``Progress`` of every step until it is closed."""

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("step {task.fields[step]}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left, loss {task.fields[loss]}, {task.fields[speed]}"),
            console=self.console,
        )
        self.task = self.bar.add_task("train", total=1.0, step=0, left="?", loss="-", speed="-")
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def step(self, progress) -> None:
        from ..train.estimate import duration

        seconds = progress.seconds * (1 - progress.done) / max(progress.done, 1e-9)
        loss = " ".join(f"{x:.2f}" for x in progress.losses) or "-"
        if progress.main_loss is not None:
            loss = f"{progress.main_loss:.2f} + {loss}"
        speed = f"{progress.tokens_per_second:.0f} tokens/s, {progress.peak_memory:.1f} GB"
        self.bar.update(
            self.task,
            completed=progress.done,
            step=progress.iteration,
            left=duration(seconds),
            loss=loss,
            speed=speed,
        )
        if progress.validation is not None:
            begun = f" ({speed})" if progress.iteration else ""
            self.note(f"step {progress.iteration}: {seen(progress.validation)}{begun}")


def seen(validation: dict) -> str:
    """A validation in one line."""
    names = {
        "main_loss": "main loss",
        "loss": "loss",
        "top1": "top-1",
        "topk": "top-4",
        "exit_loss": "early exit loss",
        "exit_top1": "early exit top-1",
    }
    columns = [
        f"{name} " + " ".join(f"{x:.3f}" for x in validation[key])
        for key, name in names.items()
        if key in validation
    ]
    line = "validation per stream: " + "; ".join(columns)
    if "tokens_per_pass" in validation:
        line += f"; {validation['tokens_per_pass']:.2f} tokens per pass"
    if "decoded" in validation:
        decoded = validation["decoded"]
        line += f" (decoded {decoded['tokens_per_pass']:.2f}"
        same = decoded.get("same_text")
        line += ")" if same is None else f", {same} of {decoded['answers']} texts the plain ones)"
    return line
