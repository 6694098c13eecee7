"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.processing.decision import DecisionRule as DecisionRule
    from anomnb.processing.decision import decide as decide
    from anomnb.processing.decision import max_good as max_good
    from anomnb.processing.pre import Pre as Pre

__getattr__, __dir__, __all__ = lazy_names(__name__)
