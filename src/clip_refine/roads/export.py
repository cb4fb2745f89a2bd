"""`export`: a model in another library's format, loaded back there and compared."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.tokenizer import basic_clean
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from clip_refine import __version__
from clip_refine.config import ModelConfig, RefineConfig, load_config, named_model
from clip_refine.data import ImageCaptions, Subset
from clip_refine.models.checkpoints import is_run
from clip_refine.models.encoder import files_of
from clip_refine.models.open_clip import quiet_open_clip
from clip_refine.models.transformers import INSTALL, quiet_transformers
from clip_refine.results import THRESHOLD, FitProbability, Provenance, RunScores, read
from clip_refine.roads import build
from clip_refine.saving import (
    base_model,
    read_provenance,
    write_card,
    write_onnx,
    write_open_clip,
    write_sentence_transformers,
    write_transformers,
)
from clip_refine.saving.onnx import INSTALL as INSTALL_ONNX
from clip_refine.saving.onnx import LAYOUTS, external_files, image_size, record_check
from clip_refine.support.errors import (
    ClipRefineError,
    ConfigError,
    FailedError,
    ModelError,
    first_line,
)
from clip_refine.support.folder import check_free, complete_folder
from clip_refine.toy import toy_val

# --------------------------------------------------------------------------------------------------
# Whether an exported model gives the same features.


SAMPLE = 16  # images and captions that are compared


@dataclass(frozen=True)
class Encoders:
    """An exported model as its users run it."""

    images: Callable[[list[Image.Image]], Tensor]  # PIL images → (B, d) raw features
    texts: Callable[[list[str]], Tensor]  # texts → (B, d) raw features


@dataclass(frozen=True)
class ExportCheck:
    """How an exported model compares with its source."""

    pairs: str  # name of the pairs that were compared
    count: int  # how many
    # largest difference in any dimension of any image's raw features, as a share of their mean
    # norm, for images of the model's own size
    image_difference: float
    text_difference: float  # the same for captions, with characters cleaned as open_clip does
    image_cosine: float  # lowest cosine for the images as they are, each side resizing by itself
    text_cosine: float  # lowest cosine for the captions as they are
    tolerance: float  # what the differences may be

    @property
    def passed(self) -> bool:
        """Whether both differences are within the tolerance; not where one is not a number."""
        differences = (self.image_difference, self.text_difference)
        return all(difference <= self.tolerance for difference in differences)

    def __str__(self) -> str:
        """The differences in half a sentence."""
        return (
            f"features differ in no dimension by more than {self.image_difference:.1e} (images) "
            f"and {self.text_difference:.1e} (texts) of their norm, {self.tolerance:.0e} allowed, "
            f"on {self.count} pairs of {self.pairs}"
        )


def sample_pairs(run: Path | None) -> ImageCaptions:
    """16 held-out pairs of a run where they can be read, else of the drawn world."""
    pairs: ImageCaptions = toy_val()
    if run:
        try:
            config = load_config(RefineConfig, run / "config.yaml")
            held_out = build.build_held_out(config.data, seed=config.seed)
            first = Subset(held_out, range(min(SAMPLE, len(held_out))), held_out.name)
            for index in range(len(first)):
                first.load_image(index)
            return first
        except ClipRefineError:
            pass  # the data are elsewhere by now
    return Subset(pairs, range(SAMPLE), "drawn pairs")


@torch.no_grad()
def compare_features(
    model: Any, exported: Encoders, pairs: ImageCaptions, *, tolerance: float, unit: bool = False
) -> ExportCheck:
    """Encode the same pairs by both; `unit` where the export's features are divided by norms."""
    originals = [pairs.load_image(index).convert("RGB") for index in range(len(pairs))]
    height, width = image_size(model)
    images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in originals]
    captions = [pairs.captions[index][0] for index in range(len(pairs))]
    cleaned = [" ".join(basic_clean(caption).split()) for caption in captions]
    device = next(model.parameters()).device

    def as_exported(features: Tensor) -> Tensor:
        return normalize(features, dim=-1) if unit else features

    def encode_images(these: list[Image.Image]) -> Tensor:
        pixels = torch.stack([model.preprocess(image) for image in these])
        return as_exported(model.encode_image(pixels.to(device)))

    def encode_texts(these: list[str]) -> Tensor:
        return as_exported(model.encode_text(model.tokenizer(these).to(device)))

    def difference(expected: Tensor, found: Tensor) -> float:
        found = found.to(expected)
        if expected.shape != found.shape:
            return float("inf")
        return float((expected - found).abs().max() / expected.norm(dim=-1).mean())

    def lowest_cosine(expected: Tensor, found: Tensor) -> float:
        return float(torch.cosine_similarity(expected, found.to(expected), dim=-1).min())

    return ExportCheck(
        pairs=Path(pairs.name).name,
        count=len(pairs),
        image_difference=difference(encode_images(images), exported.images(images)),
        text_difference=difference(encode_texts(cleaned), exported.texts(cleaned)),
        image_cosine=lowest_cosine(encode_images(originals), exported.images(originals)),
        text_cosine=lowest_cosine(encode_texts(captions), exported.texts(captions)),
        tolerance=tolerance,
    )


# --------------------------------------------------------------------------------------------------
# Exported folders, loaded by the library they are for and without any of ours.


def load_back(folder: Path, kind: str, model: Any) -> Encoders:
    """An exported model as its users load it."""
    try:
        match kind:
            case "open_clip":
                return _open_clip(folder)
            case "transformers":
                return _transformers(folder)
            case "sentence-transformers":
                return _sentence_transformers(folder)
            case "immich":
                return _immich(folder)
            case _:
                return _onnx(folder, model)
    except ImportError as error:
        install = INSTALL_ONNX if kind in LAYOUTS else INSTALL
        raise ModelError(
            f"the export cannot be checked without {error.name}. Install it with {install}."
        ) from error


def _open_clip(folder: Path) -> Encoders:
    name = f"local-dir:{folder}"
    with quiet_open_clip():
        model, _, preprocess = open_clip.create_model_and_transforms(name, precision="fp32")
        tokenizer = open_clip.get_tokenizer(name)
    clip: Any = model.eval()

    def images(these: list[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(image) for image in these])  # type: ignore[operator]
        return clip.encode_image(pixels, normalize=False)

    return Encoders(images, lambda texts: clip.encode_text(tokenizer(texts), normalize=False))


def _transformers(folder: Path) -> Encoders:
    from transformers import AutoModel, AutoProcessor

    with quiet_transformers():
        model = AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)

    def pooled(features: Any) -> Tensor:  # Transformers 5 wraps them, Transformers 4 does not
        return features if isinstance(features, Tensor) else features.pooler_output

    def images(these: list[Image.Image]) -> Tensor:
        return pooled(model.get_image_features(**processor(images=these, return_tensors="pt")))

    def texts(these: list[str]) -> Tensor:
        tokens = processor(text=these, padding="max_length", truncation=True, return_tensors="pt")
        return pooled(model.get_text_features(**tokens))

    return Encoders(images, texts)


def _sentence_transformers(folder: Path) -> Encoders:
    from sentence_transformers import SentenceTransformer

    with quiet_transformers():
        model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)

    def encode(these: list[Any]) -> Tensor:
        return model.encode(these, convert_to_tensor=True, show_progress_bar=False)

    return Encoders(images=encode, texts=encode)


def _onnx(folder: Path, model: Any) -> Encoders:
    image_tower, text_tower = _towers(folder, "onnx")
    tokenizer = files_of(model).full_length_tokenizer

    def images(these: list[Image.Image]) -> Tensor:
        return image_tower(torch.stack([model.preprocess(image) for image in these]).numpy())

    return Encoders(images, lambda texts: text_tower(tokenizer(texts).numpy()))


def _towers(folder: Path, layout: str) -> list[Callable[[Any], Tensor]]:
    """Both towers in onnxruntime, whole: with what lies beside their files."""
    from onnxruntime import InferenceSession

    def tower(file: str, name: str) -> Callable[[Any], Tensor]:
        external_files(folder / file)
        session = InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        return lambda array: torch.from_numpy(session.run(None, {name: array})[0])

    form = LAYOUTS[layout]
    return [tower(*of) for of in zip(form.files, form.inputs, strict=True)]


def _immich(folder: Path) -> Encoders:
    """As immich_ml feeds a model: its own pixels, the `tokenizers` package alone."""
    from tokenizers import Tokenizer

    image_tower, text_tower = _towers(folder, "immich")
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_cfg"]
    image = json.loads((folder / "visual/preprocess_cfg.json").read_text(encoding="utf-8"))
    side = image["size"] if isinstance(image["size"], int) else image["size"][0]
    filter_ = Image.Resampling[image["interpolation"].upper()]
    mean, std = (np.array(image[name], np.float32) for name in ("mean", "std"))
    settings = json.loads((folder / "textual/tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer, pad = (
        Tokenizer.from_file(str(folder / "textual/tokenizer.json")),
        settings["pad_token"],
    )
    length = text.get("context_length", 77)
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)

    def pixels(original: Image.Image) -> Any:
        width, height = original.size if image["resize_mode"] == "shortest" else (side, side)
        short = min(width, height)
        width, height = int(side * width / short), int(side * height / short)
        left, top = (width - side) // 2, (height - side) // 2
        resized = original.resize((width, height), filter_)
        cut = resized.crop((left, top, left + side, top + side))
        return ((np.asarray(cut.convert("RGB"), np.float32) / 255 - mean) / std).transpose(2, 0, 1)

    def ids(caption: str) -> list[int]:
        if (text.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize":
            caption = open_clip.tokenizer.canonicalize_text(caption)
        return tokenizer.encode(caption).ids

    return Encoders(
        images=lambda these: image_tower(np.stack([pixels(one) for one in these])),
        texts=lambda these: text_tower(np.array([ids(one) for one in these], np.int32)),
    )


# --------------------------------------------------------------------------------------------------
# The road out: load → write → load back as its users would → compare → keep or refuse.


FORMATS = ("open_clip", "transformers", "sentence-transformers", *LAYOUTS)
# what features may differ by: ONNX runs other kernels, and smaller weights are other weights
_TOLERANCE, _ONNX_TOLERANCES = 1e-5, {"fp32": 1e-4, "fp16": 5e-3, "int8": 5e-2}


def export(
    source: str,
    *,
    to: str,
    out: Path,
    overwrite: bool = False,
    precision: str = "fp32",
    push_to_hub: str | None = None,
    private: bool = True,
) -> ExportCheck:
    """Write a model in another library's format, if it gives the same features there.

    The written folder is loaded back with that library and compared on 16 images and captions: of
    the run's held-out pairs where they can be read, else drawn ones. Then it goes to the Hub.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to {to}: there is no such format. Allowed: {', '.join(FORMATS)}.")
    if precision not in _ONNX_TOLERANCES or (precision != "fp32" and to not in LAYOUTS):
        raise ConfigError(
            f"--precision {precision}: not with --to {to}. Allowed: fp32; with "
            f"--to {' or '.join(LAYOUTS)} also fp16 and int8."
        )
    if push_to_hub:
        _check_hub(push_to_hub)
    elif not private:
        raise ConfigError(
            "--no-private goes with --push-to-hub YOU/NAME. Give that, or leave it out."
        )
    check_free(out, overwrite=overwrite)
    named = named_model(source)
    path = Path(named.place)
    # the run that the folder is, or is the model of
    within = (path, path.parent if path.name == "model" else path)
    run = next((folder for folder in within if is_run(folder)), None)
    model = build.build_model(named) if named.factory else _load(source, run, to)
    provenance = _origin(named, run).model_copy(update={"precision": precision})
    header = provenance.header()
    with complete_folder(out, overwrite=overwrite) as folder:
        match to:
            case "open_clip":
                write_open_clip(model, folder, header)
            case "transformers":
                write_transformers(model, folder, header)
            case "sentence-transformers":
                write_sentence_transformers(model, folder, header)
            case _:
                write_onnx(model, folder, header, layout=to, precision=precision)
        pairs = sample_pairs(run)  # opens the run's data, for nothing where the model is refused
        loaded = load_back(folder, to, model)
        tolerance = _ONNX_TOLERANCES[precision] if to in LAYOUTS else _TOLERANCE
        unit = to in LAYOUTS and LAYOUTS[to].unit
        check = compare_features(model, loaded, pairs, tolerance=tolerance, unit=unit)
        if not check.passed:
            raise ModelError(
                f"the exported model gives other features than {source}: {check}. Nothing was "
                "kept. Please report this with the model's name."
            )
        if to in LAYOUTS:
            record_check(folder, asdict(check))
        write_card(folder, provenance, hub_id=push_to_hub)
        if precision == "fp32":  # others have other cosines
            _copy_threshold(named, run, folder)
    if push_to_hub:
        _push(out, push_to_hub, private=private)
    return check


def _check_hub(repo: str) -> None:
    """Refuse before any work what the Hub would refuse after it."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {repo}: {first_line(error)}") from error
    if get_token() is None:
        raise ConfigError("--push-to-hub needs a token of yours: hf auth login, or HF_TOKEN.")


def _push(folder: Path, repo: str, *, private: bool) -> None:
    """One commit with all of a folder; the repository is made where there is none."""
    from huggingface_hub import HfApi

    hub = HfApi(library_name="clip-refine", library_version=__version__)
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Upload of clip-refine {__version__}",
        )
    except Exception as error:  # of whichever library it sends by; what is exported is there
        raise FailedError(
            f"{repo}: the Hub did not take it ({first_line(error)}). The export is in {folder}; "
            f"hf upload {repo} {folder} tries again."
        ) from error


def _load(source: str, run: Path | None, to: str) -> Any:
    """The model, in its Transformers files where these are wanted and there."""
    folder = (run / "model" if run else Path(source)).absolute()
    if to in ("transformers", "sentence-transformers") and (
        (folder / "config.json").is_file() or (folder / "modules.json").is_file()
    ):
        return build.build_model(ModelConfig(name=f"transformers:{folder}"))
    return build.build_model(ModelConfig(name=str(run or source)))


def _model_folder(named: ModelConfig, run: Path | None) -> Path:
    return run / "model" if run else Path(named.place.removeprefix("local-dir:"))


def _origin(named: ModelConfig, run: Path | None) -> Provenance:
    """Where the model comes from, with the scores of the run that made it."""
    if run:
        try:
            scores = read(RunScores, run / "scores.json")
            return Provenance.model_validate(scores.recipe["provenance"]).measured(scores)
        except (ClipRefineError, KeyError, ValueError):
            pass  # of another version: then the weights say what they say
    folder = _model_folder(named, run)
    found = read_provenance(folder) if folder.is_dir() else None
    base = base_model(named.name, named.pretrained)
    return found or Provenance(version=__version__, made="converted", base=base)


def _copy_threshold(named: ModelConfig, run: Path | None, folder: Path) -> None:
    """From which cosine on a pair fits, where that was measured."""
    file = _model_folder(named, run) / THRESHOLD
    if file.is_file():
        with suppress(ClipRefineError):  # of another version, or damaged
            read(FitProbability, file).write(folder / THRESHOLD)
