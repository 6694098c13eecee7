"""Pictures as a model takes them."""
import torch

from anomnb.data.read import to_unit


def unit(images):
    "uint8 pictures of one size as B×3×H×W in [0, 1]"
    return torch.stack([torch.from_numpy(to_unit(o)) for o in images])
