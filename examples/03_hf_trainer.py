"""CLIP-Refine as the loss of Hugging Face's `Trainer`: `python 03_hf_trainer.py MODEL OUT [STEPS]`.

MODEL is a folder or name of Transformers' CLIP or SigLIP models; the pairs are of the drawn world,
one class below shows what yours have to give. OUT gets the refined model.
Needs `pip install 'clip-refine[hf]'`.
"""

import copy
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

from clip_refine.losses import hycd_loss, rafa_loss
from clip_refine.models import load_transformers
from clip_refine.models.weights import FeatureScale, RawNorms
from clip_refine.priors import StandardNormal
from clip_refine.toy import toy_train


class Pairs(torch.utils.data.Dataset):
    """One preprocessed image and one tokenised caption an index."""

    def __init__(self, model, count: int) -> None:
        self.model, self.pairs, self.count = model, toy_train(), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = self.model.preprocess(self.pairs.load_image(index))
        # of full length, so that a batch stacks
        tokens = self.model.full_length_tokenizer([self.pairs.captions[index][0]])[0]
        return {"pixels": pixels, "tokens": tokens}


class RefineTrainer(Trainer):
    """RaFA and HyCD instead of the model's own loss."""

    def __init__(self, model, *, logit_scale: float, **settings) -> None:
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.prior, self.logit_scale = StandardNormal(), logit_scale
        self.generator = torch.Generator().manual_seed(settings["args"].seed)
        super().__init__(model, **settings)
        self.teacher.to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        model.eval()  # dropout and BatchNorm stay still
        pixels, tokens = inputs["pixels"], inputs["tokens"]
        image, text = model.encode_image(pixels), model.encode_text(tokens)
        with torch.no_grad():
            teacher = self.teacher.encode_image(pixels), self.teacher.encode_text(tokens)
        references = self.prior.sample(*image.shape, generator=self.generator, device=image.device)
        how = {"alpha": 0.5, "normalize": True, "temperature": 1 / self.logit_scale}
        loss = rafa_loss(image, text, references) + hycd_loss(image, text, *teacher, **how)
        return (loss, {}) if return_outputs else loss


def main(name: str, out: str, steps: int = 46) -> None:
    model = load_transformers(name)
    pairs = Pairs(model, 128 * steps)
    sample = [pairs[index] for index in range(128)]
    pixels, tokens = (torch.stack([pair[key] for pair in sample]) for key in ("pixels", "tokens"))
    with torch.no_grad():
        sides = model.encode_image(pixels), model.encode_text(tokens)
        means = [float(side.norm(dim=-1).mean()) for side in sides]
        norms = RawNorms(*means, logit_scale=float(model.logit_scale))
    scale = FeatureScale.canonical(model, pixels[:2], tokens[:2], norms)
    settings = TrainingArguments(
        output_dir=f"{out}-states",
        per_device_train_batch_size=128,
        max_steps=steps,
        learning_rate=3e-4,  # the paper's for OpenAI's models: 1e-6, and batches of 512
        lr_scheduler_type="constant",
        weight_decay=0.1,
        remove_unused_columns=False,  # those are the pairs
        save_strategy="no",
        report_to="none",
    )
    RefineTrainer(model, logit_scale=norms.logit_scale, args=settings, train_dataset=pairs).train()
    scale.undo()
    model.cpu().save(Path(out))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:4]))
