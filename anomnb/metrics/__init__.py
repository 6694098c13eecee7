"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.metrics.comparison import compare as compare
    from anomnb.metrics.intervals import Interval as Interval
    from anomnb.metrics.intervals import auroc_interval as auroc_interval
    from anomnb.metrics.intervals import bootstrap_images as bootstrap_images
    from anomnb.metrics.operating import average_precision as average_precision
    from anomnb.metrics.operating import caught_bad as caught_bad
    from anomnb.metrics.operating import fpr_at_recall as fpr_at_recall
    from anomnb.metrics.operating import passed_good as passed_good
    from anomnb.metrics.operating import pr_curve as pr_curve
    from anomnb.metrics.operating import recall_at_fpr as recall_at_fpr
    from anomnb.metrics.pixel import PixelScores as PixelScores
    from anomnb.metrics.pixel import aupro as aupro
    from anomnb.metrics.pixel import pixel_auroc as pixel_auroc
    from anomnb.metrics.ranking import auroc as auroc
    from anomnb.metrics.ranking import f1_max as f1_max
    from anomnb.metrics.ranking import roc_curve as roc_curve

__getattr__, __dir__, __all__ = lazy_names(__name__)
