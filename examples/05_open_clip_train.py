"""open_clip's own training script with CLIP-Refine as its loss.

`python 05_open_clip_train.py --model ViT-B-32 --pretrained openai --distill-model ViT-B-32
--distill-pretrained openai --train-data captions.csv ...`: every flag is open_clip's. The model to
distil from is the frozen copy. The script hands over unit features, which are multiplied by the
root of the logit scale here: the paper's norm, but each feature's exactly and not their mean.
Needs `pip install 'open_clip_torch[training]'`.
"""

import sys

import torch
from open_clip_train import main as script

from clip_refine.losses import hycd_loss, rafa_loss
from clip_refine.priors import StandardNormal


class RefineLoss(torch.nn.Module):
    """Called as open_clip calls its losses where there is a model to distil from."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.prior, self.generator = StandardNormal(), torch.Generator().manual_seed(seed)

    def forward(
        self,
        image_features,
        text_features,
        logit_scale,
        dist_image_features,
        dist_text_features,
        dist_logit_scale,
        output_dict=False,
    ):
        scale = dist_logit_scale.detach()  # of the teacher, which stays
        image, text = image_features * scale.sqrt(), text_features * scale.sqrt()
        references = self.prior.sample(*image.shape, generator=self.generator, device=image.device)
        teacher = dist_image_features, dist_text_features
        how = {"alpha": 0.5, "normalize": True, "temperature": 1 / scale}
        losses = {
            "rafa_loss": rafa_loss(image, text, references),
            "hycd_loss": hycd_loss(image, text, *teacher, **how),
        }
        return losses if output_dict else sum(losses.values())


if __name__ == "__main__":
    script.create_loss = lambda args: RefineLoss(args.seed)
    script.main(sys.argv[1:])
