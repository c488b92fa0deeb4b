"""Folders in Hugging Face format as people have them, and what must become of each: equal ids, or a refusal by name.

`FOLDERS` is also the table of docs/model.md. transformers and tokenizers write the folders; the models are tiny.
"""
import functools
import json
from pathlib import Path
from types import SimpleNamespace

EQUAL = "equal ids and logits"
CORPUS = ["the cat and the hat; the d\u00e9j\u00e0 vu\n\n  of the year 2024 \u6771\u4eac don't\t!", "in an other"] * 3
SPECIAL = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


@functools.cache
def vocabulary(gpt2=False):
    """Return (Tokenizer, the text of its tokenizer.json as transformers writes it, its vocab.json, its merges.txt)."""
    from transformers import GPT2Tokenizer

    from exactgpt.tokenizer import gpt2_tokenizer, train_tokenizer
    tokenizer = gpt2_tokenizer() if gpt2 else train_tokenizer(CORPUS, 300)
    theirs = GPT2Tokenizer(vocab=json.loads(tokenizer.encoder_json()), merges=tokenizer.merges)
    return tokenizer, theirs.backend_tokenizer.to_str(), tokenizer.encoder_json(), tokenizer.vocab_bpe()


def write_folder(folder, rows=0, gpt2=False, forms=("tokenizer.json", "merges.txt"), shards=0, whole=None, **files):
    """Write a model and its tokenizer.

    rows: of the embedding, 0: as many as there are tokens. forms: of the vocabulary. shards: the largest size in bytes.
    whole: {part: value} to change in tokenizer.json, "model.NAME" in its model. files: {name, __ for its dot: JSON}.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    tokenizer, text, ids, merges = vocabulary(gpt2)
    torch.manual_seed(0)
    config = dict(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=rows or tokenizer.n_vocab,
                  bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot, initializer_range=0.5)
    model = GPT2LMHeadModel(GPT2Config(**config, **files.pop("config", {})))
    model.save_pretrained(folder, **(dict(max_shard_size=shards) if shards else {}))
    if "tokenizer.json" in forms:
        stored = json.loads(text)
        for name, value in (whole or {}).items():
            part = stored["model"] if name.startswith("model.") else stored
            part[name.removeprefix("model.")] = value(part[name.removeprefix("model.")]) if callable(value) else value
        (folder / "tokenizer.json").write_text(json.dumps(stored))
    if "merges.txt" in forms:
        (folder / "merges.txt").write_text(merges, encoding="utf-8")
        (folder / "vocab.json").write_text(ids)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(value if isinstance(value, str) else json.dumps(value))


def added(*texts, first=300):
    """Return the entries of tokenizer.json's list of added tokens, <|endoftext|> first."""
    return [dict(SPECIAL, content=text, id=first - 1 + i) for i, text in enumerate(["<|endoftext|>", *texts])]


def split_bin(folder):
    """Write the weights as pytorch_model-0000N-of-00002.bin with an index instead of a safetensors file."""
    import torch
    from safetensors.torch import load_file
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def lose_a_shard(folder):
    """Delete the first of the files that hold the weights."""
    min(folder.glob("model-*.safetensors")).unlink()


def save_again(folder):
    """Let transformers read the tokenizer from merges.txt and vocab.json and save it in its newest form."""
    from transformers import AutoTokenizer
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def write_vocabulary_of_bytes(folder):
    """Replace merges.txt and vocab.json by those of a vocabulary without merges."""
    from exactgpt.tokenizer import Tokenizer
    tokenizer = Tokenizer([], "")
    (folder / "merges.txt").write_text(tokenizer.vocab_bpe())
    (folder / "vocab.json").write_text(tokenizer.encoder_json())


def old_form(model):
    """Return the model of a tokenizer.json as GPT-2's on the hub has it: without its type, the merges as texts."""
    return {**{k: model[k] for k in model if k != "type"}, "merges": [" ".join(merge) for merge in model["merges"]]}


def shifted(ids):
    """Return the ids of a vocabulary that begins with <|endoftext|>."""
    return {token: (i + 1) % len(ids) for token, i in ids.items()}


def case(outcome, after=None, **options):
    """Return how a folder is made, and what becomes of it: EQUAL, or words of the refusal."""
    return SimpleNamespace(outcome=outcome, after=after, options=options)


JSON, MERGES = ("tokenizer.json",), ("merges.txt",)
LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
BOS = dict(type="TemplateProcessing", single=[{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                                              {"Sequence": {"id": "A", "type_id": 0}}],
           pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
           special_tokens={"<|endoftext|>": dict(id="<|endoftext|>", ids=[299], tokens=["<|endoftext|>"])})
SHORT = dict(truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0), padding=dict(
    strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None, pad_id=3, pad_type_id=0, pad_token="!"))

FOLDERS = {
    "plain GPT-2, both forms of the vocabulary": case(EQUAL),
    "tokenizer.json alone": case(EQUAL, forms=JSON),
    "merges.txt and vocab.json alone": case(EQUAL, forms=MERGES),
    "saved again by transformers 5": case(EQUAL, save_again, forms=MERGES),
    "tokenizer.json of 2020, merges as texts": case(EQUAL, forms=JSON, whole=dict(model=old_form, pre_tokenizer=dict(
        type="ByteLevel", add_prefix_space=False, trim_offsets=True))),
    "PreTrainedTokenizerFast": case(EQUAL, forms=JSON, tokenizer_config__json=dict(
        tokenizer_class="PreTrainedTokenizerFast", pad_token="<|endoftext|>", chat_template="{{ messages }}")),
    "truncation and padding in tokenizer.json": case(EQUAL, forms=JSON, whole=SHORT),
    "more rows than tokens": case(EQUAL, rows=310),
    "an output layer of its own": case(EQUAL, config=dict(tie_word_embeddings=False)),
    "50,304 rows with GPT-2's tokenizer": case(EQUAL, gpt2=True, rows=50304, forms=JSON),
    "50,257 rows without a tokenizer": case(EQUAL, gpt2=True, forms=()),
    "safetensors in several files": case(EQUAL, shards=4000),
    "pytorch_model.bin in several files": case(EQUAL, split_bin),
    "a file of several missing": case("lacks model-00001-of-", lose_a_shard, shards=4000),
    "50,300 rows without a tokenizer": case("has no tokenizer for its 50,300 tokens", rows=50300, forms=()),
    "trained rows for <|user|> and <|assistant|>": case(
        "it has the added tokens <|user|>, <|assistant|>", rows=302, forms=JSON,
        whole=dict(added_tokens=added("<|user|>", "<|assistant|>"))),
    "[PAD] in added_tokens.json": case("it has the added token [PAD]", rows=301, added_tokens__json={"[PAD]": 300}),
    "[PAD] in tokenizer_config.json": case("it has the added token [PAD]", rows=301, tokenizer_config__json=dict(
        pad_token=dict(SPECIAL, content="[PAD]", __type="AddedToken"))),
    "[PAD] in special_tokens_map.json": case("it has the added token [PAD]", rows=301, special_tokens_map__json=dict(
        additional_special_tokens=["[PAD]"])),
    "a word as an added token": case("it has the added token the", tokenizer_config__json=dict(
        added_tokens_decoder={"259": dict(SPECIAL, content="the")})),
    "a Lowercase normalizer": case("it has a Lowercase normalizer", whole=dict(normalizer=dict(type="Lowercase"))),
    "a sequence of normalizers": case("it has a NFC + Lowercase normalizer", whole=dict(normalizer=dict(
        type="Sequence", normalizers=[dict(type="NFC"), dict(type="Lowercase")]))),
    "single digits": case("it splits texts by Digits + ByteLevel, not as GPT-2 does", whole=dict(pre_tokenizer=dict(
        type="Sequence", pretokenizers=[dict(type="Digits", individual_digits=True), LEVEL]))),
    "no split into words": case("it splits texts by ByteLevel, not as GPT-2 does", whole=dict(
        pre_tokenizer=dict(LEVEL, use_regex=False))),
    "add_prefix_space in tokenizer.json": case("it adds a space before a text", whole=dict(
        pre_tokenizer=dict(LEVEL, add_prefix_space=True))),
    "add_prefix_space in tokenizer_config.json": case(
        "its tokenizer_config.json sets add_prefix_space", tokenizer_config__json=dict(add_prefix_space=True)),
    "add_bos_token in tokenizer_config.json": case(
        "its tokenizer_config.json sets add_bos_token", forms=MERGES, tokenizer_config__json=dict(add_bos_token=True)),
    "a template that adds a token": case("it adds tokens by TemplateProcessing", whole=dict(post_processor=BOS)),
    "another decoder": case("it decodes by Metaspace", whole=dict(decoder=dict(
        type="Metaspace", replacement="\u2581", prepend_scheme="always"))),
    "ignore_merges": case("its model sets ignore_merges", whole={"model.ignore_merges": True}),
    "dropout": case("its model sets dropout", whole={"model.dropout": 0.1}),
    "a unigram model": case("its model is Unigram, not byte-pair encoding", forms=JSON, whole=dict(
        model=dict(type="Unigram", unk_id=0, vocab=[["<unk>", 0.0]]))),
    "<|endoftext|> first": case("has other ids than 256 bytes, merges and <|endoftext|>", forms=JSON,
                                whole={"model.vocab": shifted, "added_tokens": added(first=1)}),
    "tokens that no merge makes": case("has other ids than 256 bytes", rows=301, whole={
        "model.vocab": lambda ids: {**ids, "catcat": 300}}),
    "merges in another order": case("is not a list of byte-pair merges", whole={
        "model.merges": lambda merges: merges[::-1]}),
    "two vocabularies": case("its tokenizer.json and merges.txt disagree", write_vocabulary_of_bytes),
    "RobertaTokenizer": case("its class is RobertaTokenizer", tokenizer_config__json=dict(
        tokenizer_class="RobertaTokenizer")),
    "BertTokenizer in config.json": case("its class is BertTokenizer", gpt2=True, forms=(), config=dict(
        tokenizer_class="BertTokenizer")),
    "a tokenizer in code": case("its tokenizer_config.json sets auto_map", tokenizer_config__json=dict(
        auto_map={"AutoTokenizer": ["tokenization_mine.MyTokenizer", None]})),
    "vocab.txt": case("it has a vocab.txt, another kind of vocabulary", gpt2=True, forms=(), vocab__txt="[UNK]\nthe\n"),
    "sentencepiece": case("it has a spiece.model, another kind", gpt2=True, forms=(), spiece__model="\n\x0e"),
    "vocab.json alone": case("it has a vocab.json without a merges.txt", gpt2=True, forms=(), vocab__json={"a": 0}),
    "tokenizer_config.json alone": case("it has tokenizer_config.json without a vocabulary", gpt2=True, forms=(),
                                        tokenizer_config__json=dict(model_max_length=16)),
}


def make(name, folder):
    """Write the folder of a name; return it."""
    write_folder(Path(folder), **FOLDERS[name].options)
    if FOLDERS[name].after:
        FOLDERS[name].after(folder)
    return folder


def table():
    """Return the table of docs/model.md."""
    return "\n".join(["| a folder with | what happens |", "|---|---|", *(
        f"| {name.replace('|', chr(92) + '|')} | {case.outcome.replace('|', chr(92) + '|')} |"
        for name, case in FOLDERS.items())])
