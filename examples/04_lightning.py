"""CLIP-Refine as a Lightning module: `python 04_lightning.py [STEPS]` on the toy world.

Needs `pip install lightning`; the refined model goes to `refined/`.
"""

import copy
import sys
from pathlib import Path

import lightning
import torch

from clip_refine.losses import hycd_loss, rafa_loss
from clip_refine.models import load_open_clip
from clip_refine.models.weights import FeatureScale, RawNorms
from clip_refine.priors import StandardNormal
from clip_refine.toy import model_directory, toy_train


class Refinement(lightning.LightningModule):
    """A student, a frozen copy of it, and the paper's two losses of their features."""

    def __init__(self, model, pixels, tokens, learning_rate: float) -> None:
        super().__init__()
        with torch.no_grad():
            sides = model.encode_image(pixels), model.encode_text(tokens)
            means = [float(side.norm(dim=-1).mean()) for side in sides]
            self.norms = RawNorms(*means, logit_scale=float(model.logit_scale))
        self.scale = FeatureScale.canonical(model, pixels[:2], tokens[:2], self.norms)
        self.student, self.learning_rate = model, learning_rate
        self.teacher = copy.deepcopy(model).requires_grad_(False)
        self.prior, self.generator = StandardNormal(), torch.Generator().manual_seed(0)

    def training_step(self, batch, index):
        pixels, tokens = batch
        image, text = self.student.encode_image(pixels), self.student.encode_text(tokens)
        with torch.no_grad():
            teacher = self.teacher.encode_image(pixels), self.teacher.encode_text(tokens)
        references = self.prior.sample(*image.shape, generator=self.generator, device=image.device)
        how = {"alpha": 0.5, "normalize": True, "temperature": 1 / self.norms.logit_scale}
        return rafa_loss(image, text, references) + hycd_loss(image, text, *teacher, **how)

    def on_train_start(self) -> None:
        self.eval()  # dropout and BatchNorm stay still

    def on_fit_end(self) -> None:
        self.scale.undo()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), self.learning_rate, weight_decay=0.1)


def main(steps: int) -> None:
    model, pairs = load_open_clip(f"local-dir:{model_directory()}"), toy_train()

    def stack(indices):
        captions = [pairs.captions[i][0] for i in indices]
        return torch.stack([model.preprocess(pairs.load_image(i)) for i in indices]), (
            model.full_length_tokenizer(captions)
        )

    loader = torch.utils.data.DataLoader(range(len(pairs)), 128, shuffle=True, collate_fn=stack)
    module = Refinement(model, *stack(range(128)), learning_rate=3e-4)
    lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False).fit(module, loader)
    model.cpu().save(Path("refined"))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 46)
