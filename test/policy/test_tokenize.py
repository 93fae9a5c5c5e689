"""Instructions become token ids, or a sentence about why not; never something else than was said."""

from __future__ import annotations

import numpy as np
import pytest
from small import WORDS

from vla_edge.policy.checkpoint_writer import SPECIAL_TOKENS, write_tokenizer
from vla_edge.policy.spec import TextSpec
from vla_edge.policy.tokenize import MAX_INSTRUCTION_CHARACTERS, InstructionError, InstructionTokenizer

LENGTH = 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory, WORDS, LENGTH)
    return directory / "tokenizer.json"


@pytest.fixture
def tokenizer(path) -> InstructionTokenizer:
    return InstructionTokenizer(path, LENGTH)


def ids(*words: str) -> list[int]:
    return [len(SPECIAL_TOKENS) + WORDS.index(word) for word in words]


def test_words_are_followed_by_padding_that_the_mask_leaves_out(tokenizer):
    tokens, mask = tokenizer("touch the red cube")
    assert tokens.dtype == np.int64 and mask.dtype == bool and tokens.shape == mask.shape == (1, LENGTH)
    assert tokens[0].tolist() == ids("touch", "the", "red", "cube") + [0] * 4
    assert mask[0].tolist() == [True] * 4 + [False] * 4


def test_of_a_bare_instruction_letters_digits_and_spaces_are_left(path):
    bare = InstructionTokenizer(path, LENGTH, text=TextSpec(bare=True))
    np.testing.assert_array_equal(bare("touch, the 'red' cube!")[0], bare("touch the red cube")[0])
    with pytest.raises(InstructionError, match="is empty"):
        bare("?!")


@pytest.mark.parametrize("spoken", ["Touch the RED cube", "  touch the red cube\n", "touch  the\tred cube"])
def test_case_and_white_space_do_not_matter(tokenizer, spoken):
    np.testing.assert_array_equal(tokenizer(spoken)[0], tokenizer("touch the red cube")[0])


@pytest.mark.parametrize("spoken", ["", "   ", "\n\t"])
def test_an_empty_instruction_is_refused(tokenizer, spoken):
    with pytest.raises(InstructionError, match="is empty; say what to do"):
        tokenizer(spoken)


def test_an_instruction_of_too_many_tokens_is_refused_and_not_cut(tokenizer):
    tokenizer("touch the red cube with your left hand")
    with pytest.raises(InstructionError, match="needs 9 tokens and the policy takes 8; shorten it"):
        tokenizer("touch the red ball with your left right hand")


def test_a_very_long_instruction_is_refused_before_it_is_tokenized(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "_tokenizer", None)
    with pytest.raises(InstructionError, match=f"has 10000000 characters, more than {MAX_INSTRUCTION_CHARACTERS}"):
        tokenizer("a" * 10_000_000)


@pytest.mark.parametrize(
    "spoken", ["触摸红色方块", "прикоснись к красному кубу", "المس المكعب الأحمر", "🤖 🟥", "\x00\x01"]
)
def test_a_language_the_policy_never_saw_is_refused(tokenizer, spoken):
    with pytest.raises(InstructionError, match="does not know most words of"):
        tokenizer(spoken)


def test_one_unknown_word_among_known_ones_is_let_through_as_unknown(tokenizer):
    tokens, mask = tokenizer("touch the mauve cube")
    assert tokens[mask].tolist() == [*ids("touch", "the"), SPECIAL_TOKENS.index("[UNK]"), *ids("cube")]


def test_braces_in_an_instruction_are_only_text(path):
    tokens, mask = InstructionTokenizer(path, LENGTH, "the {instruction}\n")("touch the red cube")
    assert tokens[mask].tolist() == ids("the", "touch", "the", "red", "cube")
    with pytest.raises(InstructionError):
        InstructionTokenizer(path, LENGTH)("{instruction} {0} {}")


def test_the_same_instruction_is_tokenized_once(tokenizer, monkeypatch):
    encoded = []
    encode = tokenizer._encode
    monkeypatch.setattr(tokenizer, "_encode", lambda *said: encoded.append(said) or encode(*said))
    first, again = tokenizer("touch the red cube"), tokenizer("touch the red cube")
    assert first[0] is again[0] and len(encoded) == 1
    assert tokenizer("touch the green cube")[0].tolist() != first[0].tolist()
    assert tokenizer("touch the red cube")[0].tolist() == first[0].tolist()


def test_a_refused_instruction_leaves_the_next_one_unharmed(tokenizer):
    with pytest.raises(InstructionError):
        tokenizer("")
    assert tokenizer("touch the cube")[1].sum() == 3
