"""Teachers in 8 bits: what is kept, what it computes, what it takes, and what is refused before anything is read."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.support.gguf_files import write_gguf
from tests.support.models import tiny_model
from tests.support.tokenizers import tiny_tokenizer

from liquid_llm.errors import ModelError, UsageError
from liquid_llm.memory.fake import weight_bytes
from liquid_llm.memory.shapes import ModelShape
from liquid_llm.models import quantised
from liquid_llm.models.heads import hidden_states, output_head
from liquid_llm.models.loading import identify, load_teacher
from liquid_llm.models.quantised import Int8Linear, check_own, explain, own_quantisation, require_whole
from liquid_llm.optimizers import quiet_torchao

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="comes with the extra quantize")
FAMILIES = ("llama", "lfm2", "gptj", "mixtral")  # tied head; convolutions; head of its own with a bias; experts
IDS = torch.arange(40).reshape(2, 20) % 128


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved teacher of each family, with a tokenizer."""
    found = {}
    for name in (*FAMILIES, "gpt2", "mamba"):
        folder = found[name] = tmp_path_factory.mktemp(name)
        tiny_model(name, vocab_size=512).save_pretrained(folder)
        tiny_tokenizer(512).save_pretrained(folder)
    return found


def open_teacher(folder: Path, dtype: torch.dtype = torch.float32, quantise: str | None = None):
    return load_teacher(str(folder), dtype=dtype, device="cpu", quantise=quantise)


@needs_torchao
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_is_within_half_a_step_of_what_it_was_and_all_else_is_as_it_was(folders, name):
    plain, narrow = (open_teacher(folders[name], quantise=one).model for one in (None, "int8"))
    there = dict(plain.named_modules())
    maps = {key: one for key, one in narrow.named_modules() if isinstance(one, Int8Linear)}
    assert maps
    for key, one in maps.items():
        step = one.scale
        error = (one.weight * one.scale - there[key].weight).abs()
        assert torch.all(error <= step * 0.5 + 1e-6 + step * (one.weight == 127) * 0.5)  # the largest is cut to 127
    rest = {key: value for key, value in narrow.state_dict().items() if key.rpartition(".")[0] not in maps}
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in rest.items())
    assert output_head(narrow).weight.dtype == torch.float32
    assert not any(one.requires_grad for one in narrow.parameters())


@needs_torchao
@pytest.mark.parametrize("name", FAMILIES)
def test_it_computes_what_a_plain_model_of_its_written_out_weights_computes(folders, name):
    plain, narrow = (open_teacher(folders[name], quantise=one).model for one in (None, "int8"))
    exact = hidden_states(plain, IDS)
    for key, one in narrow.named_modules():
        if isinstance(one, Int8Linear):
            plain.get_submodule(key).weight.data = one.weight * one.scale
    with torch.no_grad():
        assert torch.equal(hidden_states(narrow, IDS), hidden_states(plain, IDS))
        assert 0 < float((hidden_states(narrow, IDS) - exact).norm() / exact.norm()) < 0.05


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_memory_is_known_to_the_byte_without_weights(folders, name, dtype):
    narrow = open_teacher(folders[name], dtype, "int8").model
    real = sum(one.nbytes for one in narrow.parameters())
    shape = ModelShape.of(narrow.config, dtype, "int8")
    assert weight_bytes(shape) == real < weight_bytes(ModelShape.of(narrow.config, dtype))


@needs_torchao
@pytest.mark.skipif(find_spec("gguf") is None, reason="comes with the extra gguf")
def test_a_packed_file_is_kept_in_8_bits_as_its_folder_is(tmp_path):
    """It is written out on the host first, and then quantised by another way; the whole numbers are the same."""
    model, tokenizer = tiny_model("llama", vocab_size=512), tiny_tokenizer(512)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    packed = write_gguf(tmp_path / "teacher.gguf", model, tokenizer)
    one, other = (open_teacher(place, quantise="int8") for place in (tmp_path / "folder", packed))
    assert one.identity != other.identity
    assert other.identity.quantisation == "int8"
    state = one.model.state_dict()
    assert state.keys() == other.model.state_dict().keys()
    for name, tensor in other.model.state_dict().items():
        assert tensor.dtype == state[name].dtype, name
        torch.testing.assert_close(tensor.float(), state[name].float(), rtol=1e-5, atol=1e-6, msg=name)


@needs_torchao
def test_what_cannot_be_kept_in_8_bits_is_refused_in_words(folders):
    gpt2 = open_teacher(folders["gpt2"], quantise="int8").model  # its maps are transformers' own
    with pytest.raises(ModelError, match="nothing of this model can be kept in 8 bits"):
        explain(gpt2, "int8", "float32")
    with pytest.raises(ModelError, match="cannot be computed with its linear maps in int8"):
        open_teacher(folders["mamba"], quantise="int8")


@needs_torchao
def test_a_model_in_8_bits_is_another_teacher(folders):
    plain, narrow = (open_teacher(folders["llama"], quantise=one) for one in (None, "int8"))
    assert plain.identity != narrow.identity
    assert narrow.identity == identify(str(folders["llama"]), narrow.identity.tokenizer_hash, quantise="int8")
    assert "quantisation" not in plain.identity.plain()
    assert narrow.identity.plain() == {**plain.identity.plain(), "quantisation": "int8"}
    choice = explain(narrow.model, "int8", "float32")
    assert choice is not None
    assert " weights, the others float32" in choice.reason


def with_config(method: str | None, **more: object) -> SimpleNamespace:
    return SimpleNamespace(quantization_config={"quant_method": method, **more})


def test_a_checkpoint_that_comes_quantised_is_refused_where_its_package_is_not(monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    for method, package in {
        "compressed-tensors": "compressed-tensors",
        "torchao": "torchao",
        "bitsandbytes": "bitsandbytes",
        "awq": "gptqmodel",
        "gptq": "gptqmodel",
    }.items():
        with pytest.raises(UsageError, match=f"nstall {package}( optimum)? with pip"):
            check_own(with_config(method), "a model", "cuda")
    old = {"quantization_config": {"load_in_8bit": True}}
    assert own_quantisation(old) == "bitsandbytes"
    check_own(SimpleNamespace(), "a plain model", "cpu")


def test_one_that_needs_a_gpu_is_refused_without_and_none_is_quantised_twice(monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="needs a GPU"):
        check_own(with_config("awq"), "a model", "cpu")
    check_own(with_config("awq"), "a model", "cuda")
    with pytest.raises(UsageError, match="quantised already"):
        check_own(with_config("torchao"), "a model", "cuda", "int8")


def test_the_package_is_asked_for_before_the_weights_are_read(folders, monkeypatch, tmp_path):
    for one in folders["llama"].iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes() if one.suffix != ".safetensors" else b"")
    config = json.loads((tmp_path / "config.json").read_text())
    made = {"quant_method": "compressed-tensors", "config_groups": {}, "format": "int-quantized"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": made}))
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="nstall compressed-tensors with pip"):
        open_teacher(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'liquid-llm\[quantize\]'"):
        open_teacher(folders["llama"], quantise="int8")


def test_a_student_is_never_of_quantised_weights():
    with pytest.raises(ModelError, match="a student is trained"):
        require_whole(with_config("awq"), "a model")
    require_whole(SimpleNamespace(), "a plain model")


def as_compressed_tensors(folder: Path, to: Path, form: str) -> None:
    """The checkpoint in ``folder`` as compressed-tensors writes one in 8 bits: whole numbers, or packed in words."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    found = load_file(to / "model.safetensors")
    for name in [one for one in found if one.endswith("_proj.weight")]:
        weight, stem = found.pop(name), name.removesuffix(".weight")
        scale = weight.abs().amax(1, keepdim=True) / 127
        numbers = (weight / scale).round().to(torch.int8)
        found[f"{stem}.weight_scale"] = scale
        if form == "int-quantized":
            found[name] = numbers
            continue
        words = (numbers.numpy().astype("int16") + 128).astype("uint8").view("<i4")
        found |= {f"{stem}.weight_packed": torch.from_numpy(words), f"{stem}.weight_shape": torch.tensor(weight.shape)}
    save_file(found, to / "model.safetensors", {"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    rounded = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "format": form}
    group |= {"input_activations": rounded} if form == "int-quantized" else {}
    config = json.loads((to / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    (to / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(find_spec("compressed_tensors") is None, reason="needs the package compressed-tensors")
@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
def test_a_checkpoint_of_compressed_tensors_opens_and_stays_in_8_bits(folders, tmp_path, form):
    as_compressed_tensors(folders["llama"], tmp_path, form)
    plain, narrow = open_teacher(folders["llama"]), open_teacher(tmp_path)
    maps = {key: one for key, one in narrow.model.named_modules() if isinstance(one, Int8Linear)}
    assert len(maps) == 14
    for key, one in maps.items():
        written, was = one.weight * one.scale, plain.model.get_submodule(key).weight
        assert torch.all((written - was).abs() <= one.scale * 0.5001)
    assert narrow.identity.revision != plain.identity.revision
    real = sum(one.nbytes for one in narrow.model.parameters())
    assert weight_bytes(ModelShape.of(narrow.model.config, torch.float32)) == real
    choice = explain(narrow.model, None, "float32")
    assert choice is not None
    assert choice.value == "compressed-tensors"


@needs_torchao
def test_a_checkpoint_of_torchao_opens_and_stays_in_8_bits(folders, tmp_path):
    with quiet_torchao():
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        asked = TorchAoConfig(Int8WeightOnlyConfig())
        made = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float32, quantization_config=asked)
    made.save_pretrained(tmp_path)
    tiny_tokenizer(512).save_pretrained(tmp_path)
    own, ours = open_teacher(tmp_path).model, open_teacher(folders["llama"], quantise="int8").model
    assert own.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in own.state_dict().items())
    shape = ModelShape.of(own.config, torch.float32)
    assert weight_bytes(shape) == sum(one.nbytes for one in own.parameters())
