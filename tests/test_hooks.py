"""The hooks: at the right places, and gone afterwards."""

import pytest
import torch

import quant_utils as qu

SPECS = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 2)}


def simulated(model):
    return qu.simulate_quantization(model, qu.dynamic_quantizers(model, SPECS))


def hook_count(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_sites_are_the_named_projections_of_every_layer_in_order(model):
    expected = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(6) for kind in "kv"]
    assert list(qu.find_sites(model, SPECS)) == expected
    assert list(qu.find_sites(model, {"v_proj": SPECS["v_proj"]})) == expected[1::2]
    assert qu.find_sites(model, {}) == {}


@torch.inference_mode()
def test_each_projection_gives_the_quantized_value_of_its_own_output(model, windows):
    captured = {}
    attention = model.model.layers[0].self_attn  # its input is the same with and without hooks

    def capture(name):
        return lambda module, args, out: captured.__setitem__(name, (args[0], out))

    with simulated(model):
        hooks = [getattr(attention, name).register_forward_hook(capture(name)) for name in ("q_proj", *SPECS)]
        model(windows[:2])
    for hook in hooks:
        hook.remove()
    for name, (hidden, given) in captured.items():
        plain = torch.nn.functional.linear(hidden, getattr(attention, name).weight)
        if name in SPECS:
            assert not torch.equal(plain, given)
            plain = qu.fake_quantize(plain, qu.Quantizer(SPECS[name], qu.data_free_codebook(SPECS[name])))
        assert torch.equal(plain, given)


@torch.inference_mode()
def test_hooks_are_gone_and_logits_as_before_after_the_block(model, windows):
    before = model(windows[:1]).logits
    with simulated(model):
        assert hook_count(model) == 12
        assert not torch.equal(model(windows[:1]).logits, before)
    assert hook_count(model) == 0
    assert torch.equal(model(windows[:1]).logits, before)


@torch.inference_mode()
def test_hooks_are_gone_after_an_exception_inside_the_block(model, windows):
    before = model(windows[:1]).logits
    with pytest.raises(RuntimeError, match="inside"), simulated(model):
        raise RuntimeError("inside")
    assert hook_count(model) == 0
    assert torch.equal(model(windows[:1]).logits, before)


def test_hooks_are_gone_if_attaching_fails_half_way(model):
    def hooks():
        for name, site in qu.find_sites(model, SPECS).items():
            if name.endswith("layers.3.self_attn.k_proj"):
                raise RuntimeError("half way")
            yield site.module, lambda module, args, out: out

    with pytest.raises(RuntimeError, match="half way"), qu.hooked(hooks()):
        pass
    assert hook_count(model) == 0


def test_no_specs_is_the_model_itself(model, windows):
    with torch.inference_mode():
        before = model(windows[:1]).logits
        with qu.simulate_quantization(model, {}):
            assert hook_count(model) == 0
            assert torch.equal(model(windows[:1]).logits, before)
