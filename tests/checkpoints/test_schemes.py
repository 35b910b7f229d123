import pytest

from whit.checkpoints.schemes import gptq_layout, schemes
from whit.errors import ModelError


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' are not read"),
        ({"quant_method": "awq", "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "compressed-tensors"}, "no config_groups"),
        ({"quant_method": "whit"}, "no `grids`"),
        ({}, "None are not read"),
    ],
)
def test_what_is_not_read_is_said(config: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        schemes(config)


@pytest.mark.parametrize(
    ("config", "symmetric"),
    [
        ({}, True),
        ({"sym": True}, True),
        ({"sym": False}, False),
        ({"sym": True, "dynamic": {"a": {"sym": False}}}, False),
    ],
)
def test_a_constant_tells_the_version_of_symmetric_gptq_alone(config: dict, symmetric: bool) -> None:
    assert gptq_layout(config).symmetric is symmetric
