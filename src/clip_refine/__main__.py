"""Where both `clip-refine` and `python -m clip_refine` begin: signals are heeded from here on."""

from clip_refine.support.process import heed_signals


def main() -> None:
    """Run the command line, whose import alone takes long enough for a Ctrl-C."""
    try:
        heed_signals()
        from clip_refine.cli import main as run

        run()
    except KeyboardInterrupt as stop:
        raise SystemExit(getattr(stop, "status", 130)) from None


if __name__ == "__main__":
    main()
