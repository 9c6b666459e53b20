"""The other engines, as a server: JSON lines, requests on standard input, answers on standard output.

Runs in an environment with torch, transformers and ctranslate2 (`peers.sh` makes it) and imports nothing of
ours.  What libraries print goes to standard error.

  {"do": "load", "model": FOLDER, "threads": 2, "device": "cpu"}
      -> {"systems": {name: {"engine", "precision", "beam"}}, "versions": {...}, "absent": {name: why}}
  {"do": "run", "system": NAME, "source": [[ids]], "length": 24, "calls": 3}
      -> {"seconds": [of each call], "tokens": [[ids]]}    tokens of the last call, without the start symbol
  {"do": "stop"}

FOLDER holds a BART (config.json, model.safetensors); it gets a tokenizer, and the converted models of
CTranslate2.  A request that fails is answered by {"error": "..."}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

GREEDY, BEAM = 1, 5
Decode = Callable[[list[list[int]], int], list[list[int]]]


class Engines:
    """Loaded engines by name."""

    def __init__(self) -> None:
        """Nothing loaded."""
        self.decode: dict[str, Decode] = {}

    def load(self, model: str, threads: int, device: str) -> dict[str, Any]:
        """Loads what this machine can run; what it cannot is told, with the reason."""
        described, absent = {}, {}
        for engine, precision in _variants(device):
            name = f"{engine} {precision}"
            maker = _torch if engine == "PyTorch" else _ctranslate2
            try:
                decoders = maker(pathlib.Path(model), precision, threads, device)
            except Exception as error:  # an engine's own business; the others go on
                absent[name] = f"{type(error).__name__}: {error}"
                continue
            for beam in (GREEDY, BEAM):
                system = f"{name}, {'greedy' if beam == GREEDY else f'beam {beam}'}"
                self.decode[system] = decoders(beam)
                described[system] = {"engine": engine, "precision": precision, "beam": beam}
        there = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
        packages = ("torch", "transformers", "ctranslate2", "numpy")
        versions = {package: there[package] for package in packages if package in there}
        return {"systems": described, "absent": absent, "versions": versions}

    def run(self, system: str, source: list[list[int]], length: int, calls: int) -> dict[str, Any]:
        """Decodes `calls` times."""
        seconds, tokens = [], []
        for _ in range(calls):
            start = time.perf_counter()
            tokens = self.decode[system](source, length)
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "tokens": tokens}


def _variants(device: str) -> list[tuple[str, str]]:
    precisions = ("float32", "int8") if device == "cpu" else ("bfloat16", "int8_bfloat16")
    return [("PyTorch", precisions[0]), *(("CTranslate2", p) for p in precisions)]


def _torch(folder: pathlib.Path, precision: str, threads: int, device: str) -> Callable[[int], Decode]:
    """Hugging Face `generate` as a user gets it: cached, SDPA attention, no compilation."""
    import torch
    from transformers import BartForConditionalGeneration

    torch.set_num_threads(threads)
    model = BartForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, precision))
    model = model.to(device).eval()

    def with_beam(beam: int) -> Decode:
        def decode(source: list[list[int]], length: int) -> list[list[int]]:
            ids = torch.tensor(source, device=device)
            with torch.inference_mode():
                found = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    num_beams=beam,
                    do_sample=False,
                    min_new_tokens=length,
                    max_new_tokens=length,
                    forced_eos_token_id=None,
                    forced_bos_token_id=None,
                    no_repeat_ngram_size=0,
                    **({"early_stopping": True} if beam > 1 else {}),
                )
            return found[:, 1:].tolist()

        return decode

    return with_beam


def _ctranslate2(folder: pathlib.Path, precision: str, threads: int, device: str) -> Callable[[int], Decode]:
    import ctranslate2

    converted = folder / "ctranslate2"
    if not converted.exists():
        _write_tokenizer(folder)
        ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted))
    engine = ctranslate2.Translator(
        str(converted), device=device, compute_type=precision, inter_threads=1, intra_threads=threads
    )

    def with_beam(beam: int) -> Decode:
        def decode(source: list[list[int]], length: int) -> list[list[int]]:
            found = engine.translate_batch(
                [[f"w{i}" for i in row] for row in source],
                beam_size=beam,
                min_decoding_length=length,
                max_decoding_length=length,
                max_batch_size=0,  # the batch as it is given
            )
            return [[int(token[1:]) for token in result.hypotheses[0]] for result in found]

        return decode

    return with_beam


def _write_tokenizer(folder: pathlib.Path) -> None:
    """A tokenizer whose symbol i is called w{i}: CTranslate2's converter wants one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    words = {f"w{i}": i for i in range(config["vocab_size"])}
    special = {name: f"w{config[f'{name}_id']}" for name in ("pad_token", "bos_token", "eos_token")}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", **special).save_pretrained(folder)


def main() -> int:
    """Answers requests until told to stop, or until nobody asks."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    engines = Engines()
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        if kind == "stop":
            break
        try:
            answer = engines.load(**request) if kind == "load" else engines.run(**request)
        except Exception as error:  # told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
