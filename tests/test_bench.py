import functools
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowdata.cli import bench_run
from flowdata.cli.bench_inputs import lognormal_lengths, random_samples
from flowdata.cli.bench_yardsticks import flops, usual_loop
from flowdata.cli.main import main
from tests import reference, zoo
from tests.models import tiny_llama, token_samples


def test_the_usual_loop_gives_the_losses_of_one_sample_at_a_time():
    model, samples = tiny_llama().eval(), token_samples(11)
    expected = [reference.causal_lm_sample_loss(model, sample)[0] for sample in samples]
    found = usual_loop(model, samples, batch_size=4)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_operations_are_those_that_torch_counts():
    """All tokens but the last are targets; torch counts all of attention, not its causal half."""
    model = tiny_llama(attn_implementation="eager").eval()
    sample = {"input_ids": torch.arange(20), "labels": torch.arange(20)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=sample["input_ids"][None])
    attention = 2 * 2 * 32 * 2 * 20**2  # two products, two layers of width 32
    head_of_one = 2 * 32 * 199  # whose next token there is not
    expected = counter.get_total_flops() - attention / 2 - head_of_one
    assert flops(model, [sample]) == expected
    prompt = {**sample, "labels": torch.where(torch.arange(20) < 15, -100, torch.arange(20))}
    assert flops(model, [prompt]) == expected - 14 * head_of_one


def test_a_token_counts_the_experts_that_it_runs_through():
    model = zoo.decoder("mixtral").eval()
    model.config._experts_implementation = "eager"  # torch does not count a grouped product
    model.config._attn_implementation = "eager"
    sample = {"input_ids": torch.arange(20), "labels": torch.arange(20)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=sample["input_ids"][None])
    config = model.config
    width = config.num_attention_heads * config.head_dim
    attention = 2 * 2 * width * config.num_hidden_layers * 20**2
    head_of_one = 2 * model.lm_head.weight.numel()
    routers = 2 * 20 * config.num_local_experts * config.hidden_size * config.num_hidden_layers
    expected = counter.get_total_flops() - attention / 2 - head_of_one - routers
    assert flops(model, [sample]) == expected


def test_samples_share_a_template_and_have_the_lengths_asked_for():
    generator = torch.Generator().manual_seed(0)
    samples = random_samples([(3, 2), (1, 4)], generator=generator, template=5)
    assert [len(sample["input_ids"]) for sample in samples] == [10, 10]
    assert torch.equal(samples[0]["input_ids"][:5], samples[1]["input_ids"][:5])
    assert [(sample["labels"] == -100).sum().item() for sample in samples] == [8, 6]
    lengths = torch.tensor(lognormal_lengths(2000, generator)).float()
    assert lengths.min() >= 1
    assert 150 < lengths.sum(1).mean() < 250


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(
        bench_run, "random_llama", functools.partial(bench_run.random_llama, width=192)
    )
    monkeypatch.setattr(
        bench_run, "matmul_rate", functools.partial(bench_run.matmul_rate, size=256)
    )


@pytest.mark.usefixtures("small")
def test_a_short_measurement_says_what_it_found(capsys):
    assert main(["bench", "--json", "--dtype", "float32", "--device", "cpu", "--samples", "2"]) == 0
    printed = capsys.readouterr()
    assert "guess" not in printed.err  # which a random model does no better than
    measurement = bench_run.Measurement(**json.loads(printed.out))
    assert measurement.ratio == pytest.approx(measurement.flowdata / measurement.usual_loop)
    assert measurement.largest_difference < 1e-3
    assert measurement.share_of_matmul > 0
    assert "float32 on cpu" in str(measurement)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples must be a positive number, got 0"):
        bench_run.run_bench(samples=0)
