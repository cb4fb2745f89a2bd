"""CLIP-Refine as one flat loop, to paste into your own training code.

Runs as it stands on the toy world: `python examples/01_by_hand.py`. For your own model and data,
replace the three marked places; the loop stays. It makes the weights that `clip-refine refine`
makes of the same batches (tests/test_examples.py).
"""

import copy
import sys

import open_clip
import torch
from torch.nn.functional import normalize

from clip_refine.losses import hycd_loss, rafa_loss
from clip_refine.models.weights import FeatureScale, RawNorms
from clip_refine.priors import StandardNormal
from clip_refine.toy import model_directory, toy_train, toy_val

NAME = f"local-dir:{model_directory()}"  # 1. your model: "ViT-B-32-quickgelu", pretrained="openai"
LEARNING_RATE, BATCH_SIZE = 3e-4, 128  # 2. the paper's for OpenAI's models: 1e-6 and 512


@torch.no_grad()
def raw_norms(model, pixels, tokens):
    """What the model's features measure; OpenAI's measure about 10, which the method counts on."""
    image, text = model.encode_image(pixels), model.encode_text(tokens)
    norms = (float(side.norm(dim=-1).mean()) for side in (image, text))
    return RawNorms(*norms, logit_scale=float(model.logit_scale.exp()))


def refine_by_hand(student, batches, norms, *, learning_rate, generator):
    """Train in place, on (pixels, tokens)."""
    student.eval()  # open_clip hands models out in train mode; dropout and BatchNorm stay still
    batches = iter(batches)
    pixels, tokens = next(batches)
    # both towers at the paper's norm while they are trained, and back again
    scale = FeatureScale.canonical(student, pixels[:2], tokens[:2], norms)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.logit_scale.requires_grad_(False)  # the objective does not use it
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.1)
    while True:
        image_features, text_features = student.encode_image(pixels), student.encode_text(tokens)
        with torch.no_grad():
            of_teacher = teacher.encode_image(pixels), teacher.encode_text(tokens)
        # one reference a pair, shared by its image and its text
        shape = {"generator": generator, "device": pixels.device}
        references = StandardNormal().sample(*image_features.shape, **shape)
        rafa = rafa_loss(image_features, text_features, references)
        how = {"alpha": 0.5, "normalize": True, "temperature": 1 / norms.logit_scale}
        hycd = hycd_loss(image_features, text_features, *of_teacher, **how)
        (rafa + hycd).backward()
        optimiser.step()
        optimiser.zero_grad()
        yield rafa.item(), hycd.item()
        if (batch := next(batches, None)) is None:
            break
        pixels, tokens = batch
    scale.undo()


def main(steps: int) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, _, preprocess = open_clip.create_model_and_transforms(NAME, device=device)
    tokenizer = open_clip.get_tokenizer(NAME)
    student.eval()

    def load(pairs, indices):
        """3. your data: one preprocessed image and one tokenised caption an index."""
        pixels = torch.stack([preprocess(pairs.load_image(i)) for i in indices])
        return pixels.to(device), tokenizer([pairs.captions[i][0] for i in indices]).to(device)

    @torch.no_grad()
    def gap_and_recall(pairs):
        pixels, tokens = load(pairs, range(500))
        image_unit = normalize(student.encode_image(pixels), dim=-1)
        text_unit = normalize(student.encode_text(tokens), dim=-1)
        gap = (image_unit.mean(0) - text_unit.mean(0)).norm()
        first = (image_unit @ text_unit.T).argmax(dim=1).cpu() == torch.arange(500)
        return f"gap {gap:.3f}, image to text R@1 {first.float().mean():.3f}"

    held_out, pairs = toy_val(), toy_train()
    print("before:", gap_and_recall(held_out))
    order = torch.randperm(len(pairs)).split(BATCH_SIZE)[: min(steps, len(pairs) // BATCH_SIZE)]
    run = refine_by_hand(
        student,
        (load(pairs, indices.tolist()) for indices in order),
        raw_norms(student, *load(pairs, range(500))),
        learning_rate=LEARNING_RATE,
        generator=torch.Generator().manual_seed(0),
    )
    for step, (rafa, hycd) in enumerate(run):
        if step % 10 == 0:
            print(f"step {step}: rafa {rafa:.3f}, hycd {hycd:.3f}")
    print("after:", gap_and_recall(held_out))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 46)
