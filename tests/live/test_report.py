import pytest

from tiny import tiny_model
from whit.live.quantize import quantize
from whit.live.report import Left, Replaced, Report

REPORT = Report(
    (
        Replaced("a", "QLinear", "int8:f32", "int8", 600),
        Replaced("b", "QLinear", "int8:f32", "int8", 200),
        Replaced("c", "QEmbedding", "nf4-g16", "", 100, "groups of 16: 64 do not divide 48 weights"),
        Replaced("d", "QLayerNorm", "", "int8", 0),
    ),
    (Left("e", "Router", 60, "a router"), Left("f", "Router", 30, "a router"), Left("g", "Odd", 10, "excluded")),
    1000,
)


def test_the_share_is_that_of_the_parameters() -> None:
    assert REPORT.share == 0.9
    assert Report((), (), 0).share == 0


def test_printed_it_adds_up_what_is_alike() -> None:
    lines = str(REPORT).splitlines()
    assert lines[0].startswith("90.0%")
    assert lines[1].split()[:2] == ["2", "QLinear"]
    assert "800 parameters" in lines[1]
    assert lines[2].endswith("groups of 16: 64 do not divide 48 weights")
    assert "activations float" in lines[2]
    assert "weights float" in lines[3]
    assert lines[4] == "left in float:"
    assert lines[5].split()[:3] == ["2", "Router", "90"]
    assert lines[6].endswith("excluded")
    assert len(lines) == 7


def test_with_nothing_left_it_does_not_speak_of_it() -> None:
    assert "left in float" not in str(Report(REPORT.replaced, (), 900))


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_every_matrix_is_counted_once(name: str) -> None:
    model = tiny_model(name)
    n = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    report = quantize(model, "qint8", exclude="*q_proj")
    assert (
        sum(each.n_parameters for each in report.replaced)
        + sum(each.n_parameters for each in report.left if "Norm" not in each.kind)
        == n
    )


def test_tied_layers_are_both_there() -> None:
    report = quantize(tiny_model("gpt2"), "qint8")
    assert {"lm_head", "transformer.wte"} <= {each.name for each in report.replaced}
