"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.visualizers.explain import explain_threshold as explain_threshold
    from anomnb.visualizers.heatmap import HeatmapExplorer as HeatmapExplorer
    from anomnb.visualizers.heatmap import explore_heatmap as explore_heatmap
    from anomnb.visualizers.image import ImageVisualizer as ImageVisualizer
    from anomnb.visualizers.image import show as show
    from anomnb.visualizers.metrics import MetricsVisualizer as MetricsVisualizer
    from anomnb.visualizers.threshold import ThresholdExplorer as ThresholdExplorer
    from anomnb.visualizers.threshold import explore_threshold as explore_threshold

__getattr__, __dir__, __all__ = lazy_names(__name__)
