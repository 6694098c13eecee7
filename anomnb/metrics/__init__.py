"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.metrics.pixel import PixelScores as PixelScores
    from anomnb.metrics.pixel import aupro as aupro
    from anomnb.metrics.pixel import pixel_auroc as pixel_auroc
    from anomnb.metrics.ranking import auroc as auroc
    from anomnb.metrics.ranking import f1_max as f1_max
    from anomnb.metrics.ranking import roc_curve as roc_curve

__getattr__, __dir__, __all__ = lazy_names(__name__)
