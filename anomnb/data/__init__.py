"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.data.folder import Folder as Folder
    from anomnb.data.folder import Images as Images
    from anomnb.data.folder import Toy as Toy
    from anomnb.data.loader import make_loader as make_loader
    from anomnb.data.masks import read_mask as read_mask
    from anomnb.data.masks import read_masks as read_masks
    from anomnb.data.read import Item as Item
    from anomnb.data.read import read_image as read_image
    from anomnb.data.splits import split_good as split_good
    from anomnb.data.synthetic import cut_paste as cut_paste
    from anomnb.data.synthetic import perlin_mask as perlin_mask
    from anomnb.data.synthetic import synthesise as synthesise
    from anomnb.data.toy import draw_toy as draw_toy

__getattr__, __dir__, __all__ = lazy_names(__name__)
