"""The tasks that a suite can ask for, each with its protocol."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from clip_refine.config.groups import Count, SettingsGroup

CaptionProtocol = Literal["all-captions", "first-caption"]


class _Task(SettingsGroup):
    needs_captions: ClassVar[bool] = False
    """Whether it is measured on captions; else on classes."""

    source: str
    """The name of a source of the suite."""
    name: str | None = None
    """What to call the task; without it its source and its kind."""

    @property
    def kind_name(self) -> str:
        """The task's kind, as in the YAML."""
        return getattr(self, "kind")  # noqa: B009 - declared by every task, not here

    @property
    def title(self) -> str:
        """What to call the task."""
        return self.name or f"{self.source} {self.kind_name}"

    def sources(self) -> dict[str, str]:
        """Field → the source that it names."""
        return {"source": self.source}


class _CaptionTask(_Task):
    needs_captions: ClassVar[bool] = True

    protocol: CaptionProtocol = "all-captions"
    """all-captions: all captions of an image are its own (COCO 5k: 5 an image). first-caption: one
    caption an image, as in the paper's tables; not comparable with the other."""


class ZeroShotTask(_Task):
    """Classification by the class names: top-1, top-5, per-class recall, calibration."""

    kind: Literal["zero-shot"]
    prompts: str | tuple[str, ...] = "paper"
    """`paper`: "a photo of a {}". `openai-imagenet` (80) and `simple-imagenet` (7): open_clip's.
    `short`: the few of this package for sources it knows by name. Else a list of templates, or a
    .txt, .yaml or .json file with one; `{}` stands for the class name."""

    @field_validator("prompts")
    @classmethod
    def _places_for_the_name(cls, prompts: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not isinstance(prompts, str):
            bad = [template for template in prompts if "{}" not in template]
            if bad or not prompts:
                raise ValueError(
                    f"{bad[0]!r} has no {{}} for the class name" if bad else "is empty"
                )
        return prompts


class RetrievalTask(_CaptionTask):
    """Recall at 1, 5 and 10, median rank and mAP, both directions."""

    kind: Literal["retrieval"]


class MixedSearchTask(_CaptionTask):
    """Images and captions in one index: NDCG@10, who stands first, rank of the right image."""

    kind: Literal["mixed-search"]


class SeparationTask(_CaptionTask):
    """Whether one threshold tells true pairs from wrong ones."""

    kind: Literal["separation"]
    false_positive_rate: Annotated[float, Field(gt=0, lt=1)] = 0.01


class GeometryTask(_Task):
    """The shape of the shared space, on every image with its first caption."""

    needs_captions: ClassVar[bool] = True

    kind: Literal["geometry"]


class _ProbeTask(_Task):
    train: str | None = None
    """The source to fit on. Without it half of `source` fits, the other half tests."""

    def sources(self) -> dict[str, str]:
        return super().sources() | ({"train": self.train} if self.train else {})


class LinearProbeTask(_ProbeTask):
    """Logistic regression on frozen image features, C chosen on a validation part."""

    kind: Literal["linear-probe"]


class FewShotTask(_ProbeTask):
    """The same with few images a class."""

    kind: Literal["few-shot-probe"]
    shots: tuple[Count, ...] = (1, 4, 16)
    """Images a class to fit on."""
    draws: Annotated[int, Field(ge=2)] = 5
    """How often they are drawn anew."""


Task = Annotated[
    ZeroShotTask
    | RetrievalTask
    | MixedSearchTask
    | SeparationTask
    | GeometryTask
    | LinearProbeTask
    | FewShotTask,
    Field(discriminator="kind"),
]
"""One thing to measure."""
