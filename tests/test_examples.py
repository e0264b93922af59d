"""The examples in docstrings run as they stand, on a tiny model. `MADE` lists what an example may use without making it."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shutil

import pytest
from tiny import labelled_rows, make_card, make_readout
from training import make_trainer

import interp_rlhf
from interp_rlhf.registry import Registry

# Files in the folder in which an example runs: `tiny/` (a saved chat model), `warmth.yaml` (a reward card that passed its gate),
# `witness.yaml` (a monitor, fitted at another layer), and `contrast.jsonl` (labelled answers). Variables that an example may use:
MADE = {
    "model": "a tiny chat model (Llama, three layers)",
    "tokenizer": "its tokenizer, with a chat template",
    "readout": "a probe's readout at layer 1 of that model",
    "examples": "labelled answers as `load_examples` gives them",
    "dpo_trainer": "a DPO trainer on that model, not yet trained",
    "sft_trainer": "an SFT trainer",
    "grpo_trainer": "a GRPO trainer with one reward function of plain Python",
}


def modules():
    yield interp_rlhf
    for found in pkgutil.walk_packages(interp_rlhf.__path__, "interp_rlhf."):
        if not found.name.endswith("__main__"):
            yield importlib.import_module(found.name)


def doctests():
    finder = doctest.DocTestFinder(exclude_empty=True)
    for module in modules():
        for test in finder.find(module, module.__name__):
            if test.examples:
                yield pytest.param(test, id=test.name.removeprefix("interp_rlhf."))


def registries():
    every = [value for module in modules() for value in vars(module).values() if isinstance(value, Registry)]
    return {id(registry): registry for registry in every}.values()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model_folder, tokenizer):
    import json

    from transformers import AutoModelForCausalLM

    place = tmp_path_factory.mktemp("examples")
    shutil.copytree(model_folder(), place / "tiny")
    model = AutoModelForCausalLM.from_pretrained(place / "tiny")
    make_card(place, model, tokenizer)
    make_card(place, model, tokenizer, role="monitor", name="witness", layer=0)
    (place / "contrast.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled_rows(12)))
    return place


def make(name, load, tokenizer, place):
    from interp_rlhf import load_examples

    if name == "model":
        return load()
    if name == "tokenizer":
        return tokenizer
    if name == "readout":
        return make_readout(load())
    if name == "examples":
        return load_examples(place / "contrast.jsonl")
    return make_trainer(name.removesuffix("_trainer").upper(), load(), tokenizer, place / "runs" / name)


@pytest.mark.parametrize("test", doctests())
def test_the_example_of_a_docstring_runs(test, folder, load, tokenizer, monkeypatch, tmp_path):
    place = tmp_path / "work"
    shutil.copytree(folder, place)
    monkeypatch.chdir(place)
    for registry in registries():  # an example may register something: the other tests must not see it
        monkeypatch.setattr(registry, "_entries", dict(registry))
    said = "".join(example.source for example in test.examples)
    test.globs.update({name: make(name, load, tokenizer, place) for name in MADE if re.search(rf"\b{name}\b", said)})
    problems: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=problems.append, clear_globs=False)
    assert not problems, "".join(problems)
