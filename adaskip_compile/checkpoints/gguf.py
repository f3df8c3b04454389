"""Turn a GGUF file into a folder that ``from_pretrained`` reads in a second.

Unpacking the blocks of a GGUF file and rebuilding its tokenizer takes up to two minutes, so it is done
once: the result is kept in the cache directory under the digest of the file, float32, as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from adaskip_passes.errors import DamagedFileError, FileError

# Part of each folder's name: a change of what is written there leaves older folders alone.
LAYOUT = 1

_MAGIC = b"GGUF"
_CHUNK = 1 << 20


def convert_gguf(file: Path, cache_dir: Path) -> Path:
    """Return the folder that holds ``file`` converted, converting it when it is not there yet.

    The folder appears whole or not at all, also when several processes ask for it at the same time.

    Raises:
        DamagedFileError: ``file`` is not a GGUF file or is cut short.
        FileError: a package that conversion needs is missing, or the architecture is not supported.
    """
    check_magic(file)
    checkpoints = cache_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    target = checkpoints / f"{file.stem}-{_digest(file)[:16]}-v{LAYOUT}"
    if target.is_dir():
        return target
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            _convert_into(file, target)
    return target


def check_magic(file: Path) -> None:
    """Raise :class:`DamagedFileError` if ``file`` does not begin as GGUF files do."""
    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise DamagedFileError(f"{file}: not a GGUF file (it does not begin with 'GGUF'); fetch it again")


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _convert_into(file: Path, target: Path) -> None:
    _say(f"Converting {file.name} (once; up to two minutes)")
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        with _explained(file), quiet_unless_watched():
            _load_dense(file).save_pretrained(partial)
            _say("Converting its tokenizer")
            _load_tokenizer(file).save_pretrained(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load_dense(file: Path) -> Any:
    """Return the model of ``file`` with plain float32 weights and no trace of quantization."""
    import transformers

    how: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep blocks packed unless told not to
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True, **how
    )
    if not hasattr(packed.config, "quantization_config"):
        return packed
    # A model that came from GGUF refuses to be saved, although its weights are plain by now.
    del packed.config.quantization_config
    with torch.device("meta"):
        dense = type(packed)(packed.config)
    dense.load_state_dict(packed.state_dict(), assign=True)
    dense.tie_weights()
    dense.generation_config = packed.generation_config
    return dense


def _load_tokenizer(file: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)


@contextlib.contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise FileError(f"{file.name}: {error}; install it with: pip install 'adaskip-compile[demo]'") from error
    except Exception as error:  # the reader raises whatever its parsing runs into
        if "accelerate" in str(error):
            raise FileError(
                f"{file.name}: converting it needs accelerate: pip install 'adaskip-compile[demo]'"
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DamagedFileError(
            f"{file}: cannot be converted ({reason}); is it whole, and its architecture supported?"
        ) from error


@contextlib.contextmanager
def quiet_unless_watched() -> Iterator[None]:
    """Keep the loaders' progress bars to terminals, where they redraw in place."""
    if sys.stderr.isatty():
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def _say(line: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"{line}\n")
