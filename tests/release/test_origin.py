"""Names, licenses and bases, also of models that mean no good."""

from pathlib import Path

import pytest

from whit.errors import RecipeError
from whit.models.model import Model
from whit.release.origin import origin_of


def model(label: str, folder: Path | None = None, config: dict[str, object] | None = None, **metadata: object) -> Model:
    path = Path(label) if label.endswith(".gguf") else None
    return Model(label, config or {}, None, 0, folder, path, metadata)  # type: ignore[arg-type]


def test_a_card_beside_the_weights_says_the_license(tmp_path: Path) -> None:
    folder = tmp_path / "Some Model 1B"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# text\n")
    found = origin_of(model(str(folder), folder), base="owner/original")
    assert (found.name, found.base, found.license) == ("Some-Model-1B", "owner/original", "mit")
    assert found.label == "Some Model 1B"  # not where it lies on this machine


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    found = origin_of(model("models/tiny.gguf", **{"general.license": "apache-2.0"}))
    assert (found.name, found.base, found.license) == ("tiny", "", "apache-2.0")


def test_a_hub_id_is_the_base_and_the_built_in_model_has_one() -> None:
    assert origin_of(model("owner/Name-7B")).base == "owner/Name-7B"
    assert origin_of(model("owner/Name-7B")).name == "Name-7B"
    assert origin_of(model("smollm2-135m")).base == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "front",
    ["license: [a, b]", "license: {", "!!python/object/apply:os.system ['x']", "- a", "license: " + "[" * 5000, ""],
)
def test_a_card_that_cannot_be_read_says_nothing(tmp_path: Path, front: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert origin_of(model(str(tmp_path), tmp_path), name="x").license == ""


@pytest.mark.parametrize("name", ["../../evil", "a/b\n| c", "`x`", "ä", " . "])
def test_a_name_is_letters_that_any_disk_takes_or_refused(name: str) -> None:
    try:
        found = origin_of(model("x"), name=name).name
    except RecipeError as error:
        assert "--name" in str(error)
    else:
        assert found
        assert set(found) <= set("abcdefghijklmnopqrstuvwxyz.-_+")
        assert not found.startswith(".")


def test_a_base_that_is_no_hub_id_is_refused() -> None:
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        origin_of(model("x"), base="https://example.com/a/b")
