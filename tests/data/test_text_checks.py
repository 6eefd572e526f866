"""What is wrong with texts: found where it is, and not where text only looks unusual."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from kit.common.secrets import SECRETS, secret
from kit.data.findings import control_characters, mojibake, not_normalised
from kit.data.lint_figures import NearDuplicates

FRENCH = "Où est le café ? À côté de l’hôtel, près du théâtre : ça va très bien… « Noël » œuvre naïve, 20 °C, 5 €"
GERMAN = "Größere Übungen für süße Äpfel: „Öl“ – heißt es – kostet 5 € mehr; Maß, Füße, Jürgen"
CHINESE = "北京是中国的首都，有三千多年的历史。她在北方。"


def misread(text: str) -> str:
    """UTF-8 read as Windows-1252; the five bytes without a character there stay as they are, as in browsers."""
    return "".join(bytes([byte]).decode("cp1252", "ignore") or chr(byte) for byte in text.encode())


def accented(text: str) -> list[str]:
    return [character for character in text if not character.isascii()]


@pytest.mark.parametrize("text", [FRENCH, GERMAN, CHINESE], ids=["French", "German", "Chinese"])
def test_text_read_with_the_wrong_encoding_is_found(text: str) -> None:
    assert mojibake(text) is None
    found = mojibake(misread(text))
    first = accented(text)[0]
    assert found == f"{misread(first)!r} should be {first!r}"


@pytest.mark.parametrize("character", sorted(set(accented(FRENCH + GERMAN))))
def test_one_misread_character_among_words_is_enough(character: str) -> None:
    assert mojibake(f"one word{misread(character)} and more") is not None


@pytest.mark.parametrize("text", [
    "a \ufffd b", "锟斤拷", "烫烫烫", "It isnâ€™t", "Â© 2020", "cafÃ©", "GrÃ¶ÃŸe", "ä¸\u00adæ–‡",
])
def test_signs_of_a_lost_conversion(text: str) -> None:
    assert mojibake(text) is not None


@pytest.mark.parametrize("text", [
    "plain", "", "« Il a mangé. »", "Il est allé… très loin", "NÃO, ISTO É UMA AÇÃO", "ÂNGULO", "“É”", "Åse og Øyvind",
    "Łódź, žluťoučký kůň", "Ðức, tiếng Việt", "Привет", "Γειά σου", "مرحبا", "שלום", "日本語、カタカナ", "한국어",
    "🙂👍🏽👩‍👩‍👧", "x² ± ½ · 10 µm", "10 °C – 20 °C", "naïve café", "¿Qué?", "£5 ¥6 §7 ©8 ®9",
    # A letter whose mark begins a sequence, and typographic signs that could go on with it.
    "« Il a mangé\u00a0» dit-il", "« C’est l’été\u00a0»", "«Il est allé…»", "«José»…", "“my fiancé”—she said",
    "the café—“the best one”", "« très\u00a0»", "la durée\u00a0– deux ans",
])
def test_unusual_text_is_no_mojibake(text: str) -> None:
    assert mojibake(text) is None


@pytest.mark.parametrize("number", [
    0, 7, 8, 0x0B, 0x0C, 0x0D, 0x1B, 0x1F, 0x7F, 0x80, 0x85, 0x9F, 0xFEFF, 0x202A, 0x202E, 0x2066, 0x2069,
])
def test_control_characters_are_named(number: int) -> None:
    assert control_characters(f"a{chr(number)}b\x00") == f"U+{number:04X}"


@pytest.mark.parametrize("text", ["", "a\tb\nc", "a\u00a0b\u202fc", "👩‍👩‍👧 \u200d \u200b", "ي\u200cس", "a\u2028b"])
def test_space_and_joiners_are_no_control_characters(text: str) -> None:
    assert control_characters(text) is None


# Put together here, so that no one who looks for secrets finds one in this file.
KEYS = {
    "private key": ["-----BEGIN " + "PRIVATE KEY-----", "-----BEGIN RSA " + "PRIVATE KEY-----"],
    "AWS key": ["AKIA" + "0AZ9" * 4],
    "GitHub token": [f"gh{letter}_" + "0aZ9" * 9 for letter in "pousr"] + ["github_pat_" + "0aZ_9" * 9],
    "Hugging Face token": ["hf_" + "0aZ9" * 9],
    "API key": ["sk-" + "0aZ9" * 6, "sk-proj-" + "0aZ9" * 9, "sk-ant-api03-" + "0aZ9" * 9],
    "Google key": ["AIza" + "0aZ_9" * 7],
    "Slack token": [f"xox{letter}-" + "0aZ9" * 5 for letter in "abprs"],
    "signed token": [".".join(["eyJ" + "0aZ9" * 5] * 2 + ["0aZ9" * 5])],
    "e-mail address": ["jane.doe@company.de", "j+x@mail.uni-bonn.de", "1234567@qq.com"],
}


def test_every_kind_of_secret_has_an_example() -> None:
    assert list(KEYS) == list(SECRETS)


@pytest.mark.parametrize("kind, key", [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_secrets_are_named_and_not_repeated(kind: str, key: str) -> None:
    for text in (key, f"token={key}\n", f"用户的 {key}，请保密", f'{{"key": "{key}"}}'):
        assert secret(text) == f"{kind} {key[:4]}…"


@pytest.mark.parametrize("text", [
    "@decorator\ndef f(): pass", "user@example.com", "x@example.org, y@test.io, root@localhost", "a @ b, a@b", "@user",
    "npm install react@18.2.0 @types/node", "hf_hub_download(repo)", "sk-learn", "eyJ", "AKIA",
    "-----BEGIN CERTIFICATE-----", "mask-risk-task-disk-and-many-more-words", "xoxo-xoxo", "lr=1e-4 # see @karpathy",
    # Code that looks like an address.
    "git clone git@github.com:owner/project.git", "logo@2x.png", "scores = q@k.transpose(-2, -1)",
    # Names that RFC 2606 reserves.
    "sales@shop.example", "jane@mail.example.com", "a@b.test", "a@b.invalid",
])
def test_code_and_examples_are_no_secrets(text: str) -> None:
    assert secret(text) is None


@pytest.mark.parametrize("text", ["café", "Ångström", "한국어", "が", "Tiếng Việt"])
def test_composed_text_is_normal_and_decomposed_text_is_not(text: str) -> None:
    assert not not_normalised(unicodedata.normalize("NFC", text))
    assert not_normalised(unicodedata.normalize("NFD", text))


def test_full_width_forms_are_normal() -> None:
    assert not any(map(not_normalised, ["plain", "ＡＢＣ１２３", "①②", "ﬁ", "x²"]))


PICK = random.Random(1)
WORDS = ["".join(PICK.choices("etaoinshrdlucmfwyp", k=PICK.randint(2, 9))) for _ in range(3000)]


@pytest.fixture(autouse=True)
def _same_words_whichever_tests_run() -> None:
    PICK.seed(2)


def words(characters: int) -> list[str]:
    made: list[str] = []
    while len(" ".join(made)) < characters:
        made.append(PICK.choice(WORDS))
    return made


def changed(text: list[str], count: int) -> list[str]:
    """The words with `count` of them replaced."""
    made = list(text)
    for place in PICK.sample(range(len(text)), count):
        made[place] = PICK.choice([word for word in WORDS if word != text[place]])
    return made


def near_pairs(texts: list[str], batch: int = 100) -> dict[int, tuple[int, float]]:
    near = NearDuplicates()
    for start in range(0, len(texts), batch):
        near.add(list(range(start, min(start + batch, len(texts)))), texts[start:start + batch])
    return {row: (earlier, share) for row, earlier, share in near.pairs()}


@pytest.mark.parametrize("characters", [300, 400, 600, 1000, 2000])
@pytest.mark.parametrize("count", [1, 2])
def test_rows_with_a_word_or_two_changed_are_found_and_no_others(characters: int, count: int) -> None:
    originals = [words(characters) for _ in range(300)]
    pairs = near_pairs([" ".join(text) for text in [*originals, *(changed(text, count) for text in originals)]])
    assert all(earlier == row - 300 for row, (earlier, _) in pairs.items())
    assert len(pairs) >= 0.95 * 300


def test_unrelated_rows_are_never_alike() -> None:
    assert near_pairs([" ".join(words(300 + i % 700)) for i in range(3000)]) == {}


@pytest.mark.parametrize("alphabet", ["北京是中国的首都有三千多年历史她在方春夏秋冬天地", "абвгдежзийклмнопрстуф"])
def test_other_scripts_are_compared_alike(alphabet: str) -> None:
    texts = ["".join(PICK.choices(alphabet, k=400)) for _ in range(200)]
    pairs = near_pairs([*texts, *(text[:200] + "x" + text[201:] for text in texts)])
    assert len(pairs) >= 190 and all(earlier == row - 200 for row, (earlier, _) in pairs.items())


def test_equal_texts_share_everything_whatever_their_spaces_and_case() -> None:
    text = " ".join(words(300))
    pairs = near_pairs([text, text.upper().replace(" ", "\n  "), text])
    assert set(pairs) == {1, 2} and all(earlier < row and share == 1 for row, (earlier, share) in pairs.items())


def test_short_and_odd_texts_are_left_out() -> None:
    assert near_pairs(["short"] * 5) == {}
    assert near_pairs(["", "a" * 500, "\ud800" * 500, "🙂" * 500]) == {}
    assert near_pairs([]) == {}


def test_batches_make_no_difference() -> None:
    texts = [" ".join(words(600)) for _ in range(50)]
    texts += [" ".join(changed(text.split(), 1)) for text in texts]
    assert near_pairs(texts, 1) == near_pairs(texts, 7) == near_pairs(texts, 100)


def test_twice_the_rows_take_twice_the_time() -> None:
    texts = [" ".join(words(300)) for _ in range(4000)]

    def seconds(count: int) -> float:
        began = time.process_time()
        near_pairs(texts[:count], 1000)
        return time.process_time() - began

    # The quickest of several, and the threads' time: other work on the machine only adds.
    assert min(seconds(4000) for _ in range(5)) < 3 * min(seconds(2000) for _ in range(5))


def test_many_equal_rows_take_no_longer() -> None:
    text = " ".join(words(300))
    began = time.process_time()
    assert len(near_pairs([text] * 4000, 1000)) == 3999
    assert time.process_time() - began < 10
