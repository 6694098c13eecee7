"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.core.errors import AnomnbError as AnomnbError
    from anomnb.core.errors import AnomnbFileError as AnomnbFileError
    from anomnb.core.names import create_model as create_model
    from anomnb.core.names import late as late
    from anomnb.core.names import list_models as list_models
    from anomnb.core.names import register_model as register_model
    from anomnb.core.record import RunRecord as RunRecord
    from anomnb.core.seeds import rng as rng
    from anomnb.core.seeds import seed_everything as seed_everything
    from anomnb.core.types import Batch as Batch
    from anomnb.core.types import Defect as Defect
    from anomnb.core.types import Prediction as Prediction
    from anomnb.core.types import Predictions as Predictions
    from anomnb.core.types import Raw as Raw
    from anomnb.core.types import Region as Region

__getattr__, __dir__, __all__ = lazy_names(__name__)
