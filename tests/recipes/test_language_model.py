"""The decoder, generation, and the module that trains a causal language model."""

import math
from functools import partial

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F

from recipes.language_model import CausalLM, Decoder, TextData
from recipes.language_model.data import IGNORED
from recipes.language_model.decoder import rotary_angles, rotate
from recipes.language_model.generation import generate
from recipes.language_model.metrics import ExponentialOfRatio, RatioOfSums
from recipes.language_model.sources import Document
from recipes.language_model.transformers_models import transformers_causal_lm
from recipes.optimization import warmup_cosine

SMALL = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2}


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    network = Decoder(50, **SMALL)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def test_later_tokens_do_not_change_earlier_logits(decoder):
    first = tokens(2, 10)
    second = first.clone()
    second[:, 6:] = (second[:, 6:] + 1) % 50
    before, after = decoder(first), decoder(second)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().amax(dim=-1).min() > 1e-3


def test_earlier_tokens_change_later_logits(decoder):
    first = tokens(1, 10)
    second = first.clone()
    second[:, 0] += 1
    assert (decoder(first)[:, 1:] - decoder(second)[:, 1:]).abs().amax(dim=-1).min() > 1e-6


def test_logits_depend_on_distances_not_on_where_the_text_begins(decoder):
    text = tokens(2, 9)
    assert torch.allclose(decoder(text), decoder(text, torch.arange(100, 109)), atol=1e-4)
    assert not torch.allclose(decoder(text), decoder(text, 2 * torch.arange(9)), atol=1e-3)


def test_rotation_keeps_lengths_and_turns_by_the_angle():
    features = torch.zeros(1, 1, 3, 4)
    features[..., 0] = 1.0
    turned = rotate(features, rotary_angles(torch.arange(3), 4, 10000.0))
    assert torch.allclose(turned.norm(dim=-1), torch.ones(1, 1, 3))
    assert turned[0, 0, 2, 0] == pytest.approx(math.cos(2.0))
    assert turned[0, 0, 2, 2] == pytest.approx(math.sin(2.0))


def test_grouped_queries_equal_repeated_keys_and_values(decoder):
    full = Decoder(50, **{**SMALL, "num_kv_heads": 4}).eval()
    state = decoder.state_dict()
    for name in [name for name in state if name.endswith(("key.weight", "value.weight"))]:
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    assert torch.allclose(full(tokens(2, 7)), decoder(tokens(2, 7)), atol=1e-4)


def test_decoder_from_the_meta_device_needs_only_its_parameters(decoder):
    with torch.device("meta"):
        empty = Decoder(50, **SMALL)
    assert list(empty.buffers()) == []
    built = empty.to_empty(device="cpu")
    built.load_state_dict(decoder.state_dict())
    assert not any(tensor.is_meta for tensor in built.state_dict().values())
    assert torch.equal(built.eval()(tokens(2, 7)), decoder(tokens(2, 7)))


@pytest.mark.parametrize("tied", [True, False])
def test_initial_loss_is_that_of_a_guess(tied):
    torch.manual_seed(0)
    network = Decoder(50, **SMALL, tie_embedding=tied)
    # Other targets than the inputs, which a tied decoder likes from the beginning.
    targets = (tokens(8, 16) + 7) % 50
    loss = F.cross_entropy(network(tokens(8, 16)).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)
    assert (network.head.weight is network.embedding.weight) == tied


def test_writers_to_the_residual_stream_begin_smaller():
    torch.manual_seed(0)
    network = Decoder(500, width=128, depth=8, num_heads=4)
    block = network.blocks[0]
    assert float(block.attention.query.weight.std()) == pytest.approx(0.02, rel=0.05)
    for writer in (block.attention.output, block.feed_forward.down):
        assert float(writer.weight.std()) == pytest.approx(0.02 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 30}, "num_heads=4 does not divide width=30"),
        ({"num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"width": 12}, "3 features per head, which is odd"),
    ],
)
def test_heads_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Decoder(50, **{**SMALL, **sizes})


def test_generation_adds_what_was_asked_and_keeps_the_prompt(decoder):
    prompt = tokens(2, 5)
    longer = generate(decoder, prompt, 7, context_length=6)
    assert longer.shape == (2, 12)
    assert torch.equal(longer[:, :5], prompt)
    assert int(longer.min()) >= 0
    assert int(longer.max()) < 50


def test_greedy_generation_takes_the_likeliest_token_each_time(decoder):
    longer = generate(decoder, tokens(1, 4), 5, temperature=0)
    assert torch.equal(decoder(longer)[0, 3:-1].argmax(-1), longer[0, 4:])


def test_generation_shows_the_model_no_more_than_its_context(decoder):
    lengths = []

    def spy(shown):
        lengths.append(shown.shape[1])
        return decoder(shown)

    generate(spy, tokens(1, 3), 4, context_length=4)
    assert lengths == [3, 4, 4, 4]


def test_generation_without_a_prompt_or_with_negative_temperature_is_refused(decoder):
    with pytest.raises(ValueError, match="the prompt has no token"):
        generate(decoder, tokens(1, 0), 1)
    with pytest.raises(ValueError, match="temperature=-1 is negative"):
        generate(decoder, tokens(1, 1), 1, temperature=-1)


def test_ratio_is_of_the_sums_not_the_mean_of_ratios():
    ratio, exponential = RatioOfSums(), ExponentialOfRatio()
    for metric in (ratio, exponential):
        metric.update(torch.tensor(1.0), torch.tensor(1))
        metric.update(torch.tensor([2.0, 3.0]), torch.tensor([9, 10]))
    assert float(ratio.compute()) == 6 / 20
    assert float(exponential.compute()) == pytest.approx(math.exp(6 / 20))


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2}),
        (
            "llama",
            {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        ),
    ],
)
def test_transformers_models_train_as_the_decoder_does(model_type, sizes):
    module = CausalLM(
        partial(transformers_causal_lm, model_type, vocab_size=50, **sizes), partial(torch.optim.AdamW, lr=1e-3)
    )
    module.configure_model()
    assert module(tokens(2, 6)).shape == (2, 6, 50)


def test_transformers_arguments_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"gpt2 has no n_layers; it has .*n_layer"):
        transformers_causal_lm("gpt2", n_layers=1)
    with pytest.raises(ValueError, match="gpt9"):
        transformers_causal_lm("gpt9")


@pytest.fixture
def data(tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 6 for i in range(30)]
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return TextData(
        lambda: documents,
        vocab_size=280,
        sequence_length=24,
        batch_size=5,
        prompts=["def f", "return"],
        cache=tmp_path,
    )


def run_of(module, data, **arguments):
    run = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    run.fit(module, datamodule=data)
    return run


def test_logged_losses_equal_the_sums_over_the_held_out_text(data):
    L.seed_everything(0, verbose=False)
    module = CausalLM(partial(Decoder, 280, **SMALL), partial(torch.optim.AdamW, lr=1e-2), warmup_cosine)
    run = run_of(module, data, max_steps=30)
    [logged] = run.validate(module, datamodule=data, verbose=False)

    corpus = data.corpus
    held_out = [d for d in data._source() if d.text in corpus.decode(corpus.tokens["val"])]
    num_bytes = sum(document.num_bytes for document in held_out)
    nats, num_tokens = 0.0, 0
    with torch.no_grad():
        for batch in data.val_dataloader():
            logits = module.eval()(batch["inputs"]).double().log_softmax(-1)
            for row, targets in zip(logits, batch["targets"], strict=True):
                for position, target in enumerate(targets.tolist()):
                    if target != IGNORED:
                        nats -= float(row[position, target])
                        num_tokens += 1
    assert num_tokens == len(corpus.tokens["val"]) - 1
    assert logged["val/loss"] == pytest.approx(nats / num_tokens, rel=1e-6)
    assert logged["val/perplexity"] == pytest.approx(math.exp(nats / num_tokens), rel=1e-6)
    assert logged["val/loss_per_byte"] == pytest.approx(nats / num_bytes, rel=1e-6)
    assert logged["val/bits_per_byte"] == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)
    assert logged["val/loss_per_byte"] < logged["val/unigram_loss_per_byte"]


def test_prediction_continues_the_prompts_as_text(data):
    module = CausalLM(partial(Decoder, 280, **SMALL), partial(torch.optim.AdamW, lr=1e-2), sample_tokens=6)
    run = run_of(module, data, max_steps=2, limit_val_batches=0)
    samples = [text for batch in run.predict(module, datamodule=data) for text in batch]
    assert len(samples) == 2
    for prompt, sample in zip(data.prompts, samples, strict=True):
        assert sample.startswith(prompt)
        assert len(sample) > len(prompt)
