"""The command line. Torch is imported only inside a verb, so that help is there at once."""

from clip_refine.cli.verbs import HELP, VERBS, main

__all__ = ["HELP", "VERBS", "main"]
