"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.engine.contract import check_contract as check_contract
    from anomnb.engine.engine import Engine as Engine

__getattr__, __dir__, __all__ = lazy_names(__name__)
