"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.export.bundle import load as load
    from anomnb.export.bundle import save as save
    from anomnb.export.inferencer import Inferencer as Inferencer
    from anomnb.export.onnx import to_onnx as to_onnx
    from anomnb.export.openvino import to_openvino as to_openvino
    from anomnb.export.parity import export_model as export_model
    from anomnb.export.parity import verify as verify

__getattr__, __dir__, __all__ = lazy_names(__name__)
