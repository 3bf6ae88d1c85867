"""Text from a stranger's file, fit for a terminal."""

LONGEST = 1000  # characters of an error


def printable(text: str) -> str:
    """The text with escape sequences and other unprintable characters spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: Exception) -> str:
    """An error's message as one line of bounded length."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."
