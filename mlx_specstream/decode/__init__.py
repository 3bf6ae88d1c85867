"""One step of decoding and its parts: draft, prune, verify, choose, plan."""
