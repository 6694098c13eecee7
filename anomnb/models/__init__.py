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
    from anomnb.models.dfkde import Dfkde as Dfkde
    from anomnb.models.dfm import Dfm as Dfm
    from anomnb.models.padim import Padim as Padim
    from anomnb.models.patchcore import Patchcore as Patchcore
    from anomnb.models.subspace_ad import SubspaceAd as SubspaceAd
    from anomnb.models.trained import Trained as Trained

__getattr__, __dir__, __all__ = lazy_names(__name__)
