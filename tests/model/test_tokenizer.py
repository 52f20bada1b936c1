"""The tokenizer: exact chat format, ordinary text stays ordinary, and ids equal tiktoken's."""

import base64
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kimivl.model.tokenizer import (
    MAX_PIECE,
    MAX_RUN,
    OFFICIAL_RANKS,
    RESERVED,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    TiktokenEncoder,
    TokenizerEncoder,
    load_tokenizer,
    text_encoder,
    train_tokenizer,
)

SYSTEM = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
OPENING = "<|im_assistant|>assistant<|im_middle|>"
IMAGE = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
TEXTS = [
    "I'll say it's 12345 o'clock, don't they'RE WE'VE",
    "汉字和English混排，共3781个。ひらがな カタカナ 한국어",
    "Ünïcödé Ǆ ǅ ʰ ª ́combining Ωμέγα Привет שלום नमस्ते",
    "  leading, trailing  \t tabs\n\n\nlines \r\n  \n   indented",
    "x = {'a': [1, 22, 333, 4444]}  # ☃ 🙂🙃 ½ Ⅷ ٣",
    "◁think▷Read: 3781. 3+7=10+8=18.◁/think▷\\boxed{18}",
    "CamelCaseWords HTTPServer a1b2c3 --- ... !!!\n",
]
LEARNED = TEXTS + ["Read.◁think▷So 3.◁/think▷"] * 30


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(LEARNED, 330)


def user(*content: str) -> dict:
    parts = [{"type": "image"} if part == "IMAGE" else {"type": "text", "text": part} for part in content]
    return {"role": "user", "content": parts}


def render(tokenizer: PreTrainedTokenizerFast, *messages: dict, generate: bool = False) -> str:
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)


def test_size_and_places_of_special_tokens(trained):
    assert len(trained) == 330
    ids = trained.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(330 - len(SPECIAL_TOKENS), 330))
    assert (trained.bos_token, trained.eos_token, trained.pad_token) == ("[BOS]", "[EOS]", "[PAD]")
    assert set(trained.all_special_tokens) == set(SPECIAL_TOKENS)


@pytest.mark.parametrize("text", [*TEXTS, "", "\x00\x7f", "ganz andere Wörter, 日本"])
def test_any_text_survives_the_round_trip(trained, text: str):
    assert trained.decode(trained.encode(text)) == text


def test_digits_are_single_and_marks_of_thinking_whole(trained):
    pieces = [trained.decode([token]) for token in trained.encode("7890.◁think▷12◁/think▷34")]
    assert pieces == ["7", "8", "9", "0", ".", "◁think▷", "1", "2", "◁/think▷", "3", "4"]


def test_nothing_is_added_to_a_text(trained):
    assert trained("12", add_special_tokens=True)["input_ids"] == trained.encode("12", add_special_tokens=False)
    assert set(trained("12")) == {"input_ids", "attention_mask"}


def test_the_same_texts_give_the_same_tokenizer(trained, tmp_path: Path):
    trained.save_pretrained(tmp_path / "a")
    train_tokenizer(iter(LEARNED), 330).save_pretrained(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_saved_is_loaded(trained, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    chat = [user("IMAGE", "Read 37."), {"role": "assistant", "content": "37"}]
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.apply_chat_template(chat)["input_ids"] == trained.apply_chat_template(chat)["input_ids"]
    assert loaded.encode("<|im_end|>a[EOS]") == trained.encode("<|im_end|>a[EOS]")
    assert (loaded.eos_token, loaded.pad_token_id) == ("[EOS]", trained.pad_token_id)


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(TEXTS, 200)


def test_the_rendered_example_of_the_facts(trained):
    chat = (user("IMAGE", "QUESTION"), {"role": "assistant", "content": "ANSWER"})
    question = f"{SYSTEM}<|im_user|>user<|im_middle|>{IMAGE}QUESTION<|im_end|>"
    assert render(trained, *chat) == f"{question}{OPENING}ANSWER<|im_end|>"
    assert render(trained, *chat[:1], generate=True) == question + OPENING


def test_own_system_turn_strings_and_several_images_in_place(trained):
    chat = ({"role": "system", "content": "Be brief."}, user("IMAGE", "and", "IMAGE", "differ?"))
    assert render(trained, *chat) == (
        "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        f"<|im_user|>user<|im_middle|>{IMAGE}and{IMAGE}differ?<|im_end|>"
    )
    assert render(trained, {"role": "user", "content": "hi"}) == render(trained, user("hi"))


def test_only_the_last_answer_keeps_its_thinking(trained):
    thought = {"role": "assistant", "content": [{"type": "text", "text": "◁think▷hm◁/think▷A"}]}
    chat = (user("1"), thought, user("2"), thought)
    text = render(trained, *chat)
    assert text.count("◁think▷") == 1
    assert f"{OPENING}A<|im_end|>" in text and text.endswith(f"{OPENING}◁think▷hm◁/think▷A<|im_end|>")
    assert "◁" not in render(trained, *chat, user("3"), generate=True)


def test_marks_of_thinking_in_a_question_stay(trained):
    assert "◁think▷x◁/think▷y" in render(trained, user("◁think▷x◁/think▷y"), user("2"))


def test_special_strings_can_be_ordinary_text(trained):
    special = set(trained.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
    for name in SPECIAL_TOKENS:
        text = f"a {name}b"
        ids = trained.encode(text, split_special_tokens=True)
        assert not special & set(ids)
        assert trained.decode(ids) == text
        assert len(special & set(trained.encode(text))) == 1  # and the switch does not stick


def ranks_of(texts: list[str], size: int) -> dict[bytes, int]:
    """A ranks table such as tiktoken's, from a BPE trained on the texts with the official split."""
    bpe = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[])
    )
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelled = {chr(byte): byte for byte in printable}
    spelled |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    vocabulary = sorted(bpe.get_vocab().items(), key=lambda entry: entry[1])
    words = [bytes(spelled[letter] for letter in word) for word, _ in vocabulary]
    words.sort(key=len)  # bytes first; the order of the rest need only be one in which parts precede wholes
    return {word: rank for rank, word in enumerate(words)}


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> tuple[PreTrainedTokenizerFast, tiktoken.Encoding]:
    """A small file in the official layout, read by us and by tiktoken."""
    folder = tmp_path_factory.mktemp("official")
    ranks = ranks_of(TEXTS * 5 + ["aaaa aaaaaaa abababab  " * 4] * 4, 700)
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for word, rank in ranks.items()]
    (folder / "tiktoken.model").write_text("".join(lines))
    names = {rank - OFFICIAL_RANKS + len(ranks): name for name, rank in SPECIAL_TOKENS.items()}
    special = {names.get(i, f"<|reserved_token_{i}|>"): i for i in range(len(ranks), len(ranks) + RESERVED)}
    encoding = tiktoken.Encoding("t", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    return load_tokenizer(folder), encoding


def test_the_split_is_the_official_one_to_the_letter():
    letters = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    small = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
    end = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    wanted = "|".join(
        [
            r"[\p{Han}]+",
            r"[^\r\n\p{L}\p{N}]?" + letters + "*" + small + "+" + end,
            r"[^\r\n\p{L}\p{N}]?" + letters + "+" + small + "*" + end,
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    )
    assert wanted == SPLIT_PATTERN


def test_ids_equal_tiktoken_on_varied_text(official):
    ours, theirs = official
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode_ordinary(text), text
        assert ours.decode(ours.encode(text)) == text


def test_ids_equal_tiktoken_on_random_unicode(official):
    ours, theirs = official
    for text in random_texts(1500, seed=1):
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text)


def test_special_ids_lie_behind_the_ranks_as_in_the_official_file(official):
    ours, theirs = official
    assert len(ours) == theirs.n_vocab
    for name, rank in SPECIAL_TOKENS.items():
        assert ours.convert_tokens_to_ids(name) == rank - OFFICIAL_RANKS + theirs.n_vocab - RESERVED
    chat = render(ours, user("IMAGE", "Hi"), generate=True)
    assert ours.encode(chat) == theirs.encode(chat, allowed_special="all")
    assert ours.encode(chat, split_special_tokens=True) == theirs.encode_ordinary(chat)


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    letters = "aaabcAB'sSlL  \t\n\r019,.-!_汉字のカ한éÉǅʰ́½٣🙂◁▷\u3000\u200b"
    return ["".join(rng.choices(letters, k=rng.randrange(1, 30))) for _ in range(count)]


@pytest.fixture(scope="module", params=["converted", "saved and loaded"])
def encode(request, official, tmp_path_factory) -> Callable[[str], np.ndarray]:
    """A text encoder of the official layout."""
    tokenizer, _ = official
    if request.param == "saved and loaded":
        folder = tmp_path_factory.mktemp("saved")
        tokenizer.save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
    return text_encoder(tokenizer)


def test_the_official_tokenizer_encodes_by_tiktoken_with_the_same_ids(official, encode):
    ours, theirs = official
    assert isinstance(encode, TiktokenEncoder)
    rng = random.Random(2)
    periodic = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) * rng.randrange(1, 9) for _ in range(300)]
    for text in [*TEXTS, *random_texts(500), *periodic]:
        ids = encode(text)
        assert ids.dtype == np.int64
        assert ids.tolist() == ours.encode(text) == theirs.encode_ordinary(text), repr(text)
    assert encode("").tolist() == []


def test_names_of_special_tokens_are_ordinary_text(official, trained, encode):
    text = "a <|im_end|>[EOS] b"
    assert encode(text).tolist() == official[0].encode(text, split_special_tokens=True)
    ordinary = text_encoder(trained)(text)
    assert ordinary.max() < 330 - len(SPECIAL_TOKENS) and trained.decode(ordinary) == text


def test_a_trained_tokenizer_encodes_by_itself(trained):
    encode = text_encoder(trained)
    assert isinstance(encode, TokenizerEncoder)
    for text in [*TEXTS, *random_texts(100)]:
        assert encode(text).dtype == np.int64 and encode(text).tolist() == trained.encode(text)
    assert encode("").dtype == np.int64


def test_text_encoders_can_be_pickled(trained, encode):
    for encoder in (encode, text_encoder(trained)):
        assert pickle.loads(pickle.dumps(encoder))(TEXTS[1]).tolist() == encoder(TEXTS[1]).tolist()


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict], object]) -> PreTrainedTokenizerFast:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)))


def swap_merges(spec: dict) -> None:
    merges = spec["model"]["merges"]
    merges[10], merges[-1] = merges[-1], merges[10]


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["model"].update(ignore_merges=False),
        lambda spec: spec["model"].update(dropout=0.5),
        lambda spec: spec["model"]["merges"].pop(),
        swap_merges,
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=SPLIT_PATTERN + "|x"),
        lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        lambda spec: spec.update(normalizer={"type": "NFC"}),
        lambda spec: spec.update(pre_tokenizer=None),
        lambda spec: spec["added_tokens"][0].update(special=False),
        lambda spec: spec["model"]["vocab"].update({"日": 9_999}),
    ],
)
def test_a_tokenizer_that_differs_from_tiktoken_encodes_by_itself(official, change):
    assert isinstance(text_encoder(changed(official[0], lambda spec: None)), TiktokenEncoder)
    assert isinstance(text_encoder(changed(official[0], change)), TokenizerEncoder)


def official_pieces(text: str) -> list[str]:
    """The rule of the facts, letter by letter."""
    pieces = []
    for start in range(0, len(text), MAX_PIECE):
        piece, begin, run = text[start : start + MAX_PIECE], 0, 0
        for place, letter in enumerate(piece):
            same = place > 0 and letter.isspace() == piece[place - 1].isspace()
            run = run + 1 if same else 1
            if run > MAX_RUN:
                pieces.append(piece[begin:place])
                begin, run = place, 1
        pieces.append(piece[begin:])
    return pieces


@pytest.mark.parametrize(
    "text",
    [
        "ab " * 9_000,
        "a" * MAX_RUN,
        "a" * (MAX_RUN + 1),
        "x " + "ab1" * 20_000 + "  " + " \n" * 13_000 + "end",
        "字" * MAX_RUN * 2 + " ",
        "word, " * (MAX_PIECE // 6) + "a" * MAX_RUN * 3 + "\u3000\x1c" * MAX_RUN,
    ],
)
def test_long_texts_are_cut_where_the_official_code_cuts_them(official, encode, text):
    expected = [id_ for piece in official_pieces(text) for id_ in official[1].encode_ordinary(piece)]
    assert encode(text).tolist() == expected


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"tokenizer\.json or tiktoken\.model") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path):
    Tokenizer(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="special tokens"):
        load_tokenizer(tmp_path)
