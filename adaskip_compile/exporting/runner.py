"""Generate greedily from programs that adaskip-compile exported. Needs PyTorch and nothing else.

This file stands as generate.py in every folder of exported programs, and works by itself:

    python generate.py --ids 504 3575 282 4649 314 --new-tokens 64

prints the ids that follow. From Python, ExportedModel(folder).generate(ids, 64) does the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Program = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ExportedModel:
    """The programs of a folder, with one copy of the weights and one cache: one text (or batch) at a time.

    prefill and decode are called with ids i64[batch, tokens] and their positions in the text i64[tokens], and
    return the logits of the last token [batch, 1, vocabulary]. decode takes one token, prefill as many as the manifest says.
    With compiled=True they are those of the AOTInductor package. manifest is what the folder says of itself.
    """

    def __init__(self, folder: str | Path, *, compiled: bool = False) -> None:
        self.manifest = read_manifest(folder)
        self._tensors: dict[str, torch.Tensor] = {}
        self.prefill, self.decode = (self._load(Path(folder), name) for name in ("prefill", "decode"))
        if compiled:
            self.prefill, self.decode = (self._load_compiled(Path(folder), name) for name in ("prefill", "decode"))

    def _load(self, folder: Path, name: str) -> Program:
        module = torch.export.load(folder / self.manifest["programs"][name]["file"]).module()
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, self._tensors.setdefault(path, tensor))
        return module

    def _load_compiled(self, folder: Path, name: str) -> Program:
        from torch._inductor.package import load_package

        if self.manifest["aot"] is None:
            raise ValueError(f"{folder} holds no AOTInductor package: it was exported without one")
        program = load_package(str(folder / self.manifest["aot"]["file"]), name)
        constants = {path: self._tensors[path].detach() for path in program.get_constant_fqns()}
        program.load_constants(constants, check_full_update=True, user_managed=True)  # reads them where they are
        return program

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, new_tokens: int, stop: Sequence[int] = ()) -> torch.Tensor:
        """Return the most probable ids i64[batch, up to new_tokens] that follow ids i64[batch, tokens].

        The rows are texts of equal length. Ends early once every row has had an id of stop. ValueError where the programs
        have no room for that many rows or tokens, or an id is of no token.
        """
        length = ids.shape[1]
        if ids.shape[0] != self.manifest["batch"] or not 0 < length <= self.manifest["max_length"] - new_tokens:
            raise ValueError(
                f"{ids.shape[0]} rows of {length} tokens and {new_tokens} new ones do not fit programs for "
                f"{self.manifest['batch']} rows of {self.manifest['max_length']} tokens in all"
            )
        tokens = self.manifest.get("vocabulary", sys.maxsize)  # older folders do not say
        strange = ids[(ids < 0) | (ids >= tokens)]
        if strange.numel():
            raise ValueError(f"{strange[0]} is no id of a token: this model's are 0 to {tokens - 1}")
        ids = ids.to(self.manifest["device"])
        ends = torch.tensor(stop, dtype=ids.dtype, device=ids.device)
        positions = torch.arange(length, device=ids.device)
        logits = self._read(ids, positions)
        chosen = [logits[:, -1:].argmax(-1)]
        ended = torch.isin(chosen[0], ends)
        while len(chosen) < new_tokens and not ended.all():
            logits = self.decode(chosen[-1], positions[-1:] + len(chosen))
            chosen.append(logits[:, -1:].argmax(-1))
            ended |= torch.isin(chosen[-1], ends)
        return torch.cat(chosen, dim=1)

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return the logits after a prompt; decode goes through one that is too short for prefill."""
        if ids.shape[1] >= self.manifest["programs"]["prefill"]["tokens"]["from"]:
            return self.prefill(ids, positions)
        *before, last = zip(ids.split(1, dim=1), positions.split(1), strict=True)
        for token, position in before:
            self.decode(token.contiguous(), position)
        return self.decode(last[0].contiguous(), last[1])  # a compiled program takes its strides for granted


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return what the folder says of its programs; ValueError where a file is missing or cut short."""
    manifest = json.loads((Path(folder) / "manifest.json").read_text("utf-8"))["payload"]
    for entry in [*manifest["programs"].values(), *filter(None, [manifest["aot"]])]:
        path = Path(folder) / entry["file"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            raise ValueError(f"{path} is missing or cut short: the manifest says {entry['bytes']} bytes")
    return manifest


def main() -> None:
    """Generate from the command line, and print the new ids."""
    parser = argparse.ArgumentParser(description="Generate greedily from exported programs.")
    parser.add_argument("--ids", type=int, nargs="+", required=True, help="the prompt, as token ids")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--compiled", action="store_true", help="use the AOTInductor package")
    parser.add_argument("--ignore-end", action="store_true", help="go on after a token that ends the text")
    arguments = parser.parse_args()
    model = ExportedModel(Path(__file__).resolve().parent, compiled=arguments.compiled)
    rows = torch.tensor([arguments.ids] * model.manifest["batch"])
    stop = [] if arguments.ignore_end else model.manifest["end_tokens"]
    try:
        found = model.generate(rows, arguments.new_tokens, stop)
    except ValueError as error:
        parser.error(str(error))
    sys.stdout.write(" ".join(map(str, found[0].tolist())) + "\n")


if __name__ == "__main__":
    main()
