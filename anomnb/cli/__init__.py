"""Names of this room, imported when they are first touched"""
from typing import TYPE_CHECKING

from anomnb.core.names import lazy_names

if TYPE_CHECKING:
    from anomnb.cli.benchmark import anomnb_benchmark as anomnb_benchmark
    from anomnb.cli.info import anomnb_info as anomnb_info
    from anomnb.cli.train import anomnb_train as anomnb_train

__getattr__, __dir__, __all__ = lazy_names(__name__)
