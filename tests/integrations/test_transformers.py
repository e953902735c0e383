"""FlowTrainer: real Trainers on tiny models."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
)
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from flowdata import LossScorer, ScoreMismatchError, Scores
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.transformers import FlowTrainer, FlowTrainerMixin
from flowdata.losses import weighted_mean
from flowdata.sampler import FlowSampler
from flowdata.streaming import FlowWeightedIterable
from tests.integrations import tiny, train_worker


def arguments(folder, **options):
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        **options,
    }
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )


def flow_trainer(folder, cls=FlowTrainer, model=None, **options):
    settings = options.pop("settings", {})
    options = {"train_dataset": tiny.make_samples(), "data_collator": tiny.collate} | options
    return cls(model or tiny.make_model(), arguments(folder, **settings), **options)


def curve(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("normalize", tiny.NORMALIZE)
@pytest.mark.parametrize("steps", [1, 4, 16])
def test_accumulated_gradients_are_those_of_the_full_batch(steps, normalize):
    expected = tiny.full_batch_gradient(tiny.make_weights(), normalize)
    gradient = train_worker.trainer(tiny.N // steps, steps, normalize)
    tiny.assert_same_gradient(gradient, expected)


@pytest.mark.parametrize("steps", [1, 3])
def test_weights_of_one_give_the_unweighted_curve(tmp_path, steps):
    settings = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": 2}
    plain = flow_trainer(tmp_path, Trainer, settings=settings)
    flow = flow_trainer(tmp_path, scores=torch.ones(tiny.N), settings=settings)
    assert curve(flow) == pytest.approx(curve(plain), rel=1e-6)
    torch.testing.assert_close(parameters(flow), parameters(plain), rtol=1e-5, atol=1e-6)


def test_weights_of_zero_give_no_gradient(tmp_path):
    settings = {"optim": "sgd", "learning_rate": 1.0}
    trainer = flow_trainer(tmp_path, scores=torch.zeros(tiny.N), settings=settings)
    before = parameters(trainer)
    assert curve(trainer) == [0.0] * 6
    assert torch.equal(parameters(trainer), before)


def test_scores_are_checked_and_turned_into_weights(tmp_path):
    samples, losses = tiny.make_samples(), torch.rand(tiny.N)
    trainer = flow_trainer(tmp_path, scores=Scores(losses), temperature=0.5)
    weights = [trainer.train_dataset[i]["weight"] for i in range(tiny.N)]
    torch.testing.assert_close(torch.stack(weights), torch.exp(-losses / 0.5))
    with pytest.raises(ScoreMismatchError, match=f"of {tiny.N} samples, the data set has 31"):
        flow_trainer(tmp_path, scores=Scores(losses), train_dataset=samples[:-1])


class Tuples(Dataset):
    """Samples as (ids, labels) tuples, with a collator that makes a mapping of them."""

    def __init__(self):
        self.samples = tiny.make_samples()

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return tuple(self.samples[index].values())

    @staticmethod
    def collate(samples):
        return tiny.collate([{"input_ids": ids, "labels": labels} for ids, labels in samples])


def layouts():
    samples, weights = tiny.make_samples(), tiny.make_weights()
    hf = tiny.as_hf_dataset(samples, text=["x"] * len(samples)).with_format("torch")
    wide = FlowWeightedDataset([{**s, "text": "x"} for s in samples], weights)
    return {
        "hf with scores": {"train_dataset": hf, "scores": weights},
        "hf with a column": {
            "train_dataset": tiny.as_hf_dataset(samples, weight=weights.numpy()).with_format(
                "torch"
            )
        },
        "hf with token weights": {
            "train_dataset": tiny.as_hf_dataset(
                samples,
                weight=[
                    [w] * len(s["input_ids"])
                    for w, s in zip(weights.tolist(), samples, strict=True)
                ],
            ).with_format("torch")
        },
        "weighted pairs": {"train_dataset": wide},
        "weighted dicts": {
            "train_dataset": FlowWeightedDataset(wide.dataset, weights, layout="dict", key="w"),
            "weight_key": "w",
        },
        "tuples": {
            "train_dataset": Tuples(),
            "scores": weights,
            "data_collator": Tuples.collate,
        },
    }


@pytest.mark.parametrize("layout", list(layouts()))
def test_weights_survive_columns_and_collators(tmp_path, layout):
    gradients = []
    flow_trainer(
        tmp_path,
        callbacks=[train_worker.record_gradients(gradients)],
        settings={"per_device_train_batch_size": tiny.N, "max_steps": 1, "max_grad_norm": 0.0},
        **layouts()[layout],
    ).train()
    tiny.assert_same_gradient(gradients[0], tiny.full_batch_gradient(tiny.make_weights()))


def test_streams_bring_their_weights_along(tmp_path):
    stream = tiny.as_hf_dataset(tiny.make_samples(), weight=tiny.make_weights().numpy())
    stream = stream.with_format("torch").to_iterable_dataset()
    gradients = []
    flow_trainer(
        tmp_path,
        train_dataset=stream,
        callbacks=[train_worker.record_gradients(gradients)],
        settings={"per_device_train_batch_size": tiny.N, "max_steps": 1, "max_grad_norm": 0.0},
    ).train()
    tiny.assert_same_gradient(gradients[0], tiny.full_batch_gradient(tiny.make_weights()))


def test_a_stream_that_resamples_is_trained_on_with_the_plain_loss(tmp_path):
    options = {"window": 8, "collate_fn": tiny.collate, "resample": True}
    scorer = LossScorer(tiny.make_model(), progress=False)
    stream = FlowWeightedIterable(tiny.make_samples(), scorer, **options)
    trainer = flow_trainer(tmp_path, train_dataset=stream, settings={"max_steps": 2})
    plain = flow_trainer(
        tmp_path,
        Trainer,
        train_dataset=FlowWeightedIterable(tiny.make_samples(), scorer, **options),
        settings={"max_steps": 2},
    )
    assert curve(trainer) == curve(plain)


def test_evaluation_stays_unweighted(tmp_path):
    weighted = FlowWeightedDataset(tiny.make_samples(), tiny.make_weights(), layout="dict")
    settings = {"per_device_eval_batch_size": 5}
    plain = flow_trainer(
        tmp_path, Trainer, eval_dataset=tiny.make_samples(), settings=settings
    ).evaluate()
    for eval_dataset in (tiny.make_samples(), weighted):
        flow = flow_trainer(
            tmp_path, scores=tiny.make_weights(), eval_dataset=eval_dataset, settings=settings
        )
        assert flow.evaluate()["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    flow.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape[0]}
    assert flow.evaluate()["eval_shape"] == tiny.N


def test_evaluation_takes_weighted_data_apart(tmp_path):
    samples, weights = tiny.make_samples(), tiny.make_weights()
    wide = tiny.as_hf_dataset(samples, text=["x"] * len(samples)).with_format("torch")
    weighted = [FlowWeightedDataset(wide, weights, layout=name) for name in ("pair", "dict")]
    options = {"train_dataset": wide, "settings": {"per_device_eval_batch_size": 5}}
    plain = flow_trainer(tmp_path, Trainer, **options)
    expected = plain.evaluate(wide)["eval_loss"]
    for each in weighted:
        flow = flow_trainer(tmp_path, scores=weights, eval_dataset=each, **options)
        assert flow.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    named = {"one": weighted[0], "other": wide}
    flow = flow_trainer(tmp_path, scores=weights, eval_dataset=named, **options)
    for losses in (flow.evaluate(), flow.evaluate(named)):
        for name in named:
            assert losses[f"eval_{name}_loss"] == pytest.approx(expected, rel=1e-6)
    for each in weighted:
        assert flow.evaluate(each)["eval_loss"] == pytest.approx(expected, rel=1e-6)
        predicted = flow.predict(each)
        assert predicted.metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
        assert (predicted.predictions == flow.predict(wide).predictions).all()


def test_resampling_leaves_the_loss_alone_and_reshuffles_each_epoch(tmp_path):
    weights = torch.zeros(tiny.N)
    weights[:4] = 1
    lengths = []

    def collate(samples):
        lengths.append([len(s["input_ids"]) for s in samples])
        return tiny.collate(samples)

    settings = {"max_steps": 16, "per_device_train_batch_size": 4}
    trainer = flow_trainer(
        tmp_path, scores=weights, resample=True, data_collator=collate, settings=settings
    )
    losses = curve(trainer)
    allowed = {len(s["input_ids"]) for s in tiny.make_samples()[:4]}
    assert all(length in allowed for batch in lengths for length in batch)
    assert lengths[:8] != lengths[8:16]
    assert all(math.isfinite(loss) for loss in losses)
    assert not hasattr(trainer.train_dataset, "weights")


def test_lora_trains_its_adapters_by_the_weights(tmp_path):
    peft = pytest.importorskip("peft")

    def lora():
        torch.manual_seed(5)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        return peft.get_peft_model(tiny.make_model(), config)

    gradients = []
    flow_trainer(
        tmp_path,
        model=lora(),
        scores=tiny.make_weights(),
        callbacks=[train_worker.record_gradients(gradients)],
        settings={
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "max_steps": 1,
            "max_grad_norm": 0.0,
        },
    ).train()
    tiny.assert_same_gradient(
        gradients[0], tiny.full_batch_gradient(tiny.make_weights(), model=lora())
    )


def test_a_mixture_of_experts_keeps_its_router_loss(tmp_path):
    def make():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                num_local_experts=4,
                output_router_logits=True,
                router_aux_loss_coef=0.5,
            )
        )

    plain = flow_trainer(tmp_path, Trainer, model=make())
    flow = flow_trainer(tmp_path, model=make(), scores=torch.ones(tiny.N))
    assert curve(flow) == pytest.approx(curve(plain), rel=1e-5)


def bert(cls, **config):
    torch.manual_seed(0)
    return cls(
        BertConfig(
            vocab_size=tiny.VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **config,
        )
    )


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=tiny.VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


def collate_labels(samples):
    batch = tiny.collate([{**s, "labels": s["input_ids"]} for s in samples])
    return batch | {"labels": torch.stack([torch.as_tensor(s["labels"]) for s in samples])}


def with_labels(labels):
    return [{"input_ids": s["input_ids"], "labels": labels[i]} for i, s in enumerate(samples())]


def samples():
    return tiny.make_samples()


LONGEST = max(len(sample["input_ids"]) for sample in tiny.make_samples())
OTHERS = {
    "classes": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        lambda: with_labels(torch.arange(tiny.N) % 3),
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="none"),
    ),
    "several classes": (
        lambda: bert(
            BertForSequenceClassification,
            num_labels=3,
            problem_type="multi_label_classification",
        ),
        lambda: with_labels((torch.arange(tiny.N * 3).view(-1, 3) % 2).float()),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="none"),
    ),
    "regression": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        lambda: with_labels(torch.arange(tiny.N) % 2 * 1.0),
        lambda logits, labels: (logits.squeeze(-1) - labels).square(),
    ),
    "token classes": (
        lambda: bert(BertForTokenClassification, num_labels=tiny.VOCABULARY),
        samples,
        lambda logits, labels: F.cross_entropy(logits.mT, labels, reduction="none"),
    ),
    "as many token classes as tokens": (
        lambda: bert(BertForTokenClassification, num_labels=LONGEST),
        lambda: [
            {**s, "labels": torch.where(s["labels"] == -100, -100, s["labels"] % LONGEST)}
            for s in samples()
        ],
        lambda logits, labels: F.cross_entropy(logits.mT, labels, reduction="none"),
    ),
    "shares of several classes": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        lambda: with_labels(torch.linspace(0, 1, tiny.N * 3).view(-1, 3)),
        lambda logits, labels: F.binary_cross_entropy_with_logits(logits, labels, reduction="none"),
    ),
    "masked tokens": (
        lambda: bert(BertForMaskedLM),
        samples,
        lambda logits, labels: F.cross_entropy(logits.mT, labels, reduction="none"),
    ),
    "encoder and decoder": (
        t5,
        samples,
        lambda logits, labels: F.cross_entropy(logits.mT, labels, reduction="none"),
    ),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_other_models_have_the_gradient_of_the_plain_weighted_loss(tmp_path, kind):
    make, data, losses_of = OTHERS[kind]
    collate = (
        collate_labels
        if data()[0]["labels"].dim() == 0 or kind.endswith("several classes")
        else None
    )
    collate = collate or tiny.collate
    weights, model = tiny.make_weights(), make()
    batch = collate(data())
    losses = losses_of(model(**batch).logits, batch["labels"])
    per_target = weights.view(-1, *[1] * (losses.dim() - 1)).expand_as(losses)
    targets = (batch["labels"] != -100).sum()
    if batch["labels"].is_floating_point():
        targets = losses.numel()
    weighted_mean(losses, per_target, num_items=targets).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    gradients = []

    class Recorder(FlowTrainer):
        def _clip_grad_norm(self, model):
            gradients.append(
                torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            )

    flow_trainer(
        tmp_path,
        Recorder,
        model=make(),
        train_dataset=data(),
        scores=weights,
        data_collator=collate,
        settings={
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 4,
            "max_steps": 1,
        },
    ).train()
    tiny.assert_same_gradient(gradients[0], expected)
    settings = {"per_device_train_batch_size": 8, "max_steps": 3}
    options = {"train_dataset": data(), "data_collator": collate, "settings": settings}
    plain = curve(flow_trainer(tmp_path, Trainer, model=make(), **options))
    ones = flow_trainer(tmp_path, model=make(), scores=torch.ones(tiny.N), **options)
    assert curve(ones) == pytest.approx(plain, rel=1e-5)


def test_a_loss_of_ones_own_is_weighted_per_sample(tmp_path):
    def sample_loss(outputs, batch):
        return outputs.logits.float().square().mean((1, 2))

    weights, gradients = tiny.make_weights(), []
    model, batch = tiny.make_model(), tiny.collate(tiny.make_samples())
    for normalize in tiny.NORMALIZE:
        model.zero_grad()
        losses = sample_loss(model(**batch), None)
        weighted_mean(losses, weights, normalize=normalize).backward()
        flow_trainer(
            tmp_path,
            scores=weights,
            loss=sample_loss,
            normalize=normalize,
            callbacks=[train_worker.record_gradients(gradients)],
            settings={
                "per_device_train_batch_size": tiny.N,
                "max_steps": 1,
                "max_grad_norm": 0.0,
            },
        ).train()
        tiny.assert_same_gradient(gradients.pop(), tiny.flat_gradient(model))


def test_a_token_rule_needs_no_scores(tmp_path):
    gradients = []
    settings = {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "max_steps": 1,
        "max_grad_norm": 0.0,
    }
    options = {"callbacks": [train_worker.record_gradients(gradients)], "settings": settings}
    flow_trainer(tmp_path, token_rule="dft", **options).train()
    tiny.assert_same_gradient(gradients[0], tiny.full_batch_gradient(None, token_rule="dft"))
    with pytest.raises(ValueError, match="token_rule is for causal language models"):
        flow_trainer(
            tmp_path,
            model=bert(BertForMaskedLM),
            token_rule="dft",
            **options,
        ).train()


def test_what_would_drop_or_double_the_weights_is_refused(tmp_path):
    weights, samples = tiny.make_weights(), tiny.make_samples()
    weighted = FlowWeightedDataset(samples, weights)
    with pytest.raises(ValueError, match="training would be unweighted: pass scores="):
        flow_trainer(tmp_path)
    with pytest.raises(TypeError, match="scores must be Scores, weights or 'auto', got True"):
        flow_trainer(tmp_path, scores=True)
    for scores in ("auto", weights):
        with pytest.raises(ValueError, match="scores are those of train_dataset, which is None"):
            flow_trainer(tmp_path, train_dataset=None, scores=scores)
    with pytest.raises(ValueError, match="carries weights"):
        flow_trainer(tmp_path, train_dataset=weighted, scores=weights)
    with pytest.raises(ValueError, match="carries weights"):
        flow_trainer(tmp_path, train_dataset=weighted, resample=True)
    with pytest.raises(ValueError, match="resample=True needs scores="):
        flow_trainer(tmp_path, resample=True)
    with pytest.raises(ValueError, match="label_smoothing_factor computes a loss of its own"):
        flow_trainer(tmp_path, scores=weights, settings={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="compute_loss_func never sees the weights"):
        flow_trainer(tmp_path, scores=weights, compute_loss_func=lambda *args, **kwargs: 0)
    with pytest.raises(TypeError, match="put FlowTrainerMixin before the Trainer"):
        type("Backwards", (Trainer, FlowTrainerMixin), {})


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -0.1, 1e39])
@pytest.mark.parametrize("is_of_tokens", [False, True])
def test_weights_of_a_column_are_checked_before_training(tmp_path, is_of_tokens, bad):
    samples, weights = tiny.make_samples(), tiny.make_weights().tolist()
    for row in (20, 29):
        weights[row] = bad
    if is_of_tokens:
        sizes = [len(sample["input_ids"]) for sample in samples]
        weights = [[0.5] * (n - 1) + [w] for w, n in zip(weights, sizes, strict=True)]
    dataset = tiny.as_hf_dataset(samples, weight=weights)
    unusable = []  # by a plain loop over all rows
    for row, weight in enumerate(weights):
        values = [math.nan if w is None else w for w in np.atleast_1d(weight)]
        values = torch.tensor(values, dtype=torch.float64).float().tolist()
        unusable += [row] * (not all(0 <= w < math.inf for w in values))
    count, first = len(unusable), unusable[0]
    message = f"{count} of the 32 rows of train_dataset have no usable 'weight', .* is row {first}:"
    for order in (range(tiny.N), range(tiny.N)[::-1]):
        if order[0]:
            message = message.replace(f"row {first}", f"row {tiny.N - 1 - unusable[-1]}")
        with pytest.raises(ValueError, match=message + ".*--missing drop"):
            flow_trainer(tmp_path, train_dataset=dataset.select(order).with_format("torch"))
    flow_trainer(tmp_path, train_dataset=dataset.select(range(20)))


def test_a_missing_weight_of_a_stream_is_refused_with_its_remedy(tmp_path):
    weights = [None, *tiny.make_weights().tolist()[1:]]
    stream = tiny.as_hf_dataset(tiny.make_samples(), weight=weights).to_iterable_dataset()
    trainer = flow_trainer(tmp_path, train_dataset=stream, data_collator=list)
    with pytest.raises(ValueError, match="the weight None, which is no number; drop samples"):
        next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("carries", [True, False])
def test_training_data_by_position_is_asked_for_by_name(tmp_path, carries):
    class Own(Trainer):
        def __init__(self, model, args, data_collator=None, train_dataset=None, **kwargs):
            super().__init__(model, args, data_collator, train_dataset, **kwargs)

    class FlowOwn(FlowTrainerMixin, Own):
        pass

    samples, weights = tiny.make_samples(), tiny.make_weights()
    data = FlowWeightedDataset(samples, weights) if carries else samples
    scores = {} if carries else {"scores": weights}
    for cls in (FlowTrainer, FlowOwn):
        first = tiny.make_model(), arguments(tmp_path), tiny.collate
        with pytest.raises(TypeError, match="train_dataset came by position; pass it, and"):
            cls(*first, data, **scores)
        losses = curve(cls(*first, train_dataset=data, **scores))
        assert losses == curve(flow_trainer(tmp_path, train_dataset=data, **scores))


def test_a_sampler_that_weighs_as_well_or_is_sharded_twice_is_refused(tmp_path):
    weights = tiny.make_weights()

    class Twice(FlowTrainer):
        def _get_train_sampler(self, *args):
            return FlowSampler(weights)

    class Sharded(FlowTrainer):
        def _get_train_sampler(self, *args):
            return FlowSampler(weights, num_replicas=2, rank=0)

    with pytest.raises(ValueError, match="the weights would act twice"):
        flow_trainer(tmp_path, Twice, scores=weights).train()
    with pytest.raises(ValueError, match="would be sharded twice"):
        flow_trainer(tmp_path, Sharded, scores=weights, resample=True).train()


@pytest.mark.parametrize("first", [True, False])
def test_a_loader_that_does_not_use_the_sampler_is_refused(tmp_path, first):
    class OwnSampler(Trainer):
        def _get_train_sampler(self, *args):
            return RandomSampler(self.train_dataset)

    class OwnLoader(Trainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 4, shuffle=True, collate_fn=tiny.collate)

    class OtherWeights(FlowTrainer):
        def _get_train_sampler(self, *args):
            return FlowSampler(torch.ones(tiny.N), num_replicas=1, rank=0)

    class After(FlowTrainerMixin, OwnSampler):
        """The mixin comes first, and its sampler is the one that is asked for."""

    wrong = [type("Loader", (FlowTrainerMixin, OwnLoader), {}), OtherWeights]
    for method, source in (
        ("_get_train_sampler", OwnSampler),
        ("get_train_dataloader", OwnLoader),
    ):
        override = {method: getattr(source, method)}
        if first:
            wrong.append(type("Subclass", (FlowTrainer,), override))
        else:
            wrong.append(type("Mixed", (type("Mixin", (), override), FlowTrainer), {}))
    for cls in wrong:
        trainer = flow_trainer(tmp_path, cls, scores=tiny.make_weights(), resample=True)
        with pytest.raises(ValueError, match="the training loader doesn't use it"):
            trainer.train()
    flow_trainer(tmp_path, After, scores=tiny.make_weights(), resample=True).train()


def test_a_loader_of_ones_own_may_use_the_sampler(tmp_path):
    class OwnLoader(FlowTrainer):
        def get_train_dataloader(self):
            sampler = self._get_train_sampler()
            batches = BatchSampler(sampler, 4, drop_last=True)
            loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=tiny.collate)
            return self.accelerator.prepare(loader)

    flow_trainer(tmp_path, OwnLoader, scores=tiny.make_weights(), resample=True).train()


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance", "sequential"])
def test_an_order_that_resampling_would_ignore_is_refused(tmp_path, strategy):
    settings = {"train_sampling_strategy": strategy}
    with pytest.raises(ValueError, match=f"'{strategy}' would be ignored"):
        flow_trainer(tmp_path, scores=tiny.make_weights(), resample=True, settings=settings)
    flow_trainer(tmp_path, scores=tiny.make_weights(), settings=settings).train()


def test_the_order_of_batches_is_the_trainers_own(tmp_path):
    settings = {"train_sampling_strategy": "sequential"}
    trainer = flow_trainer(tmp_path, scores=tiny.make_weights(), settings=settings)
    assert isinstance(trainer._get_train_sampler(), SequentialSampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "nonsense"}, "normalize must be 'count'"),
        ({"normalize": "nonsense", "resample": True}, "normalize must be 'count'"),
        ({"normalize": "weights", "resample": True}, "normalize='weights' would be ignored"),
    ],
)
def test_a_denominator_that_is_none_or_would_be_ignored_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        flow_trainer(tmp_path, scores=tiny.make_weights(), **options)


def test_a_temperature_of_weights_that_are_carried_is_refused(tmp_path):
    weighted = FlowWeightedDataset(tiny.make_samples(), tiny.make_weights(), layout="dict")
    column = [sample | {"weight": torch.tensor(0.5)} for sample in tiny.make_samples()]
    for dataset in (weighted, column):
        with pytest.raises(ValueError, match=r"temperature=-3.0 would be ignored.*have theirs"):
            flow_trainer(tmp_path, train_dataset=dataset, temperature=-3.0)
        flow_trainer(tmp_path, train_dataset=dataset)
    unscored = {"train_dataset": tiny.make_samples(), "token_rule": "dft"}
    with pytest.raises(ValueError, match=r"temperature=2.0 would be ignored without scores="):
        flow_trainer(tmp_path, temperature=2.0, **unscored)


def test_a_rule_is_refused_where_its_weights_would_be_the_denominator():
    with pytest.raises(ValueError, match="token_rule with normalize='weights' would divide"):
        FlowTrainer(None, token_rule="talr", normalize="weights")


def test_a_rule_is_refused_beside_a_loss_that_has_no_tokens():
    with pytest.raises(ValueError, match="token_rule is for causal language models, whose token"):
        FlowTrainer(None, token_rule="talr", loss=lambda outputs, batch: batch)
