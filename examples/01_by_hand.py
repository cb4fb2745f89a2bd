"""CLIP-Refine as one flat loop, to paste into your own training code.

Runs as it stands on the toy world: `python examples/01_by_hand.py`. For your own model and data,
replace the three marked places; the loop stays.
"""

import copy
import sys

import open_clip
import torch
from torch.nn.functional import normalize

from clip_refine.losses import hycd_loss, rafa_loss
from clip_refine.priors import StandardNormal
from clip_refine.toy import model_directory, toy_train, toy_val

NAME = f"local-dir:{model_directory()}"  # 1. your model: "ViT-B-32-quickgelu", pretrained="openai"
LEARNING_RATE, BATCH_SIZE = 3e-4, 128  # 2. the paper's for OpenAI's models: 1e-6 and 512
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 46

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
student, _, preprocess = open_clip.create_model_and_transforms(NAME, device=device)
tokenizer = open_clip.get_tokenizer(NAME)
student.eval()  # open_clip hands models out in train mode; dropout and BatchNorm stay still here
teacher = copy.deepcopy(student).requires_grad_(False)
student.logit_scale.requires_grad_(False)  # the objective does not use it

trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
optimiser = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.1)
prior, generator = StandardNormal(), torch.Generator().manual_seed(0)


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
    best_text = (image_unit @ text_unit.T).argmax(dim=1).cpu()
    return f"gap {gap:.3f}, image to text R@1 {(best_text == torch.arange(500)).float().mean():.3f}"


held_out, pairs = toy_val(), toy_train()
print("before:", gap_and_recall(held_out))
order = torch.randperm(len(pairs)).tolist()
for step in range(min(STEPS, len(pairs) // BATCH_SIZE)):
    pixels, tokens = load(pairs, order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])

    image_features, text_features = student.encode_image(pixels), student.encode_text(tokens)
    with torch.no_grad():
        teacher_image, teacher_text = teacher.encode_image(pixels), teacher.encode_text(tokens)

    # one reference a pair, shared by its image and its text
    references = prior.sample(*image_features.shape, generator=generator, device=device)
    rafa = rafa_loss(image_features, text_features, references)
    hycd = hycd_loss(image_features, text_features, teacher_image, teacher_text, alpha=0.5)

    (rafa + hycd).backward()
    optimiser.step()
    optimiser.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: rafa {rafa.item():.3f}, hycd {hycd.item():.3f}")
print("after:", gap_and_recall(held_out))
