"""`clip-refine VERB`: find the verb, run it, say clearly what is wrong."""

import difflib
import sys
from collections.abc import Callable, Sequence

from clip_refine.cli.compare import compare_verb
from clip_refine.cli.data import data_verb
from clip_refine.cli.evaluate import evaluate_verb
from clip_refine.cli.explore import explore_verb
from clip_refine.cli.export import export_verb
from clip_refine.cli.interpolate import interpolate_verb
from clip_refine.cli.posthoc import posthoc_verb
from clip_refine.cli.refine import demo_verb, refine_verb
from clip_refine.cli.report import report_verb
from clip_refine.console import printable
from clip_refine.errors import ClipRefineError, ConfigError

HELP = """\
clip-refine: make a CLIP-style model better aligned without breaking it.

  clip-refine demo
      The whole road on a small drawn world, offline, in about a minute.

  clip-refine refine --data.train captions.csv --out runs/mine
      Refine OpenAI's ViT-B/32 on your captioned images for one epoch: scores before, scores
      after, and a checkpoint for open_clip in runs/mine/model.

  clip-refine refine --model.name ViT-L-14 --model.pretrained laion2b_s32b_b82k \\
      --data.train captions.csv --train.batch-size 256 --out runs/mine
      Another model: any architecture and tag of open_clip, a file, or local-dir:FOLDER.

  clip-refine evaluate --model.name runs/mine --data.val test.csv
      The same scores for a model as it stands.

  clip-refine evaluate --suite paper --data-root DIR --models runs/mine
      The paper's twelve zero-shot sets, COCO and Flickr30k, a run's base and model side by side
      with intervals; or quick, toy, or a suite of your own as a small YAML file.

  clip-refine compare --recipes clip-refine,contrastive,hycd --seeds 3 \\
      --data.train captions.csv --out runs/compared
      Which recipe is best here? All of them on the same batches, each at its own learning rate,
      beside what needs no training, with intervals. The same command goes on where it stopped.

  clip-refine report runs/mine
      Make the page again that refine and compare end with: runs/mine/report.html, one file to look
      at and share.

  clip-refine explore runs/mine --images photos
      Search your own images with the base model and the refined one side by side.

  clip-refine data check captions.csv --sheet pairs.png
      What is in a source, before a run is spent on it: bad rows, unreadable images, duplicates,
      captions too long for the model, and ten pairs to look at.

  clip-refine interpolate ViT-B-32 runs/mine --weight 0.5 --out runs/half
      A model on the line between two: most of the gain, less of the loss.

  clip-refine export runs/mine --to transformers --out exported
      The model for another library: open_clip, transformers, sentence-transformers or onnx,
      checked by loading it back there.

  clip-refine posthoc fit mean-centring FEATURES.safetensors --out peers/centred
  clip-refine posthoc apply peers/centred OTHERS.safetensors --out centred.safetensors
      What needs no training, fitted on features of held-out training pairs and applied to others;
      `clip-refine evaluate --save-features FILE` writes features.

`clip-refine VERB --help` lists every setting with its default. Settings can also come from a
YAML file, --config run.yaml, and --print-config shows them without running anything.
"""

VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo_verb,
    "refine": refine_verb,
    "evaluate": evaluate_verb,
    "compare": compare_verb,
    "report": report_verb,
    "explore": explore_verb,
    "data": data_verb,
    "interpolate": interpolate_verb,
    "export": export_verb,
    "posthoc": posthoc_verb,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exit with status 2 and one clear message where something is wrong."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return
    verb, *rest = arguments
    if verb == "--version":
        from clip_refine import __version__

        print(__version__)
        return
    try:
        _find(verb)(rest)
    except ClipRefineError as error:
        print(printable(f"clip-refine {verb}: {error}"), file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        kept = {"compare": "finished runs are kept", "evaluate": "features of a suite are kept"}
        left = kept.get(verb, "nothing was written")
        print(f"\nclip-refine {verb}: stopped; {left}.", file=sys.stderr)
        raise SystemExit(130) from None


def _find(verb: str) -> Callable[[list[str]], None]:
    if verb in VERBS:
        return VERBS[verb]
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(f"there is no such verb.{hint} The verbs are {', '.join(VERBS)}.")
