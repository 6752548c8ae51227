"""The tokenizer: what it promises of any text, its file, and the script that trains it."""

import base64
import json
import random
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, tokenizer_folder
from scripts import tok_train

TEXT = "The cat sat on the mat, and the other cats didn't: 12345 mice!\n\n    def mouse(x):\n\treturn x + 1\n" * 3


def words(n, seed=0):
    rng = random.Random(seed)
    return [" ".join("".join(rng.choices("aeiost", k=rng.randint(1, 6))) for _ in range(40)) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT, *words(30)], 400)


def encode_slow(tokenizer, text):
    """BPE as defined: cut the text into pieces; in each, merge the adjacent pair of lowest rank until none is left."""
    rank, ids = {token: i for i, token in enumerate(tokenizer.ranks)}, []
    for piece in regex.findall(SPLIT_PATTERN, text):
        parts = [bytes([b]) for b in piece.encode()]
        while True:
            known = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank]
            if not known:
                break
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [rank[part] for part in parts]
    return ids


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("the cat1\n \t'é日", max_size=60))
def test_encode_is_bpe_and_decode_inverts_it(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == encode_slow(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_batch_is_encode_of_each(tokenizer):
    texts = [TEXT, "", "é" * 50, *words(20, seed=1)]
    for threads in (1, 3):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts, threads)] == list(map(tokenizer.encode, texts))
    assert tokenizer.encode("the", bos=True) == [tokenizer.bos, *tokenizer.encode("the")]


def test_special_tokens_are_counted_and_never_read_from_text(tokenizer):
    assert tokenizer.vocab_size == 400 and len(SPECIAL_TOKENS) == 9
    assert list(tokenizer.specials.values()) == list(range(391, 400)) and tokenizer.bos == 391
    for name, i in tokenizer.specials.items():
        ids = tokenizer.encode(f"a {name} b")
        assert max(ids) < 391 and tokenizer.decode(ids) == f"a {name} b"
        assert tokenizer.decode([i]) == name and tokenizer.token_bytes()[i] == 0
    assert tokenizer.token_bytes().dtype == np.int32 and tokenizer.token_bytes().shape == (400,)


def test_digits_come_in_groups_of_two_at_most():
    trained = Tokenizer.train(["2024 2024 2024 123456 123456 "] * 50, 270)
    assert max(len(token) for token in trained.ranks if any(chr(b).isdigit() for b in token)) == 2
    assert [trained.decode([i]) for i in trained.encode("2024")] == ["20", "24"]


@pytest.mark.parametrize("text", [" " * 10**6 + "x", " \t" * 10**5 + "\n", "a" * 10**5, "=-" * 10**5])
def test_long_runs_do_not_overflow_the_regex(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    Tokenizer.train([text], 265)


def test_lone_surrogates_become_question_marks(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"
    assert Tokenizer.train(["a\ud800b" * 9], 266).ranks == Tokenizer.train(["a?b" * 9], 266).ranks


def test_training_is_deterministic_and_merges_what_came_before(tokenizer):
    again = Tokenizer.train(iter([TEXT, *words(30)]), 400)
    assert again.fingerprint == tokenizer.fingerprint != Tokenizer.train([TEXT, *words(30)], 399).fingerprint
    for i, token in enumerate(tokenizer.ranks[256:], start=256):
        earlier = set(tokenizer.ranks[:i])
        assert any(token[:k] in earlier and token[k:] in earlier for k in range(1, len(token)))
    assert Tokenizer.train(["xy xy xy z"], 266).ranks[256] == b"xy"


def test_a_vocabulary_that_cannot_be_reached_is_refused():
    with pytest.raises(UserError, match="need 265"):
        Tokenizer.train([TEXT], 264)
    with pytest.raises(UserError, match="a vocabulary of 267"):  # b"ab", then b" ab"
        Tokenizer.train(["ab ab"], 300)
    assert Tokenizer.train(["ab ab"], 267).vocab_size == 267


# -----------------------------------------------------------------------------
# disk


def test_load_gives_back_what_was_saved(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.encode(TEXT) == tokenizer.encode(TEXT)


def b64(token):
    return base64.b64encode(token).decode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved.pop("ranks"),
        lambda saved: saved.update(format=99),
        lambda saved: saved.update(pattern="("),
        lambda saved: saved.update(pattern=None),
        lambda saved: saved.update(special_tokens=["<|bos|>"]),
        lambda saved: saved["ranks"].remove(b64(b"a")),
        lambda saved: saved["ranks"].append(b64(b"a")),
        lambda saved: saved["ranks"].append("not base64!"),
        lambda saved: saved["ranks"].append(7),
    ],
)
def test_a_damaged_file_is_one_clear_line(tokenizer, tmp_path, damage):
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    damage(saved)
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="tok_train --force") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_or_torn_file_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer"):
        Tokenizer.load(tmp_path)
    for text in ('{"format": 1, "ranks": [', "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UserError, match="tokenizer.json"):
            Tokenizer.load(tmp_path)


# -----------------------------------------------------------------------------
# scripts.tok_train


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Run the script on two training shards and a held-out shard of another alphabet."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "data").mkdir()
    for i, texts in enumerate([words(20), words(20, seed=1), ["zqzqzqzq " * 200] * 5]):
        pq.write_table(pa.table({"text": texts}), tmp_path / "data" / f"{i}.parquet")

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["tok_train", "--preset", "paper", "--data", str(tmp_path / "data"), *flags])
        tok_train.main()

    return run


def test_script_learns_from_the_training_shards_only_and_only_once(train, capsys):
    train("--vocab-size", "300")
    file = tokenizer_folder() / "tokenizer.json"
    first = file.read_bytes()
    trained = Tokenizer.load(tokenizer_folder())
    assert trained.vocab_size == 300 and not any(b"z" in token or b"q" in token for token in trained.ranks[256:])
    # None of the merges occur in the validation text, 3 of 5 documents of 1,800 bytes: a token a byte.
    assert "validation: 5400 bytes, 5400 tokens, 1.000 bytes per token" in capsys.readouterr().out

    before = file.stat().st_mtime_ns
    train("--vocab-size", "300")
    assert "already" in capsys.readouterr().out and file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--force"):
        train("--vocab-size", "301")
    assert file.read_bytes() == first
    train("--vocab-size", "301", "--force")
    assert Tokenizer.load(tokenizer_folder()).vocab_size == 301


def test_script_limits_and_names(train, tmp_path):
    train("--vocab-size", "280", "--name", "a", "--max-chars", "2000", "--doc-cap", "100")
    expected, left = [], 2000
    for text in words(20) + words(20, seed=1):
        expected.append(text[:100][:left])
        left -= len(expected[-1])
        if not left:
            break
    assert Tokenizer.load(tokenizer_folder("a")).fingerprint == Tokenizer.train(expected, 280).fingerprint
    train("--vocab-size", "280", "--output", str(tmp_path / "elsewhere"))
    assert Tokenizer.load(tmp_path / "elsewhere").vocab_size == 280
    with pytest.raises(UserError, match="--max-chars 0"):
        train("--max-chars", "0")
