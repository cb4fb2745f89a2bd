"""`python -m clip_refine`, the same as `clip-refine`."""

from clip_refine.cli import main

if __name__ == "__main__":
    main()
