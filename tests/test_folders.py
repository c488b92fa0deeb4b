"""Folders in Hugging Face format (folders.py): the ids and logits of transformers, or a refusal by name."""
import pytest
import torch

import convert
from exactgpt.config import UserError
from exactgpt.open_model import open_model, open_weights
from tests import folders
from tests.common import ROOT

ACCEPTED = [name for name, case in folders.FOLDERS.items() if case.outcome == folders.EQUAL]
REFUSED = [name for name in folders.FOLDERS if name not in ACCEPTED]


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_folder_gives_the_ids_and_logits_of_transformers(name, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = folders.make(name, tmp_path / "hf")
    capsys.readouterr()      # transformers shows its progress
    opened = open_model(folder).with_tokenizer()
    told = "has no tokenizer of its own; with 50,257 entries it gets GPT-2's\n"
    is_bare = not folders.FOLDERS[name].options.get("forms", "both")
    assert capsys.readouterr().err == (f"{folder} {told}" if is_bare else "")
    reference = folder
    if is_bare:
        folders.write_folder(reference := tmp_path / "whole", gpt2=True)
    theirs, texts = AutoTokenizer.from_pretrained(reference), convert.sample_texts(opened.tokenizer)
    assert len(texts) > 200
    for text, ids in zip(texts, theirs(texts)["input_ids"]):
        assert opened.tokenizer.encode(text) == ids, repr(text)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(opened.model.eval()(ids), model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_folder_is_refused_by_name_and_nothing_is_written(name, tmp_path):
    folder, words = folders.make(name, tmp_path / "hf"), folders.FOLDERS[name].outcome
    actions = [lambda: open_model(folder).with_tokenizer()]
    if "tokenizer for its" not in words:      # a model that is only short of a tokenizer can still be converted
        (tmp_path / "own").mkdir()
        folders.vocabulary()[0].save(tmp_path / "own")
        actions += [lambda: convert.main(["--checkpoint", str(folder), "--out", str(tmp_path / "new")]),
                    lambda: convert.main(["--checkpoint", str(folder), "--out", str(tmp_path / "new.pt")]),
                    lambda: open_weights(str(folder), folders.vocabulary()[0], ""),
                    lambda: open_model(folder, tokenizer=tmp_path / "own")]      # no --tokenizer overrides it
    for action in actions:
        with pytest.raises(UserError) as caught:
            action()
        message = str(caught.value)
        assert words in message and str(folder) in message and len(message.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "own"}
    if "lacks" not in words:
        assert open_model(folder).tokenizer is None      # token ids still work


def test_the_table_in_the_docs_is_this_one():
    assert f"\n\n{folders.table()}\n\n" in (ROOT / "docs" / "model.md").read_text(encoding="utf-8"), folders.table()
