"""Every registered detector is held to the same contract: `anomnb.engine.contract`, check by check."""
import gc

import pytest

from anomnb.core.names import MODELS, list_models, register_model
from anomnb.engine.contract import CHECKS, Contract, ContractBroken, check_memory
from anomnb.models.fre import Fre

pytestmark = pytest.mark.filterwarnings("ignore:.* random weights")


@pytest.fixture(scope="module", params=list_models())
def contract(request):
    c = Contract(request.param)
    yield c
    c.close()
    c.__dict__.clear()
    gc.collect()


@pytest.mark.parametrize("check", CHECKS)
def test_contract(contract, check):
    CHECKS[check](contract)


class Hoarder(Fre):
    "Keeps every map"
    kept = []

    def forward(self, images):
        raw = super().forward(images)
        self.kept.append(raw.map.clone())
        return raw


def test_a_model_that_keeps_its_maps_is_found_out():
    register_model("hoarder", Hoarder, family="none", tiny=dict(backbone="tf_efficientnet_lite0", image_size=256, latent=4), fit=dict(max_epochs=1))
    c = Contract("hoarder")
    try:
        with pytest.raises(ContractBroken, match="keeps something of each"): check_memory(c)
    finally:
        c.close(), Hoarder.kept.clear()
        del MODELS["hoarder"]


def test_the_rows_are_whole():
    for name, row in MODELS.items():
        assert row["family"] and row["paper"] and set(row) == {"cls", "family", "paper", "tiny", "fit", "needs", "measured"}, name
