"""What a calibration takes: layers that recompute give the same gradients, and host memory is asked for first."""

import pytest
import torch
from conftest import NANO

import quant_utils as qu
from simquant import calibration, memory
from simquant.calibrated_flags import CalibratedFlags
from simquant.plans import Pair
from simquant.sites import find_sites


def test_layers_that_recompute_their_activations_give_the_same_gradients(model, windows, monkeypatch):
    sites, ids = find_sites(model), windows[:2, :64]
    with memory.checkpointing_if_short(model, 64) as short:
        assert not short
        plain = calibration.record(model, dict.fromkeys(sites, False), ids, gradients=True)
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    runs = []
    handle = model.model.layers[2].input_layernorm.register_forward_hook(lambda module, args, out: runs.append(out))
    try:
        with memory.checkpointing_if_short(model, 64) as short:
            assert short
            recomputed = calibration.record(model, dict.fromkeys(sites, False), ids, gradients=True)
    finally:
        handle.remove()
    assert len(runs) == 4  # each window forwards, and again for its gradients
    assert not any(module.training for module in model.modules())
    for site in sites:
        assert plain[site].abs().max() > 0
        torch.testing.assert_close(recomputed[site], plain[site], rtol=1e-5, atol=1e-7)


def test_host_memory_that_does_not_hold_activations_and_gradients_is_one_line(model, monkeypatch):
    windows = torch.zeros(3, 100, dtype=torch.long)
    activations = 3 * 100 * 12 * 128 * 4  # six layers' keys and values of 128 channels in fp32
    for fisher, need in ((False, activations), (True, 2 * activations)):
        plan = CalibratedFlags(str(NANO), kv_format=(Pair("nuq", "nuq"),), fisher=fisher).plan()
        settings = plan.settings(find_sites(model))
        monkeypatch.setattr(memory, "free_memory", lambda device, need=need: need)
        memory.check_host_memory(windows, settings, torch.float32)
        monkeypatch.setattr(memory, "free_memory", lambda device, need=need: need - 1)
        with pytest.raises(qu.UserError, match=r"host memory, but .* free: lower --nsamples \(now 3\) or --seqlen"):
            memory.check_host_memory(windows, settings, torch.float32)
