"""No planted secret survives masking, wherever it lies; what is no secret does."""

from __future__ import annotations

import json
import logging
import re
import string
from pathlib import PurePosixPath
from urllib.parse import quote

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tests.support.pattern_steps import StepCounter

from liquid_llm import masking
from liquid_llm.masking import MASK, Masker, MaskingFilter, looks_secret, secret_values

ALNUM = string.ascii_letters + string.digits


def shaped(prefix: str, alphabet: str, length: int) -> st.SearchStrategy[str]:
    return st.text(alphabet, min_size=length, max_size=length).map(lambda body: prefix + body)


shaped_secrets = st.one_of(
    shaped("hf_", ALNUM, 34),
    shaped("hf_", ALNUM, 8),
    shaped("AKIA", string.ascii_uppercase + string.digits, 16),
    shaped("AIza", ALNUM + "_-", 35),
    shaped("ya29.", ALNUM + "_-", 60),
    shaped("ghp_", ALNUM, 36),
    shaped("eyJhbGciOiJIUzI1NiJ9.", ALNUM, 40),
    shaped("glpat-", ALNUM, 20),
)
literal_secrets = st.text(ALNUM + "+/=:&?'\"\\ %#@!-_.é", min_size=8, max_size=40).filter(
    lambda text: text.strip() == text and len(text) >= 8
)
harmless_text = st.text(ALNUM + " ./:-_,", max_size=12)


@st.composite
def planted(draw: st.DrawFn, secrets: st.SearchStrategy[str]) -> tuple[str, object]:
    """A secret and a nested plain value that holds it somewhere."""
    secret = draw(secrets)
    value: object = secret
    if draw(st.booleans()):
        value = draw(harmless_text) + draw(st.sampled_from([" ", "=", "/", "://u:", "?a=1&b="])) + secret
    for _ in range(draw(st.integers(0, 4))):
        wrap = draw(st.sampled_from(["list", "tuple", "dict", "key", "set"]))
        name = draw(st.text(string.ascii_lowercase + "_", min_size=1, max_size=8))
        if wrap == "key" and isinstance(value, str):
            value = {value: 1, name: [secret]}
        elif wrap == "set" and isinstance(value, str):
            value = {value, "other"}
        elif wrap == "dict":
            value = {name: value, "steps": 3}
        else:
            value = ["x", value] if wrap == "list" else (1, value)
    return secret, value


@given(planted(shaped_secrets))
def test_secrets_of_a_known_shape_never_survive(case: tuple[str, object]) -> None:
    secret, value = case
    assert secret not in json.dumps(Masker().value(value))


@given(planted(literal_secrets))
def test_values_of_secret_variables_never_survive(case: tuple[str, object]) -> None:
    secret, value = case
    masked = Masker(secret_values({"HF_TOKEN": secret, "HOME": "/root"})).value(value)
    assert secret not in json.dumps(masked, ensure_ascii=False)
    assert json.dumps(secret)[1:-1] not in json.dumps(masked)


@given(literal_secrets)
def test_encoded_spellings_of_a_variable_never_survive(secret: str) -> None:
    masker = Masker([secret])
    for spelling in (quote(secret, safe=""), quote(secret), json.dumps(secret)):
        assert spelling.strip('"') not in masker.text(f"https://host/path?q={spelling}")


SECRET_NAMES = [
    *(
        "token",
        "hf_token",
        "HF_TOKEN",
        "hfToken",
        "--hf-token",
        "password",
        "db_password",
        "api_key",
        "apikey",
        "APIKEY",
    ),
    *("AWS_SECRET_ACCESS_KEY", "private_key", "private_key_id", "client_secret", "Authorization", "X-Amz-Signature"),
    *("x-goog-credential", "teacher.token", "key", "mytoken", "GITHUB_PAT", "cookie", "keys", "pwd", "secret_profile"),
    *("api_key_value", "max_password_tokens", "x1token", "eos_token_secret", "launchPadToken"),
]
PLAIN_NAMES = [
    *("num_key_value_heads", "num_key_value_groups", "linear_num_key_heads", "linear_key_head_dim", "key_length"),
    *(
        "max_tokens",
        "pad_token_id",
        "eos_token",
        "begin_token",
        "--sample_tokens",
        "--eval_tokens",
        "--answer_tokens",
        "sort_keys",
        "max_new_tokens",
        "additional_special_tokens",
    ),
    *("tokenizer", "tokenizer_hash", "TOKENIZERS_PARALLELISM", "keyboard", "eos_token_id", "token_file", "token_uri"),
    *(
        "HF_TOKEN_PATH",
        "SSH_AUTH_SOCK",
        "PWD",
        "author",
        "block_size",
        "passes",
        "monkeys",
        "steps",
        "prefix_token_hash",
    ),
    # of configurations in transformers, tensors, tokenizer files, types of text
    *("decoder_num_key_value_heads", "num_key_value_attention_heads", "num_key_value_heads_per_layer", "key_bias"),
    *(
        "key_multiplier",
        "share_att_key",
        "key_query_shared_bottleneck",
        "token2wav_config",
        "token_classification_bias",
    ),
    *("model.embed_tokens.weight", "embed_tokens", "attn.key.bias", "query_key_value", "added_tokens.json"),
    *("special_tokens_map", "special_tokens", "added_tokens_decoder", "turkey", "monkey", "primary_key", "public_key"),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
@given(secret=st.text(ALNUM + "+/=-_", min_size=1, max_size=20).filter(lambda s: s[0] not in "-="))
def test_anything_under_a_secret_name_is_hidden(name: str, secret: str) -> None:
    planted_text = f"zq{secret}qz"
    bare = name.lstrip("-")
    for value in (planted_text, [planted_text], {"deep": (planted_text,)}):
        assert planted_text not in json.dumps(Masker().value({"a": [{bare: value}]}))
    for argv in (
        [f"--{bare}={planted_text}"],
        [f"--{bare}", planted_text],
        ["run", f"-{bare}={planted_text} and more"],
    ):
        assert planted_text not in json.dumps(Masker().argv(argv))
        assert planted_text not in json.dumps(Masker().value({"command": argv}))
    for text in (
        f"{bare}={planted_text}",
        f"a=b={bare}={planted_text}",
        f'{{"{bare}": "{planted_text}"}}',
        f"https://host/x?{bare}={planted_text}&y=1",
        f"see {bare}: {planted_text}",
    ):
        assert planted_text not in Masker().text(text), text


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secret_names(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_plain_names(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    "value",
    [
        {
            "num_tokens": 5,
            "bytes_per_token": 36.5,
            "eos_token_id": 0,
            "tokens": [1, 2],
            "use_token": True,
            "token": None,
        },
        {"num_key_value_heads": 2, "eos_token": "<|endoftext|>", "sort_keys": True, "max_tokens": "5M"},
        '{"num_key_value_heads": 2, "eos_token": "</s>", "sort_keys": true}',
        {"manifest": "gs://bucket-2/datasets/stage1/manifests/stage1.jsonl", "weight": 0.5},
        {"wheel": "gs://b/flash_attn-2.8.3+cu12torch2.4cxx11abiTRUE-cp310-cp310-linux_x86_64.whl"},
        {"commit": "7190eb0326108989a079c2ca05bb7d15f4b75237", "sha256": "ab" * 32},
        {"teacher": "meta-llama/Llama-3.1-8B@0e9e39f249a16976918f6564b8830bc894c89659", "betas": [0.9, 0.95]},
        {"reason": "torch is built without CUDA: see https://pytorch.org/get-started?os=linux"},
        {"path": "/work/Some/Where/deeper/still/ABC1/abcdefgh"},
        ["liquid", "train", "--max_tokens=5", "--tokenizer", "gpt2", "--token-file", "/etc/hf"],
        "step 3 tokens: 1,234 tokens=12 tokens_per_second=1.5e3",
        "task-scheduling-parameters-of-the-run",
        "model.embed_tokens.weight: a weight has another shape than config.json says",
        "data_cache/tokens: this folder is damaged; /run/secrets/key: there is no such file",
        "first token: '<|endoftext|>', image_token: <image>, other_token=[PAD]",
        "key: none, --hf_token=auto, tokens: 30%",
        {"image_token": "<image>", "extra_token": "[X]", "api_key": "none", "added_tokens_decoder": {"0": {"a": "b"}}},
    ],
)
def test_what_is_no_secret_stays(value: object) -> None:
    assert Masker(secret_values({"PWD": "/work", "USE_KEY": "true", "SOME_KEY": "lm"})).value(value) == value


@pytest.mark.parametrize(
    "text",
    [
        "https://host/x?pass=S3CR3T&y=1",
        "https://host/x?y=1&sas=S3CR3T",
        "https://host/cb#code=S3CR3T",
        "//user:S3CR3T@host/x",
        "https://proxy/get?url=https%3A%2F%2Fuser%3AS3CR3T%40host%2Fx",
        "authorization: token S3CR3T",
        "Authorization: ApiKey S3CR3T",
        "pypi-AgEIcHlwaS5vcmcS3CR3T",
        "npm_abcdefghijklmnopqrstuvwxyz012345S3CR3T",
    ],
)
def test_secrets_that_look_ordinary_are_hidden(text: str) -> None:
    shown = Masker().text(text)
    assert "S3CR3T" not in shown
    assert MASK in shown
    assert ("host" in text) <= ("host" in shown)


def test_the_rest_of_a_url_stays_readable() -> None:
    url = "https://user:pw@host:8080/a/b.pt?x=1&X-Goog-Signature=abc123&y=2#frag"
    assert Masker().text(url) == "https://***@host:8080/a/b.pt?x=1&X-Goog-Signature=***&y=2#frag"
    assert Masker().text("Authorization: Bearer abcdef0123").count(MASK) >= 1
    assert Masker().text("curl -H 'X: Bearer abcdef0123' u") == "curl -H 'X: Bearer ***' u"


def test_what_is_read_again_loses_nothing_but_its_secrets() -> None:
    template = "{% set bos_token = '<s>' %}{{ api_key = 3 }} http://me:s3cr3tPassw0rd@host/a?token=abcdefgh1&x=1 y"
    config = {"key_size": 8, "eos_token": "</s>", "path": "gs://b/c.pt", "chat_template": template, "list": [template]}
    masked = Masker(["planted-literal"]).urls({**config, "spec": "planted-literal", "other": "a planted-literal b"})
    shown = template.replace("me:s3cr3tPassw0rd@", "***@").replace("token=abcdefgh1", "token=***")
    assert masked == {**config, "chat_template": shown, "list": [shown], "spec": "***", "other": "a *** b"}


def test_private_keys_and_aws_secrets() -> None:
    block = "-----BEGIN RSA PRIVATE KEY-----\nMIIabc\nxyz\n-----END RSA PRIVATE KEY-----"
    assert Masker().text(f"a {block} b") == "a *** b"
    assert Masker().text(block[:40]) == MASK  # torn
    assert Masker().text("x wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY y") == "x *** y"


def test_short_secrets_are_hidden_only_where_they_stand_alone() -> None:
    masker = Masker(secret_values({"DB_PASSWORD": "hunter2", "OTHER_KEY": "on"}))
    assert masker.value(["hunter2", "hunter2000", "on"]) == [MASK, "hunter2000", "on"]


def test_names_that_were_secrets_do_not_swallow_each_other() -> None:
    first, second = "hf_" + "a" * 30, "hf_" + "b" * 30
    assert Masker().value({first: 1, second: 2}) == {"***": 1, "***#2": 2}


def test_plain_values_become_json_ready() -> None:
    value = {"p": PurePosixPath("/a/b"), "s": {"b", "a"}, "t": (1, 2.5), "n": float("nan"), 3: None}
    assert Masker().value(value) == {"p": "/a/b", "s": ["a", "b"], "t": [1, 2.5], "n": "nan", "3": None}
    with pytest.raises(TypeError, match="model"):
        Masker().value({"model": object()})


def test_log_lines_and_tracebacks_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test_masking.log")
    handler = logging.StreamHandler()
    handler.addFilter(MaskingFilter(Masker(["s3cret-value"])))
    logger.addHandler(handler)
    try:
        logger.warning("token %s and %d", "s3cret-value", 3)
        try:
            raise OSError("cannot open https://u:p4ss@host/s3cret-value")
        except OSError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    said = capsys.readouterr().err
    assert "token *** and 3" not in said or "s3cret" not in said
    assert "s3cret-value" not in said
    assert "p4ss" not in said
    assert "cannot open" in said


# --------------------------------------------------------------------------------------------------------- linear time

PATTERNS = {name: one for name, one in vars(masking).items() if isinstance(one, re.Pattern)}
WHOLE_NAMES = ("_STRONG", "_TOKEN", "_ORDINARY", "_ORDINARY_TOKEN")  # looked for in the words of a name
ATOMS = [*"aA1_-.=:/@&'\"\\ +", "eyJ", "://", "hf_", "sk-", "ya29.", "AKIA", "token", "key", "Bearer ", "path", "num_"]
ATOMS += ["-----BEGIN ", "PRIVATE KEY-----", "-----END ", "***"]
pieces = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=5).map("".join)


@pytest.mark.parametrize("name", PATTERNS)
@given(before=pieces, pumped=pieces, after=pieces)
@settings(max_examples=30, phases=[Phase.explicit, Phase.generate])  # to shrink takes an hour
def test_the_steps_of_a_pattern_grow_as_the_text(name: str, before: str, pumped: str, after: str) -> None:
    pattern = PATTERNS[name]
    if name in WHOLE_NAMES:
        pumped, pattern = "_".join(re.findall("[a-z]+", pumped.lower())) + "_", re.compile(rf"\A(?:{pattern.pattern})")
    steps = []
    for length in (80, 160, 320):
        text, counter = before + pumped * (length // len(pumped)) + after, StepCounter(pattern)
        assert counter.spans(text) == [found.span() for found in pattern.finditer(text) if found.end() > found.start()]
        steps.append(counter.steps)
    assert steps[2] - steps[1] <= 2.5 * (steps[1] - steps[0]) + 600, steps  # quadratic: 4 times


def test_the_counter_sees_quadratic_patterns() -> None:
    """What hid assigned values before began at every letter of a word and read it to its end."""
    counter = StepCounter(re.compile(r"[A-Za-z][A-Za-z0-9_.\-]*\s*[=:]"))
    counter.spans("a" * 100)
    short, counter.steps = counter.steps, 0
    counter.spans("a" * 400)
    assert counter.steps > 12 * short


def test_a_long_word_is_looked_at_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are looked at by the piece: however they lie, their lengths add up to no more than the text's."""
    looked, secrecy = [], masking._secrecy
    monkeypatch.setattr(masking, "_secrecy", lambda name: looked.append(len(name)) or secrecy(name))
    for text in ("a" * 100_000, "a=" * 50_000, "token=***" * 10_000, "token=5&" * 10_000, "a_token: 'b" * 9_000):
        looked.clear()
        Masker().text(text)
        assert sum(looked) <= 3 * len(text)


def test_a_log_line_does_not_move_the_terminal(caplog):
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", ("evil\x1b[2J",), None)
    assert MaskingFilter(Masker()).filter(record)
    assert record.getMessage() == "evil\\x1b[2J"
