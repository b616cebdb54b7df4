"""A sample is drawn from the model's own softmax, and from its own seed alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vtmix.config import load
from vtmix.encode import load_tokenizer
from vtmix.errors import ConfigError, DetectionError
from vtmix.generate import TransformersGenerator, _draw, sample_of, sampling, start_of, uniforms
from vtmix.samples import Sample, sample_seed


@pytest.fixture
def settings(project):
    """The sampling of a small configuration; keyword arguments override `detection`."""
    return lambda **detection: sampling(load(project(detection=detection)))


def seeds(count: int, start: int = 0) -> list[int]:
    return [sample_seed(7, 1, index) for index in range(start, start + count)]


def altered(model: Path, folder: Path, change) -> Path:
    """A copy of a model folder whose model went through `change`."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    change(loaded)
    loaded.save_pretrained(folder)
    return folder


def silent(model) -> None:
    """Makes a model end every text at once: all its hidden states are equal, and the end token's logit is largest."""
    import torch

    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[2] = 10.0


def test_seeds_do_not_change_between_versions():
    assert sample_seed(7, 1, 0) == 0x59E9068170181469 >> 1  # printf 7/1/0 | sha256sum
    assert uniforms([sample_seed(7, 1, 0)], 2)[0].tolist() == [0.6582955094497642, 0.2883268862777636]


def test_every_sample_has_a_seed_of_its_own():
    found = {sample_seed(run, iteration, index) for run in range(3) for iteration in range(3) for index in range(300)}
    assert len(found) == 3 * 3 * 300
    assert all(0 <= seed < 2**63 for seed in found)


def test_a_row_of_numbers_depends_on_its_seed_alone():
    together = uniforms(seeds(8), 16)
    assert together.shape == (8, 16)
    assert (uniforms(seeds(1, start=5), 16)[0] == together[5]).all()
    assert ((together >= 0) & (together < 1)).all()


def test_equal_seeds_give_equal_samples_whatever_stands_beside_them(settings):
    generator = TransformersGenerator(settings())
    block = generator(seeds(8))
    assert generator(seeds(8)) == block
    assert generator(seeds(4, start=4) + seeds(4)) == block[4:] + block[:4]
    assert generator(seeds(8, start=100)) != block


def test_first_tokens_follow_the_models_softmax(settings, tiny_model):
    import torch
    from transformers import AutoModelForCausalLM

    drawn = settings(max_tokens=1)
    generator = TransformersGenerator(drawn)
    count = 8000
    samples = generator(seeds(count))
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([[drawn.start_id]])).logits[0, -1]
    expected = torch.softmax(logits.double(), -1).numpy() * count
    stops = list(drawn.stop_ids)
    found = np.bincount([sample.token_ids[0] for sample in samples if sample.token_ids], minlength=len(expected))
    assert sum(found) + sum(sample.finish_reason == "stop" for sample in samples) == count
    kept = np.setdiff1d(np.arange(len(expected)), stops)
    chi_square = ((found[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    # 509 degrees of freedom: mean 509, standard deviation 32.
    assert chi_square < 509 + 5 * 32
    assert abs(count - sum(found) - expected[stops].sum()) < 5 * np.sqrt(expected[stops].sum())


def test_a_model_that_gives_no_probabilities_is_no_generator():
    drawn = _draw(torch.tensor([[0.5], [0.5]], dtype=torch.float64))
    ids, logits = torch.zeros((2, 1), dtype=torch.int64), torch.zeros((2, 4))
    assert drawn(ids, logits).isfinite().sum() == 2
    logits[1, 2] = torch.nan
    with pytest.raises(DetectionError, match="not a number"):
        drawn(ids, logits)


def test_the_models_generation_defaults_do_not_act(project, settings, tiny_model, tmp_path):
    plain = TransformersGenerator(settings())(seeds(8))
    bent = shutil.copytree(tiny_model, tmp_path / "bent")
    defaults = json.loads((bent / "generation_config.json").read_text())
    defaults |= {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "min_length": 16}
    (bent / "generation_config.json").write_text(json.dumps(defaults))
    found = sampling(load(project(model=str(bent))))
    assert TransformersGenerator(found)(seeds(8)) == plain


def test_texts_end_at_a_stop_token_or_at_max_tokens(settings):
    samples = TransformersGenerator(settings(max_tokens=200))(seeds(48))
    reasons = {sample.finish_reason for sample in samples}
    assert reasons == {"length", "stop"}
    for sample in samples:
        assert (len(sample.token_ids) == 200) == (sample.finish_reason == "length")
        assert not {0, 2} & set(sample.token_ids)


def test_a_stop_token_as_the_last_of_max_tokens_is_a_stop(project, settings, tiny_model, tmp_path):
    model = altered(tiny_model, tmp_path / "silent", silent)
    (only, *rest) = TransformersGenerator(sampling(load(project(model=str(model), detection={"max_tokens": 1}))))(
        seeds(3)
    )
    assert (only.text, only.token_ids, only.finish_reason) == ("", (), "stop")
    assert rest == [only, only]


def test_a_start_token_that_ends_texts_still_starts_them(settings):
    samples = TransformersGenerator(settings(start_token="<|im_end|>"))(seeds(8))
    assert all(sample.token_ids for sample in samples)


def test_the_start_token_stands_once_though_the_tokenizer_adds_one(project, tiny_model, tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    adding = shutil.copytree(tiny_model, tmp_path / "adding")
    tokenizer = AutoTokenizer.from_pretrained(adding)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(adding)
    assert load_tokenizer(str(adding))("def").input_ids[0] == 0
    plain, added = (sampling(load(project(model=str(model)))) for model in (tiny_model, adding))
    assert (added.start_token, added.start_id) == ("<|endoftext|>", 0)
    assert prompts_of(added) == [[[0]] * 4]
    assert TransformersGenerator(added)(seeds(8)) == TransformersGenerator(plain)(seeds(8))


def test_without_a_bos_the_eos_token_starts(project, tiny_model, tmp_path):
    from transformers import AutoTokenizer

    bare = shutil.copytree(tiny_model, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(bare)
    found = sampling(load(project(model=str(bare))))
    assert (found.start_token, found.start_id) == ("<|im_end|>", 2)
    assert prompts_of(found) == [[[2]] * 4]


def prompts_of(settings) -> list[list[list[int]]]:
    """The prompts that reach the model when it samples four texts."""
    generator = TransformersGenerator(settings)
    seen = []
    forward = generator._model.forward

    def spy(*args, **kwargs):
        seen.append(kwargs["input_ids"].tolist())
        return forward(*args, **kwargs)

    generator._model.forward = spy
    generator(seeds(4))
    return seen[:1]


@pytest.mark.parametrize("token", ["two words", "<|nothing|>", ""])
def test_a_start_token_that_is_not_one_token_names_those_there_are(tiny_model, token):
    with pytest.raises(ConfigError, match=r"set detection\.start_token .* '<\|endoftext\|>', .*'<\|im_start\|>'"):
        start_of(load_tokenizer(str(tiny_model)), token)


def test_more_tokens_than_the_context_holds_are_refused(settings):
    assert settings(max_tokens=255).max_tokens == 255
    with pytest.raises(ConfigError, match="context of 256 tokens: set it to 255 or less"):
        settings(max_tokens=256)


def test_bytes_that_are_no_text_still_make_a_sample(settings, tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    first = tokenizer.get_vocab()["Ã"]  # the first byte of a two-byte character
    assert sample_of([first] * 3, settings(), tokenizer) == Sample("\ufffd" * 3, (first,) * 3, "length")
