"""Run directories without training, for the tests of tables: small, and alike unless told otherwise."""

import json

from janus_jax import config, score

COMMIT, DECODER, VOCABULARY = "a" * 12, "d" * 12, "0" * 64
TEST = "parallel_text/de-en/1.0.0/test/de/en/12/train x"
NOUNS = ("man", "woman", "cat", "child", "bird", "horse", "boy", "girl", "cook", "king", "queen", "monk")
REFERENCES = tuple((f"the {noun} sees a small dog number {i} .",) for i, noun in enumerate(NOUNS))
OBJECTIVES = {"ar": "ar", "ar_content": "ar", "rdrop": "rdrop", "cmlm": "cmlm"}
WAYS = {
    "ar-b1": ("ar", {"beam": 1}),
    "ar-b5": ("ar", {"beam": 5}),
    "nar-T10-c3": ("nar", {"iterations": 10, "candidates": 3, "rescore": False, "early_stop": False}),
    "draft": ("draft", {"draft_top_k": 1}),
}


def config_of(name, **keys):
    """A configuration; `keys` are dotted, with __ for the dot."""
    row, _, seed = name.partition("-s")
    values = {"data": {"name": "parallel_text", "test_split": "test"}, "seed": int(seed or 0)}
    values |= {"train": {"steps": 400, "eval_every": 200, "checkpoint_every": 200}}
    values |= {"loss": {"objective": OBJECTIVES.get(row, "janus")}}
    for key, value in keys.items():
        section, _, leaf = key.rpartition("__")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return config.from_dict(values)


def hypotheses(wrong):
    """All references, but `wrong` words of them."""
    lines = [wordings[0] for wordings in REFERENCES]
    return [line.replace("small", "large") if i < wrong else line for i, line in enumerate(lines)]


def result(way, lines, step=400, commit=DECODER, **options):
    """What evaluate writes."""
    decode, named = WAYS[way]
    return {
        "split": "test",
        "decode": decode,
        "checkpoint": f"step {step}",
        "scores": score.score(lines, REFERENCES).to_dict(),
        "speed": {"sentences_per_s": 9.0},
        "passes_per_sentence": None if decode == "ar" else 4.0,
        "options": {"length_penalty": 1.0, **named, **options},
        "data": TEST,
        "vocabulary_sha256": VOCABULARY,
        "device": "cpu",
        "versions": {"commit": commit},
    }


def metrics(steps=400, commits=(COMMIT,), second=0.1):
    """Rows of a run, started anew by each further commit at half of its way."""
    rows = [event("started", 0, commits[0])]
    for step in range(50, steps + 1, 50):
        timing = {"data_s": 0.0, "step_s": 50 * second, "wait_s": 0.0, "compile_s": 0.0}
        rows.append({"step": step, "kind": "train", "metrics": {"loss": 1.0}, "timing": timing})
        if step % 200 == 0:
            bleu = {"bleu": step / 10, "bleu_ar": step / 10, "bleu_nar": step / 20}
            rows.append({"step": step, "kind": "dev", "metrics": bleu, "timing": {}})
        if step == 200:
            rows += [event("resumed", 200, commit) for commit in commits[1:]]
    return rows


def event(what, step, commit):
    told = {"event": what, "device": "cpu", "commit": commit}
    return {"step": step, "kind": "event", "metrics": told, "timing": {}}


def bench(rates, device="cpu", commit=DECODER):
    """What bench writes: {system: sentences/s at batch 1}, ten times that at 128."""
    rows = [
        {"system": system, "batch": batch, "sentences/s": rate * (10 if batch == 128 else 1)}
        for system, rate in rates.items()
        for batch in (1, 128)
    ]
    return {"device": device, "versions": {"commit": commit}, "decoding": rows}


def write(folder, name, *, ways=None, steps=400, commits=(COMMIT,), second=0.1, bench_=None, **keys):
    """A run directory in `folder`; `ways` are {way: wrong sentences, or a result}."""
    made = config_of(name, **keys)
    if ways is None:
        default = {"ar": ("ar-b1", "ar-b5"), "rdrop": ("ar-b1", "ar-b5"), "cmlm": ("nar-T10-c3",)}
        ways = dict.fromkeys(default.get(made.loss.objective, tuple(WAYS)), 3)
    run = folder / name
    (run / "eval").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(made.to_dict()))
    (run / "versions.json").write_text(json.dumps({"commit": commits[-1]}))
    (run / "vocab.json").write_text(json.dumps({"sha256": VOCABULARY}))
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in metrics(steps, commits, second))
    )
    for way, wrong in ways.items():
        lines = hypotheses(wrong if isinstance(wrong, int) else 3)
        found = result(way, lines) if isinstance(wrong, int) else wrong
        (run / "eval" / f"test.{way}.json").write_text(json.dumps(found))
        (run / "eval" / f"test.{way}.hyp").write_text("".join(f"{line}\n" for line in lines))
    if bench_:
        (run / "bench.json").write_text(json.dumps(bench_))
    return run
