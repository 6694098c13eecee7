"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.processing.conformal import benjamini_hochberg as benjamini_hochberg
    from anomnb.processing.conformal import images_needed as images_needed
    from anomnb.processing.conformal import lowest_rate as lowest_rate
    from anomnb.processing.conformal import p_values as p_values
    from anomnb.processing.decision import DecisionRule as DecisionRule
    from anomnb.processing.decision import decide as decide
    from anomnb.processing.discovery import discover as discover
    from anomnb.processing.pre import Pre as Pre
    from anomnb.processing.thresholds import conformal_rule as conformal_rule
    from anomnb.processing.thresholds import cost_rule as cost_rule
    from anomnb.processing.thresholds import explain_rule as explain_rule
    from anomnb.processing.thresholds import f1_rule as f1_rule
    from anomnb.processing.thresholds import manual_rule as manual_rule
    from anomnb.processing.thresholds import quantile_rule as quantile_rule

__getattr__, __dir__, __all__ = lazy_names(__name__)
