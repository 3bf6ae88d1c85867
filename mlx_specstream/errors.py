"""What a user can cause. The command line prints each as one line and exits with 2."""


class SpecStreamError(Exception):
    """Base of every error that a user can cause: the message says the rule, the value and the fix."""


class UnsupportedModel(SpecStreamError):
    """The architecture cannot do tree decoding or multi-stream attention, or mlx-lm lacks it."""


class BadCheckpoint(SpecStreamError):
    """A model or streams folder that is missing, damaged, unsafe or inconsistent."""


class StreamsMismatch(SpecStreamError):
    """Streams that belong to another base model."""


class BadData(SpecStreamError):
    """Training data that cannot be read; the message names the file and the line."""


class BadArgument(SpecStreamError, ValueError):
    """An argument that breaks a rule."""
