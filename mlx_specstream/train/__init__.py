"""Training of streams: data, loss, trainer, session. Never imports decode."""
