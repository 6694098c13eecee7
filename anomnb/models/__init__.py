"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.models.anomaly_dino import AnomalyDino as AnomalyDino
    from anomnb.models.backbones import Backbone as Backbone
    from anomnb.models.backbones import list_backbones as list_backbones
    from anomnb.models.backbones import register_backbone as register_backbone
    from anomnb.models.base import AnomalyModule as AnomalyModule
    from anomnb.models.base import FitOnce as FitOnce
    from anomnb.models.base import merge as merge
    from anomnb.models.cfa import Cfa as Cfa
    from anomnb.models.dfkde import Dfkde as Dfkde
    from anomnb.models.dfm import Dfm as Dfm
    from anomnb.models.dinomaly import Dinomaly as Dinomaly
    from anomnb.models.draem import Draem as Draem
    from anomnb.models.efficientad import EfficientAd as EfficientAd
    from anomnb.models.fastflow import Fastflow as Fastflow
    from anomnb.models.fre import Fre as Fre
    from anomnb.models.ganomaly import Ganomaly as Ganomaly
    from anomnb.models.padim import Padim as Padim
    from anomnb.models.patch_network import distil_teacher as distil_teacher
    from anomnb.models.patchcore import Patchcore as Patchcore
    from anomnb.models.reverse_distillation import ReverseDistillation as ReverseDistillation
    from anomnb.models.stfpm import Stfpm as Stfpm
    from anomnb.models.subspace_ad import SubspaceAd as SubspaceAd
    from anomnb.models.trained import Trained as Trained
    from anomnb.models.winclip import WinClip as WinClip

__getattr__, __dir__, __all__ = lazy_names(__name__)
