"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.metrics.binned import BinnedPixelScores as BinnedPixelScores
    from anomnb.metrics.classes import AUPIMO as AUPIMO
    from anomnb.metrics.classes import AUPRO as AUPRO
    from anomnb.metrics.classes import AUROC as AUROC
    from anomnb.metrics.classes import AUsPRO as AUsPRO
    from anomnb.metrics.classes import AveragePrecision as AveragePrecision
    from anomnb.metrics.classes import CaughtBad as CaughtBad
    from anomnb.metrics.classes import DefectF1 as DefectF1
    from anomnb.metrics.classes import Dice as Dice
    from anomnb.metrics.classes import F1Max as F1Max
    from anomnb.metrics.classes import FPRAtRecall as FPRAtRecall
    from anomnb.metrics.classes import IoU as IoU
    from anomnb.metrics.classes import PassedGood as PassedGood
    from anomnb.metrics.classes import RecallAtFPR as RecallAtFPR
    from anomnb.metrics.comparison import compare as compare
    from anomnb.metrics.evaluation import Evaluation as Evaluation
    from anomnb.metrics.evaluator import Evaluator as Evaluator
    from anomnb.metrics.evaluator import evaluate as evaluate
    from anomnb.metrics.intervals import Interval as Interval
    from anomnb.metrics.intervals import auroc_interval as auroc_interval
    from anomnb.metrics.intervals import bootstrap_images as bootstrap_images
    from anomnb.metrics.intervals import proportion_interval as proportion_interval
    from anomnb.metrics.operating import average_precision as average_precision
    from anomnb.metrics.operating import caught_bad as caught_bad
    from anomnb.metrics.operating import fpr_at_recall as fpr_at_recall
    from anomnb.metrics.operating import passed_good as passed_good
    from anomnb.metrics.operating import pr_curve as pr_curve
    from anomnb.metrics.operating import recall_at_fpr as recall_at_fpr
    from anomnb.metrics.overlap import defect_f1 as defect_f1
    from anomnb.metrics.overlap import dice as dice
    from anomnb.metrics.overlap import iou as iou
    from anomnb.metrics.pixel import PixelScores as PixelScores
    from anomnb.metrics.pixel import au_spro as au_spro
    from anomnb.metrics.pixel import aupimo as aupimo
    from anomnb.metrics.pixel import aupro as aupro
    from anomnb.metrics.pixel import pixel_auroc as pixel_auroc
    from anomnb.metrics.pixel import pixel_average_precision as pixel_average_precision
    from anomnb.metrics.pixel import pixel_f1_max as pixel_f1_max
    from anomnb.metrics.pixel_intervals import bootstrap_pixels as bootstrap_pixels
    from anomnb.metrics.ranking import auroc as auroc
    from anomnb.metrics.ranking import f1_max as f1_max
    from anomnb.metrics.ranking import roc_curve as roc_curve

__getattr__, __dir__, __all__ = lazy_names(__name__)
