"""What is wrong with texts: found where it is, and not where text only looks unusual."""

from __future__ import annotations

import base64
import random
import time
import unicodedata

import pytest

from kit.common.secrets import SECRETS, address, redacted, secret
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
BODY = "\n".join(["MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7x0+/8aZ1bQ2Kd"] * 3)
HEADERS = ["-----BEGIN " + "PRIVATE KEY-----", "-----BEGIN RSA " + "PRIVATE KEY-----"]
KEYS = {
    "private key": [f"{HEADERS[0]}\n{BODY}\n-----END PRIVATE KEY-----", f"{HEADERS[1]}\n{BODY}",
                    f"{HEADERS[1]}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{'0A' * 16}\n\n{BODY}\n"],
    "AWS key": ["AKIA" + "0AZ9" * 4, "AKIA" + "QWRZTPSD" * 2],
    "GitHub token": [f"gh{letter}_" + "0aZ9" * 9 for letter in "pousr"] + ["github_pat_" + "0aZ_9" * 9],
    "Hugging Face token": ["hf_" + "0aZ9" * 9, "hf_" + "RqMhVvSbQx" * 3 + "Ozkw"],  # most have no digit
    "API key": ["sk-" + "0aZ9" * 6, "sk-proj-" + "0aZ9" * 9, "sk-ant-api03-" + "0aZ9" * 9, "sk-" + "0af9" * 8,
                "sk-" + "lf-5c1de07a-3b9f-4e62-a8d4-91f0c37be25d"],
    "Google key": ["AIza" + "0aZ_9" * 7],
    "Slack token": [f"xox{letter}-" + "0aZ9" * 5 for letter in "abprs"],
    "signed token": [".".join(["eyJ" + "0aZ9" * 5] * 2 + ["0aZ9" * 5])],
}
ADDRESSES = ["jane.doe@company.de", "j+x@mail.uni-bonn.de", "1234567@qq.com"]
IN_TEXT = ["{}", "token={}\n", "用户的 {}，请保密", '{{"key": "{}"}}', "see\\n{}", "令牌是{}。", "{}这是令牌"]


def jwt(payload: str) -> str:
    """A signed token as far as one can see."""
    parts = [base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")
             for text in ('{"alg":"HS256","typ":"JWT"}', payload)]
    return ".".join([*parts, "SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c"])


def test_every_kind_of_secret_has_an_example() -> None:
    assert list(KEYS) == list(SECRETS)


@pytest.mark.parametrize("kind, key", [(kind, key) for kind, keys in KEYS.items() for key in keys])
def test_secrets_are_named_and_not_repeated(kind: str, key: str) -> None:
    for form in IN_TEXT:
        text = form.format(key)
        assert secret(text) == f"{kind} {key[:4]}…", text
        shown = redacted(text)
        assert f"[{kind}]" in shown and address(text) is None
        assert not [line for line in key.splitlines() if line in shown and "END" not in line and line]


@pytest.mark.parametrize("person", ADDRESSES)
def test_addresses_are_found_and_are_no_secrets(person: str) -> None:
    for text in (person, f"mail={person}\n", f"用户的 {person}，请保密", f'{{"mail": "{person}"}}'):
        assert address(text) == f"{person[:4]}…"
        assert secret(text) is None and redacted(text) == text


def test_a_secret_behind_a_placeholder_is_found() -> None:
    assert secret(f"not hf_{'x' * 34} but {KEYS['Hugging Face token'][0]}") == "Hugging Face token hf_0…"


def test_a_key_after_the_heading_of_another_text_is_not_taken_for_its_body() -> None:
    assert secret(f'["It begins with {HEADERS[0]}"], ["sha256 {"0a1b2c3d" * 8}"]') is None


@pytest.mark.parametrize("text", [
    "hf_" + "x" * 34, "hf_" + "X" * 34, "hf_yourTokenGoesHere" + "Ab1" * 6, "hf_" + "abcdefghij" * 3 + "1234",
    "sk-your-api-key-here-" + "a1B2" * 6, "sk-" + "x" * 48, "sk-" + "1234567890abcdef" * 2,
    "sk-xxxx-xxxx-xxxx-xxxx-xxxx",
    "ghp_" + "0" * 36, "gho_" + "16C7e42F292c6912E7710c838347Ae178B4a", "github_pat_" + "X" * 40,
    "AKIA" + "IOSFODNN7EXAMPLE", "AKIA" + "X" * 16, "AIza" + "Sy" + "X" * 33, "xoxb-your-token-goes-here",
    "xoxb-" + "123456789012-" * 2 + "AbCdEfGhIjKl", HEADERS[0], f"{HEADERS[0]}\n...\n-----END PRIVATE KEY-----",
    f"{HEADERS[0]}\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC...\n", f"{HEADERS[0]}\n{'X' * 64}\n",
    jwt('{"sub":"1234567890","name":"John Doe","iat":1516239022}'), jwt('{"iss":"joe","http://example.com/root":true}'),
    # Class names of scikit-learn's pages, and words with hyphens.
    "div.sk-toggleable__content-arrow:hover", "sk-estimator-doc-link-fitted", "#sk-container-id-1 div.sk-parallel-item",
    "sk-RandomForestClassifier-pipeline-v2", "sk-learn-1-5-2-and-2024-12-31-later", "sk-this-is-no-key-at-all",
])
def test_placeholders_are_no_secrets(text: str) -> None:
    for form in IN_TEXT:
        assert secret(form.format(text)) is None
        assert redacted(form.format(text)) == form.format(text)


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
    assert secret(text) is None and address(text) is None


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
