"""FlowSFTTrainer: real trainers through templates, truncation, packing, padding-free rows."""

import pytest
import torch
from datasets import Dataset

pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

from trl import SFTConfig, SFTTrainer

from flowdata import LossScorer, Scores
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.losses import causal_lm_loss
from flowdata.token_weights import token_weight_column
from tests.integrations import tiny, train_worker

PACKED = {"packing": True, "max_length": 64}
FREE = {"padding_free": True, "max_length": None}


def config(folder, **options):
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1} | options
    return SFTConfig(
        output_dir=str(folder),
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        **options,
    )


def sft(folder, cls=FlowSFTTrainer, settings=(), **options):
    options = {"train_dataset": tiny.as_hf_dataset(tiny.make_samples())} | options
    return cls(
        tiny.make_model(),
        config(folder, **dict(settings)),
        processing_class=tiny.make_tokenizer(),
        **options,
    )


def history(trainer, *names):
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [entry[name] for entry in logs for name in names]


@pytest.mark.parametrize("normalize", tiny.NORMALIZE)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_accumulated_gradients_are_those_of_the_full_batch(steps, normalize):
    expected = tiny.full_batch_gradient(tiny.make_weights(), normalize)
    tiny.assert_same_gradient(train_worker.sft(tiny.N // steps, steps, normalize), expected)


@pytest.mark.parametrize("layout", [PACKED, FREE], ids=["packed", "padding-free"])
@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("normalize", tiny.NORMALIZE)
def test_weights_follow_their_tokens_into_joined_rows(layout, token_weights, normalize):
    weights = tiny.make_token_weights(tiny.make_samples()) if token_weights else None
    expected = tiny.full_batch_gradient(weights or tiny.make_weights(), normalize)
    size, steps = (8, 1) if layout is PACKED else (8, 4)
    gradient = train_worker.sft(size, steps, normalize, token_weights=token_weights, config=layout)
    tiny.assert_same_gradient(gradient, expected)


@pytest.mark.filterwarnings("ignore:.*keep_end.*:FutureWarning")
@pytest.mark.parametrize(
    ("mode", "packing"), [("keep_start", False), ("keep_end", False), ("keep_start", True)]
)
def test_truncation_cuts_token_weights_with_their_tokens(tmp_path, mode, packing):
    samples = tiny.make_samples()
    marked = [[float(token) for token in sample["input_ids"]] for sample in samples]
    settings = {"max_length": 6, "truncation_mode": mode, "packing": packing}
    trainer = sft(
        tmp_path, settings=settings, train_dataset=tiny.as_hf_dataset(samples, weight=marked)
    )
    assert any(len(s["input_ids"]) > 6 for s in samples)
    for row in trainer.train_dataset:
        assert row["weight"] == row["input_ids"]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_every_packing_strategy_packs_weights_as_it_packs_tokens(tmp_path, strategy):
    settings = {"packing": True, "packing_strategy": strategy, "max_length": 10}
    samples = tiny.make_samples()
    marked = [[float(token) for token in sample["input_ids"]] for sample in samples]
    flow = sft(
        tmp_path, settings=settings, train_dataset=tiny.as_hf_dataset(samples, weight=marked)
    )
    plain = sft(tmp_path, SFTTrainer, settings=settings)
    for row, expected in zip(flow.train_dataset, plain.train_dataset, strict=True):
        assert row["weight"] == row["input_ids"] == expected["input_ids"]
        assert row["labels"] == expected["labels"]


@pytest.mark.parametrize(
    "settings",
    [{}, PACKED | {"shuffle_dataset": True}, FREE, {"gradient_accumulation_steps": 3}],
    ids=["padded", "packed", "padding-free", "accumulated"],
)
def test_weights_of_one_give_the_unweighted_curve_and_metrics(tmp_path, settings):
    names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
    plain = history(sft(tmp_path, SFTTrainer, settings), *names)
    flow = history(sft(tmp_path, settings=settings, scores=torch.ones(tiny.N)), *names)
    assert flow == pytest.approx(plain, rel=1e-6)


def test_weights_of_zero_give_no_gradient(tmp_path):
    trainer = sft(tmp_path, scores=torch.zeros(tiny.N))
    gradients = []
    trainer.add_callback(train_worker.record_gradients(gradients))
    assert history(trainer, "loss") == [0.0] * 4
    assert all(gradient.eq(0).all() for gradient in gradients)


def conversations():
    rows = [
        {
            "prompt": [{"role": "user", "content": f"w{3 + i} w{4 + i}"}],
            "completion": [{"role": "assistant", "content": " ".join(["w9"] * (1 + i % 4))}],
        }
        for i in range(12)
    ]
    return Dataset.from_list(rows)


def test_chat_and_completion_only_labels_carry_their_weights(tmp_path):
    weights = torch.rand(12, generator=torch.Generator().manual_seed(0))
    settings = {"per_device_train_batch_size": 12, "max_steps": 1, "max_grad_norm": 0.0}
    gradients = []
    trainer = sft(
        tmp_path,
        settings=settings,
        train_dataset=conversations(),
        scores=weights,
        callbacks=[train_worker.record_gradients(gradients)],
    )
    rows = trainer.train_dataset
    assert all(-100 in row["labels"] for row in rows)
    assert rows["weight"][:] == pytest.approx(weights.tolist())
    trainer.train()
    samples = [{k: torch.tensor(row[k]) for k in ("input_ids", "labels")} for row in rows]
    model = tiny.make_model()
    batch = tiny.collate(samples)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    causal_lm_loss(logits, batch["labels"], weights).backward()
    tiny.assert_same_gradient(gradients[0], tiny.flat_gradient(model))


def test_plain_text_is_weighted_through_its_tokenisation(tmp_path):
    text = Dataset.from_dict({"text": [f"w{1 + i} w5 w6" for i in range(8)]})
    trainer = sft(tmp_path, train_dataset=text, scores=torch.arange(8.0))
    assert trainer.train_dataset["weight"][:] == list(range(8))
    assert all(loss > 0 for loss in history(trainer, "loss"))


def test_samples_dropped_by_truncation_take_their_weights_along(tmp_path):
    left = [i for i, s in enumerate(tiny.make_samples()) if (s["labels"][:3] != -100).any()]
    trainer = sft(tmp_path, settings={"max_length": 3}, scores=torch.arange(float(tiny.N)))
    assert trainer.train_dataset["weight"][:] == left
    assert len(left) < tiny.N


def test_token_rules_apply_to_the_fused_head(tmp_path):
    for rule in ("dft", "talr", "dro"):
        expected = tiny.full_batch_gradient(tiny.make_weights(), token_rule=rule)
        tiny.assert_same_gradient(train_worker.sft(tiny.N, 1, token_rule=rule), expected)


def test_evaluation_stays_unweighted(tmp_path):
    data = {"eval_dataset": tiny.as_hf_dataset(tiny.make_samples())}
    plain = sft(tmp_path, SFTTrainer, **data).evaluate()
    flow = sft(tmp_path, scores=tiny.make_weights(), **data).evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert flow[name] == pytest.approx(plain[name], rel=1e-6)


@pytest.mark.parametrize("mode", ["token", "both"])
def test_reference_token_weights_end_to_end(tmp_path, mode):
    """Token losses of a real scorer, stored ragged, become the weights of a packed trainer."""
    dataset = tiny.as_hf_dataset(tiny.make_samples())
    scorer = LossScorer(tiny.make_model(1), token_losses=True, dtype="float32", progress=False)
    scorer.score(dataset, store=tmp_path / "scores")
    scores = Scores.load(tmp_path / "scores")
    column = token_weight_column(scores, dataset["labels"], mode=mode)
    expected = tiny.full_batch_gradient([torch.tensor(row) for row in column])
    gradients = []
    settings = PACKED | {"per_device_train_batch_size": 8, "max_steps": 1, "max_grad_norm": 0.0}
    sft(
        tmp_path,
        settings=settings,
        train_dataset=dataset.add_column("weight", column),
        callbacks=[train_worker.record_gradients(gradients)],
    ).train()
    tiny.assert_same_gradient(gradients[0], expected)


def test_modes_that_cannot_be_right_are_refused(tmp_path):
    weights, samples = tiny.make_weights(), tiny.make_samples()
    with pytest.raises(ValueError, match="use loss_type='nll' with token_rule='dft'"):
        sft(tmp_path, settings={"loss_type": "dft"}, scores=weights)
    with pytest.raises(ValueError, match="pass train_dataset=dataset, scores=scores"):
        sft(tmp_path, train_dataset=FlowWeightedDataset(samples, weights))
    text = Dataset.from_dict({"text": ["w1 w2"], "weight": [[1.0, 2.0]]})
    with pytest.raises(ValueError, match="the data set is not tokenised yet"):
        sft(tmp_path, train_dataset=text)
    with pytest.raises(ValueError, match=r"scores need a datasets.Dataset, got IterableDataset"):
        sft(
            tmp_path,
            train_dataset=tiny.as_hf_dataset(samples).to_iterable_dataset(),
            scores=weights,
        )
    with pytest.raises(ValueError, match="training would be unweighted"):
        sft(tmp_path)


@pytest.mark.parametrize("packing", [False, True])
def test_a_weight_that_is_missing_is_refused_before_the_data_is_prepared(tmp_path, packing):
    weights = tiny.make_weights().tolist()
    weights[27] = None
    data = tiny.as_hf_dataset(tiny.make_samples(), weight=weights)
    settings = {"packing": packing, "max_length": 64}
    with pytest.raises(ValueError, match=r"1 of the 32 rows of train_dataset .* is row 27: None"):
        sft(tmp_path, settings=settings, train_dataset=data)


def test_training_data_by_position_is_asked_for_by_name(tmp_path):
    data = tiny.as_hf_dataset(tiny.make_samples(), weight=tiny.make_weights().tolist())
    with pytest.raises(TypeError, match="train_dataset came by position; pass it, and"):
        FlowSFTTrainer(tiny.make_model(), config(tmp_path), None, data)


def test_evaluation_takes_weighted_data_apart(tmp_path):
    data, weights = tiny.as_hf_dataset(tiny.make_samples()), tiny.make_weights()
    expected = sft(tmp_path, SFTTrainer).evaluate(data)["eval_loss"]
    weighted = FlowWeightedDataset(data, weights)
    for eval_dataset in (weighted, {"eval": weighted}):
        flow = sft(tmp_path, scores=weights, eval_dataset=eval_dataset)
        name = "eval_eval_loss" if isinstance(eval_dataset, dict) else "eval_loss"
        assert flow.evaluate()[name] == pytest.approx(expected, rel=1e-6)
        assert flow.evaluate(weighted)["eval_loss"] == pytest.approx(expected, rel=1e-6)
